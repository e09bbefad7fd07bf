"""What a file was when it was read: so that what was made of it is made again if it changes."""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fingerprint = dict[str, Any]


def of(path: Path) -> Fingerprint | None:
    """Name, size, time and hash of a file; None if it cannot be read, which whoever reads it will report."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, /dev/zero never end
            return None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    return {"file": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def are_of(known: Mapping[str, Fingerprint], files: Mapping[str, Path]) -> bool:
    """Whether files are what is known of them: by size and time, else by content (copies change the time).

    Raises: OSError for a file that is not there; KeyError or TypeError for what is no fingerprint.
    """
    return known.keys() == files.keys() and all(_is_of(known[name], file) for name, file in files.items())


def _is_of(known: Fingerprint, path: Path) -> bool:
    status = os.stat(path)
    if (known["file"], known["bytes"]) != (path.name, status.st_size):
        return False
    now = of(path) if known["mtime_ns"] != status.st_mtime_ns else known
    return now is not None and now["sha256"] == known["sha256"]
