"""Files that appear whole or not at all: written under a hidden temporary name, then renamed."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there takes its place if the block ends well.

    The folder is made if there is none. The temporary name starts with a dot, so that no scan of the folder
    takes a half-written file for a real one.

    Raises: OSError that names ``path`` where the system names no file, as for a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def replacing_files(folder: str | Path, names: Collection[str]) -> Iterator[Path]:
    """Yields an empty hidden folder inside ``folder``, whose files take their places together if the block ends well.

    Args:
      names: files that belong together: those of them that were not written then go.

    Raises: OSError that names ``folder`` where the system names no file.
    """
    folder = Path(folder)
    staging = folder / ".unfinished"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    try:
        with _naming(folder):
            staging.mkdir(parents=True)
            yield staging
            written = sorted(staging.iterdir())
            for name in set(names) - {file.name for file in written}:
                (folder / name).unlink(missing_ok=True)
            for file in written:
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError without a file name gets this one: whose disk is full is what its owner must know."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` at once, flushed to the disk before it gets its name."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, content: object) -> None:
    """Writes ``content`` as indented JSON; NaN is refused, since it is not JSON."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
