"""Writing safetensors files."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save


def write(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays by name, as Python writes any file.

    The library's own ``save_file`` gives its files to their owner alone, whatever the umask says, so that colleagues on
    a shared disk see a model that they cannot read; and a full disk is an error of its own there.

    Raises:
      OSError: the file cannot be written.
    """
    Path(path).write_bytes(save(dict(tensors), None if metadata is None else dict(metadata)))
