"""Directories that appear whole or not at all."""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike, names: Collection[str], kind: str) -> Iterator[Path]:
    """Yields an empty directory beside ``path`` that takes its place when the block ends well.

    What is at ``path`` may be replaced if it is an empty directory or holds nothing but ``names``; it comes back
    if the exchange fails.

    Args:
      names: the file names that belong to such a directory.
      kind: what such a directory is called in the error.

    Raises:
      FileExistsError: there is something else at ``path``.
    """
    path = Path(path)
    refuse_foreign(path, names, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (path.with_name(f".{path.name}.{part}-{os.getpid()}") for part in ("new", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _exchange(staging, path, old)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as of a full disk, whose owner must know which
            error.filename = os.fspath(path)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_foreign(path: Path, names: Collection[str], kind: str) -> None:
    """Raise FileExistsError unless ``path`` is free, empty or holds nothing but ``names``."""
    if not (path.exists() or path.is_symlink()):
        return
    real_directory = path.is_dir() and not path.is_symlink()
    there = {entry.name for entry in path.iterdir()} if real_directory else {path.name}
    foreign = sorted(there - set(names))
    if foreign:
        raise FileExistsError(f"{path} is not {kind} (it has {foreign[0]}); choose another place")


def tidy(folder: Path) -> None:
    """Ends what killed processes began with :func:`replacing` in ``folder``; for the folder's only owner.

    A directory on its way out comes back if nothing has taken its place; the rest is removed.
    """
    for part in ("old", "new"):
        for left in folder.glob(f".*.{part}-*"):
            if found := re.fullmatch(rf"\.(.+)\.{part}-\d+", left.name):
                if part == "old" and not (folder / found[1]).exists():
                    left.rename(folder / found[1])
                else:
                    shutil.rmtree(left, ignore_errors=True)


def _exchange(staging: Path, path: Path, old: Path) -> None:
    """Put ``staging`` at ``path``; what was there comes back if that fails, and is removed if not."""
    if path.exists():
        path.rename(old)
    try:
        staging.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
