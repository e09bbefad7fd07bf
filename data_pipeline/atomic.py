"""Files that appear whole or not at all: written under a hidden temporary name, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there takes its place if the block ends well.

    The folder is made if there is none. The temporary name starts with a dot, so that no scan of the folder
    takes a half-written file for a real one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` at once, flushed to the disk before it gets its name."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, content: object) -> None:
    """Writes ``content`` as indented JSON; NaN is refused, since it is not JSON."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
