"""The store: preprocessed cases on disk as plain memory-mapped arrays, written so that no half case ever exists.

    <store>/dataset.json                  format version, channels, label scheme, normalisation, table of cases, versions
    <store>/splits.json                   {"train": [...], "val": [...], "test": [...], "fold0": {"train", "val"}, ...}
    <store>/cases/<case_id>/image.npy     (D, H, W, 4) float16, channels in the order of cohorts.CHANNELS
                            label.npy     (D, H, W) uint8, canonical labels; absent when the case has no segmentation
                            case.json     the record: all that is needed to go back to the case's own grid and header

D, H, W are the array axes after reorientation to RAS: left to right, posterior to anterior, inferior to superior.
A random crop reads only the pages it needs, and all processes of a machine share them.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline import atomic, labels
from data_pipeline.cohorts import CHANNELS, shown

FORMAT_VERSION = 1
NORMALIZATION = "zscore_brain"
MAX_FOREGROUND = 2000
_CASE_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9])?")
_FIELDS = {
    "channels": list, "label_scheme": str, "normalization": str, "spacing_mm": list, "cases": dict, "data_hash": str,
}  # fmt: skip


class Store:
    """Reader of a store; cheap to make, to pickle and to share between threads.

    Attributes:
      path: the folder.
      channels, label_scheme, normalization, spacing_mm, data_hash: as in ``dataset.json``; ``data_hash`` names the
        contents (sources and preprocessing) and belongs into the record of every run.
      cases: {case_id: row of the table: patient_id, naming, shape, spacing_mm, labelled, label_voxels}.
      splits: the content of ``splits.json``.

    Raises:
      FileNotFoundError: no store there, or its preprocessing was not finished.
      ValueError: another format version, or damaged files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "dataset.json").is_file():
            what = "was not finished" if (self.path / "cases").is_dir() else "is not there"
            remedy = f"launch/preprocess.py --input=FOLDER --output={shown(self.path)}"
            raise FileNotFoundError(f"{shown(self.path)}: the store {what} (no dataset.json); run {remedy}")
        dataset = _read_dataset(self.path / "dataset.json")
        self.channels = tuple(dataset["channels"])
        self.label_scheme: str = dataset["label_scheme"]
        self.normalization: str = dataset["normalization"]
        self.spacing_mm = tuple(dataset["spacing_mm"])
        self.data_hash: str = dataset["data_hash"]
        self.cases: dict[str, dict] = dataset["cases"]
        self.splits = _read_splits(self.path / "splits.json", self.cases)

    @property
    def case_ids(self) -> list[str]:
        """All cases, sorted, also those without a segmentation."""
        return sorted(self.cases)

    def split(self, name: str) -> list[str]:
        """Case ids of a split: ``train``, ``val``, ``test``, or ``fold0/train``, ``fold0/val``.

        Raises:
          ValueError: no such split; the error lists those there are.
        """
        value: object = self.splits
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, list):
            known = [key if isinstance(entry, list) else f"{key}/train, {key}/val" for key, entry in self.splits.items()]
            raise ValueError(f"{shown(self.path)}: no split {name!r}; there are {', '.join(known)}")
        return list(value)

    def load(self, case_id: str) -> tuple[np.ndarray, np.ndarray | None, dict]:
        """One case as memory maps.

        Returns:
          image (D, H, W, 4) float16 read-only memmap, label (D, H, W) uint8 read-only memmap (None if the case has no
          segmentation), and its record, see ``record``.

        Raises:
          ValueError: unknown case, or a damaged file.
          FileNotFoundError: a file of the case is gone.
        """
        record = self.record(case_id)
        folder = self._folder(case_id)
        image = _open_array(folder / "image.npy", np.float16, (*record["shape"], len(self.channels)))
        label = _open_array(folder / "label.npy", np.uint8, tuple(record["shape"])) if record["labelled"] else None
        return image, label, record

    def record(self, case_id: str) -> dict:
        """``case.json`` of a case; ``record["foreground"][region]`` is an (n, 3) int32 array of voxel indices (d, h, w)."""
        path = self._folder(case_id) / "case.json"
        record = _read_json(path)
        try:
            shape = [int(size) for size in record["shape"]]
            if record["case_id"] != case_id or len(shape) != 3 or min(shape) < 1:
                raise ValueError("does not describe this case")
            record["labelled"] = bool(record["labelled"])
            for region, voxels in record["foreground"].items():
                index = np.asarray(voxels, np.int32).reshape(-1, 3)
                if (index < 0).any() or (index >= shape).any():
                    raise ValueError("a foreground voxel outside the volume")
                record["foreground"][region] = index
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{shown(path)} is damaged ({error!r}); delete its folder and preprocess again") from error
        return record

    def _folder(self, case_id: str) -> Path:
        if case_id not in self.cases:
            raise ValueError(f"{shown(self.path)}: no case {case_id!r} among its {len(self.cases)} cases")
        return case_folder(self.path, case_id)


def case_folder(path: str | Path, case_id: str) -> Path:
    """Folder of a case in the store at ``path``.

    Raises:
      ValueError: a case id that is no plain name (a path, hidden, empty, too long).
    """
    if not isinstance(case_id, str) or not _CASE_ID.fullmatch(case_id):
        raise ValueError(f"case id {case_id!r} is no plain name of letters, digits, '.', '_' and '-'")
    return Path(path) / "cases" / case_id


def foreground_index(label: np.ndarray, case_id: str, limit: int = MAX_FOREGROUND) -> dict[str, list[list[int]]]:
    """At most ``limit`` voxels (d, h, w) of each region of a canonical label map (D, H, W), for foreground sampling.

    The choice depends on the case id and the label alone, so preprocessing twice gives the same store.
    """
    result = {}
    for number, region in enumerate(labels.REGIONS):
        voxels = np.flatnonzero(labels.region_mask(label, region))
        if voxels.size > limit:
            rng = np.random.default_rng([zlib.crc32(case_id.encode()), number])
            voxels = np.sort(rng.choice(voxels, limit, replace=False))
        result[region] = np.stack(np.unravel_index(voxels, label.shape), axis=1).tolist()
    return result


def write_case(path: str | Path, case_id: str, image: np.ndarray, label: np.ndarray | None, record: Mapping) -> dict:
    """Puts one case into the store at ``path``: all of it or, if interrupted, nothing.

    Safe to call from several processes for different cases. A case of that id is replaced.

    Args:
      image: (D, H, W, 4) float16, normalised.
      label: (D, H, W) uint8, canonical, or None.
      record: what else ``case.json`` should hold; ``patient_id`` defaults to the case id, ``naming`` to brats2023 and
        ``spacing_mm`` to 1 mm.

    Returns:
      the record as written, with ``case_id, shape, labelled, label_voxels, foreground`` filled in.

    Raises:
      ValueError: wrong dtype or shape, or a case id that is no plain name.
    """
    final = case_folder(path, case_id)
    if image.dtype != np.float16 or image.ndim != 4 or image.shape[-1] != len(CHANNELS):
        raise ValueError(f"{case_id}: the image must be (D, H, W, {len(CHANNELS)}) float16, not {image.shape} {image.dtype}")
    if label is not None and (label.dtype != np.uint8 or label.shape != image.shape[:3]):
        raise ValueError(f"{case_id}: the label must be {image.shape[:3]} uint8, not {label.shape} {label.dtype}")
    if label is not None and label.size and label.max() >= len(labels.NAMES):
        raise ValueError(f"{case_id}: the label must hold canonical values 0 to 3, found {label.max()}")
    counts = np.bincount(label.ravel(), minlength=len(labels.NAMES)).tolist() if label is not None else None
    record = {"patient_id": case_id, "naming": labels.CANONICAL_SCHEME, "spacing_mm": [1.0] * 3, **record}
    record |= {
        "format_version": FORMAT_VERSION, "case_id": case_id, "shape": list(image.shape[:3]),
        "labelled": label is not None, "label_voxels": counts,
        "foreground": foreground_index(label, case_id) if label is not None else {},
    }  # fmt: skip
    staging = final.with_name(f".{case_id}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        np.save(staging / "image.npy", np.ascontiguousarray(image))
        if label is not None:
            np.save(staging / "label.npy", np.ascontiguousarray(label))
        (staging / "case.json").write_text(json.dumps(record, allow_nan=False) + "\n")
        _take_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def write_dataset(
    path: str | Path, records: Sequence[Mapping], splits: Mapping, data_hash: str = "", extra: Mapping | None = None
) -> Store:
    """Writes ``splits.json`` and then ``dataset.json``, which makes the store complete.

    Args:
      records: what ``write_case`` returned for each case (``case_id, patient_id, naming, shape, spacing_mm, labelled,
        label_voxels`` are used).
      splits: see ``splits.make_splits``.
      data_hash: name of the contents, see ``Store``.
      extra: further entries of ``dataset.json`` (settings, versions).
    """
    path = Path(path)
    columns = ("patient_id", "naming", "shape", "spacing_mm", "labelled", "label_voxels")
    table = {row["case_id"]: {key: row[key] for key in columns} for row in sorted(records, key=lambda r: r["case_id"])}
    spacing = np.median([row["spacing_mm"] for row in table.values()], axis=0) if table else np.ones(3)
    dataset = {
        "format_version": FORMAT_VERSION, "channels": list(CHANNELS), "label_scheme": labels.CANONICAL_SCHEME,
        "normalization": NORMALIZATION, "spacing_mm": spacing.tolist(), "data_hash": data_hash, **(extra or {}),
        "cases": table,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path / "splits.json", splits)
    atomic.write_json(path / "dataset.json", dataset)
    return Store(path)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes the store's folder, keeps a second writer out, and removes what a killed writer left behind.

    Raises:
      ValueError: another process is writing this store.
      OSError: the folder cannot be made or written.
    """
    path = Path(path)
    (path / "cases").mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as file:
        if not _lock(file):
            raise ValueError(f"{shown(path)}: another process is writing this store; wait for it or choose another folder")
        for leftover in (*(path / "cases").glob(".*.tmp"), *(path / "cases").glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _lock(file) -> bool:
    """Takes the lock, which the system gives back even after a kill -9; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: renames keep the store whole, only the guard against two writers is missing
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _take_place(staging: Path, final: Path) -> None:
    """Renames a complete case folder to its final name; an older version of the case goes first."""
    if final.exists():
        old = final.with_name(f".{final.name}.{os.getpid()}.old")
        os.rename(final, old)
        os.rename(staging, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(staging, final)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} is missing; preprocess the store again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is no valid JSON ({error}); preprocess the store again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} does not hold a JSON object; preprocess the store again")
    return content


def _read_dataset(path: Path) -> dict:
    dataset = _read_json(path)
    if (version := dataset.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{shown(path)}: store format version {version!r}, this program reads version {FORMAT_VERSION}; "
            "preprocess the data again into a new folder"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(dataset.get(name), kind):
            raise ValueError(f"{shown(path)}: field {name!r} is missing or damaged; preprocess the store again")
    for case_id, row in dataset["cases"].items():
        case_folder(path.parent, case_id)
        if not isinstance(row, dict):
            raise ValueError(f"{shown(path)}: the row of case {case_id} is damaged; preprocess the store again")
    return dataset


def _read_splits(path: Path, cases: Mapping) -> dict:
    content = _read_json(path)
    for name, entry in content.items():
        for part in entry.values() if isinstance(entry, dict) else (entry,):
            if not isinstance(part, list) or not all(isinstance(case_id, str) for case_id in part):
                raise ValueError(f"{shown(path)}: split {name!r} is not a list of case ids")
            unknown = [case_id for case_id in part if case_id not in cases]
            if unknown:
                raise ValueError(f"{shown(path)}: split {name!r} names {unknown[0]!r}, which is no case of this store")
    return content


def _open_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Memory map of an .npy file that must have this dtype and shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} is missing; delete its folder and preprocess again") from None
    except Exception as error:  # a damaged header can fail in numpy's parser in nearly any way
        raise ValueError(f"{shown(path)} is damaged or truncated ({error}); delete its folder and preprocess again") from error
    if array.dtype != dtype or array.shape != shape:
        found = f"{array.shape} {array.dtype}"
        raise ValueError(f"{shown(path)} holds {found} instead of {shape} {np.dtype(dtype)}; delete its folder and preprocess again")
    return array
