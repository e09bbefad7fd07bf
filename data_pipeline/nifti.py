"""Reads NIfTI files that may be damaged or hostile, and writes label maps on another file's grid.

The reader trusts nothing: sizes are checked before memory is taken, a compressed file is read to its end so
that its checksum counts, and whatever is wrong comes out as one ``NiftiError`` that names the file.
"""

import base64
import gzip
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel import orientations

from data_pipeline import atomic
from data_pipeline.cohorts import shown

# 640 voxels cubed; a whole head at 0.4 mm has fewer. Guards memory against a damaged or hostile header.
MAX_VOXELS = 2**28
_MAX_HEADER_BYTES = 2**24  # header with extensions
_MAX_TRAILING_BYTES = 2**20
_DEFLATE_LIMIT = 1032  # the DEFLATE format cannot pack more bytes than this into one
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MAGICS = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}
_RAS = np.array([[0, 1], [1, 1], [2, 1]])

# nibabel reports each oddity that it repairs in a header; its logger would print them between our lines.
_SILENT = logging.getLogger(f"{__name__}.header")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class NiftiError(ValueError):
    """A file that is no usable 3-D volume; ``kind`` is the short name of the problem."""

    def __init__(self, path: str | Path, kind: str, message: str):
        super().__init__(f"{shown(path)}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Volume:
    """One 3-D file as stored: array axes are the file's own, nothing is reoriented.

    Attributes:
      path: the file.
      array: (X, Y, Z) in the stored dtype; float64 where the header scales the stored numbers.
      affine: (4, 4) float64, voxel index to mm (RAS+ world), from sform, else qform, else voxel sizes.
      header: the header as found, with unusable fields repaired as nibabel does.
    """

    path: Path
    array: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header


def read(path: str | Path) -> Volume:
    """Reads a ``.nii`` or ``.nii.gz`` file (told apart by content, not by name).

    Raises:
      NiftiError: missing, truncated, corrupt, not 3-D, of a dtype that is no real number, or too large.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise NiftiError(path, "unreadable file", "is not a regular file")
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if packed else raw as file:
                return _read_open(path, file, os.path.getsize(path), packed)
    except NiftiError:
        raise
    except FileNotFoundError:
        link = path.is_symlink()
        text = "is a link to a file that is not there" if link else "no such file"
        raise NiftiError(path, "unreadable file", text) from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise NiftiError(path, "unreadable file", f"truncated or corrupt ({error}); copy it again") from error
    except Exception as error:  # a damaged header can fail in the parser in nearly any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NiftiError(path, "unreadable file", f"cannot be read as NIfTI ({reason})") from error


def _read_open(path: Path, file: BinaryIO, file_bytes: int, packed: bool) -> Volume:
    """Reads header and voxels from an open stream of which ``file_bytes`` bytes lie on the disk."""
    head = file.read(540)
    header = _parse_header(path, head)
    shape, dtype, affine = _check_header(path, header)
    start = header.get_data_offset()
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not header.structarr.dtype.itemsize <= start <= _MAX_HEADER_BYTES:
        raise NiftiError(path, "unreadable file", f"damaged header (voxels start at byte {start})")
    if start + size > file_bytes * (_DEFLATE_LIMIT if packed else 1):
        text = f"truncated: the header promises {start + size} bytes, the file has {file_bytes}"
        raise NiftiError(path, "unreadable file", f"{text}{' compressed' if packed else ''}; copy it again")
    body = head + file.read(max(start + size - len(head), 0))
    if len(body) < start + size:
        text = f"truncated: the header promises {start + size} bytes, there are {len(body)}; copy it again"
        raise NiftiError(path, "unreadable file", text)
    # Reading on to the end makes gzip compare its checksum; the limit keeps a bomb from being unpacked.
    if len(file.read(_MAX_TRAILING_BYTES + 1)) > _MAX_TRAILING_BYTES:
        raise NiftiError(path, "unreadable file", "goes on after its last voxel: header and data do not fit")
    array = np.frombuffer(body, dtype, offset=start, count=size // dtype.itemsize).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        array = array.astype(np.float64) * slope + intercept
    return Volume(path, array, affine, header)


def _parse_header(path: Path, head: bytes) -> nib.Nifti1Header:
    """Header from the first bytes of a file, either byte order, NIfTI-1 or NIfTI-2."""
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")} & _HEADERS.keys()
    if not sizes or len(head) < (size := sizes.pop()):
        raise NiftiError(path, "unreadable file", "has no NIfTI header" if head else "is empty; copy it again")
    at, magic = _MAGICS[size]
    if head[at : at + len(magic)] != magic:
        raise NiftiError(path, "unreadable file", "is not a NIfTI file with header and voxels in one")
    header = _HEADERS[size](head[:size], check=False)
    header.check_fix(logger=_SILENT, error_level=40)
    return header


def _check_header(path: Path, header: nib.Nifti1Header) -> tuple[tuple[int, ...], np.dtype, np.ndarray]:
    """Shape, dtype and affine, each fit for use."""
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) != 3:
        raise NiftiError(path, "not 3-D", f"is {len(shape)}-D {shape}; give one 3-D volume per file")
    if min(shape) < 1:
        raise NiftiError(path, "unreadable file", f"damaged header (shape {shape})")
    voxels = int(np.prod(shape, dtype=object))
    if voxels > MAX_VOXELS:
        text = f"the header declares {shape}, {voxels} voxels; the limit is {MAX_VOXELS}"
        raise NiftiError(path, "too large", text)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        text = f"stores {dtype} voxels; only real numbers of at most 8 bytes are read"
        raise NiftiError(path, "unreadable file", text)
    affine = np.array(header.get_best_affine(), np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # A sine under 0.001 between axes, or a voxel under a nanometre, leaves no way back from mm to voxels.
    if not np.isfinite(affine).all() or lengths.min() < 1e-6 or _flatness(affine, lengths) < 1e-3:
        raise NiftiError(path, "unusable affine", f"has an affine without inverse: {affine[:3].tolist()}")
    return shape, dtype, affine


def _flatness(affine: np.ndarray, lengths: np.ndarray) -> float:
    """Volume of the box that the unit axes span: 1 for right angles, 0 when they lie in a plane."""
    return abs(float(np.linalg.det(affine[:3, :3] / lengths)))


def orientation(affine: np.ndarray) -> np.ndarray:
    """(3, 2) table for ``to_ras``: to which RAS axis each array axis goes, and whether it is flipped (-1)."""
    return orientations.io_orientation(affine)


def to_ras(array: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Permutes and flips the first three axes to left-right, posterior-anterior, inferior-superior."""
    return orientations.apply_orientation(array, table)


def from_ras(array: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Exact inverse of ``to_ras`` for the same table."""
    return orientations.apply_orientation(array, orientations.ornt_transform(_RAS, np.asarray(table)))


def ras_affine(affine: np.ndarray, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Affine of ``to_ras(array, table)`` for an array of ``shape`` with ``affine``."""
    return affine @ orientations.inv_ornt_aff(table, shape)


def describe(volume: Volume) -> dict:
    """What is needed to write another array on this volume's grid, as JSON."""
    return {
        "file": volume.path.name,
        "shape": list(volume.array.shape),
        "affine": volume.affine.tolist(),
        "orientation": "".join(nib.aff2axcodes(volume.affine)),
        "header": base64.b64encode(volume.header.binaryblock).decode(),
    }


def write_like(path: str | Path, array: np.ndarray, reference: Mapping | str | Path) -> None:
    """Writes a label map as uint8 with the header of another file: same affine, codes, units, voxel sizes.

    Of the header only the dtype and what belongs to the old intensities (scaling, display range) change.

    Args:
      path: ``.nii.gz`` (compressed) or ``.nii``; appears whole or not at all.
      array: whole numbers 0 to 255 in the reference's own axes and shape, see ``preprocess.restore``.
      reference: a case's record, ``describe``'s result, or an image file.

    Raises:
      ValueError: another shape than the reference's, values that are no uint8, or another file ending.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{shown(path)}: must end in .nii.gz or .nii")
    header = _reference_header(reference)
    shape = tuple(int(size) for size in header.get_data_shape())
    if array.shape != shape:
        raise ValueError(f"{shown(path)}: the array is {array.shape}, the reference {shape}")
    with np.errstate(invalid="ignore"):
        stored = array.astype(np.uint8)
    if not (stored == array).all():
        raise ValueError(f"{shown(path)}: labels must be whole numbers from 0 to 255")
    header.set_data_dtype(np.uint8)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header["vox_offset"] = header.structarr.dtype.itemsize + 4
    data = header.binaryblock + bytes(4) + stored.tobytes(order="F")  # four zeros: no extensions follow
    atomic.write_bytes(path, gzip.compress(data, 6, mtime=0) if path.name.endswith(".gz") else data)


def _reference_header(reference: Mapping | str | Path) -> nib.Nifti1Header:
    if not isinstance(reference, Mapping):
        return read(reference).header.copy()
    block = base64.b64decode(reference.get("original", reference)["header"])
    return _HEADERS[len(block)](block, check=False)
