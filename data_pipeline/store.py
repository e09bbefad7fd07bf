"""The store: preprocessed cases on disk as memory-mapped arrays, written so that no half case ever exists.

    <store>/dataset.json               format version, channels, label scheme, normalisation, table of cases
    <store>/splits.json                {"train": [...], "val": [...], "test": [...], "fold0": {...}, ...}
    <store>/cases/<case_id>/image.npy  (D, H, W, 4) float16, channels in the order of cohorts.CHANNELS
                            label.npy  (D, H, W) uint8, canonical labels; absent without a segmentation
                            case.json  the record: all that is needed to go back to the case's own grid

D, H, W are the array axes after reorientation to RAS: left to right, posterior to anterior, inferior to
superior. A random crop reads only the pages it needs, and all processes of a machine share them.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline import atomic, labels, store_files
from data_pipeline.cohorts import CHANNELS, shown
from data_pipeline.normalization import DEFAULT
from data_pipeline.store_files import FORMAT_VERSION, case_folder

MAX_FOREGROUND = 2000


class Store:
    """Reader of a store; cheap to make, to pickle and to share between threads.

    Attributes:
      path: the folder.
      channels, label_scheme, normalization, spacing_mm: as in ``dataset.json``; the spacing is the median.
      data_hash: names the contents (sources and preprocessing); belongs into the record of every run.
      cases: {case_id: {patient_id, naming, shape, spacing_mm, labelled, label_voxels}}.
      splits: the content of ``splits.json``.

    Raises:
      FileNotFoundError: no store there, or its preprocessing was not finished.
      ValueError: another format version, or damaged files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "dataset.json").is_file():
            what = "was not finished" if (self.path / "cases").is_dir() else "is not there"
            remedy = f"run launch/preprocess.py --input=FOLDER --output={shown(self.path)}"
            raise FileNotFoundError(f"{shown(self.path)}: the store {what} (no dataset.json); {remedy}")
        dataset = store_files.read_dataset(self.path / "dataset.json")
        self.channels: tuple[str, ...] = tuple(dataset["channels"])
        self.label_scheme: str = dataset["label_scheme"]
        self.normalization: str = dataset["normalization"]
        self.spacing_mm: tuple[float, ...] = tuple(dataset["spacing_mm"])
        self.data_hash: str = dataset["data_hash"]
        self.cases: dict[str, dict] = dataset["cases"]
        self.splits: dict = store_files.read_splits(self.path / "splits.json", self.cases)

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
            known = [n if isinstance(s, list) else f"{n}/train, {n}/val" for n, s in self.splits.items()]
            raise ValueError(f"{shown(self.path)}: no split {name!r}; there are {', '.join(known)}")
        return list(value)

    def load(self, case_id: str) -> tuple[np.ndarray, np.ndarray | None, dict]:
        """One case as memory maps.

        Returns:
          image (D, H, W, 4) float16 and label (D, H, W) uint8, both read-only memory maps (the label is None
          when the case has no segmentation), and the case's record, see ``record``.

        Raises:
          ValueError: unknown case, or a damaged file.
          FileNotFoundError: a file of the case is gone.
        """
        record = self.record(case_id)
        folder, shape = case_folder(self.path, case_id), tuple(record["shape"])
        image = store_files.open_array(folder / "image.npy", np.float16, (*shape, len(self.channels)))
        label = store_files.open_array(folder / "label.npy", np.uint8, shape) if record["labelled"] else None
        return image, label, record

    def record(self, case_id: str) -> dict:
        """``case.json`` of a case; ``record["foreground"][region]``: (n, 3) int32 voxel indices (d, h, w)."""
        if case_id not in self.cases:
            raise ValueError(f"{shown(self.path)}: no case {case_id!r} among its {len(self.cases)} cases")
        file = case_folder(self.path, case_id) / "case.json"
        record = store_files.read_record(file, case_id)
        if record["labelled"] != self.cases[case_id]["labelled"]:
            raise ValueError(f"{shown(file)}: labelled is {record['labelled']}, dataset.json says the opposite; "
                             "preprocess the store again")  # fmt: skip
        return record


def foreground_index(label: np.ndarray, case_id: str) -> dict[str, list[list[int]]]:
    """At most ``MAX_FOREGROUND`` voxels (d, h, w) of each region of a canonical label map (D, H, W).

    The choice depends on the case id and the label alone, so preprocessing twice gives the same store.
    """
    result = {}
    for number, region in enumerate(labels.REGIONS):
        voxels = np.flatnonzero(labels.region_mask(label, region))
        if voxels.size > MAX_FOREGROUND:
            rng = np.random.default_rng([zlib.crc32(case_id.encode()), number])
            voxels = np.sort(rng.choice(voxels, MAX_FOREGROUND, replace=False))
        result[region] = np.stack(np.unravel_index(voxels, label.shape), axis=1).tolist()
    return result


def write_case(
    path: str | Path, case_id: str, image: np.ndarray, label: np.ndarray | None, record: Mapping
) -> dict:
    """Puts one case into the store at ``path``: all of it or, if interrupted, nothing.

    Safe to call from several processes for different cases. A case of that id is replaced.

    Args:
      image: (D, H, W, 4) float16, normalised.
      label: (D, H, W) uint8, canonical, or None.
      record: what else ``case.json`` should hold; ``patient_id`` defaults to the case id, ``naming`` to
        brats2023 and ``spacing_mm`` to 1 mm.

    Returns:
      the record as written, with ``case_id, shape, labelled, label_voxels, foreground`` filled in.

    Raises:
      ValueError: wrong dtype or shape, or a case id that is no plain name.
    """
    final = case_folder(path, case_id)
    _check_arrays(case_id, image, label)
    counts = None if label is None else np.bincount(label.ravel(), minlength=len(labels.NAMES)).tolist()
    record = {
        "patient_id": case_id,
        "naming": labels.CANONICAL_SCHEME,
        "spacing_mm": [1.0, 1.0, 1.0],
        **record,
        "format_version": FORMAT_VERSION,
        "case_id": case_id,
        "shape": list(image.shape[:3]),
        "labelled": label is not None,
        "label_voxels": counts,
        "foreground": {} if label is None else foreground_index(label, case_id),
    }
    staging = final.with_name(f".{case_id}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        np.save(staging / "image.npy", np.ascontiguousarray(image))
        if label is not None:
            np.save(staging / "label.npy", np.ascontiguousarray(label))
        (staging / "case.json").write_text(json.dumps(record, allow_nan=False) + "\n")
        _take_place(staging, final)
    except OSError as error:  # numpy's own message names no file
        raise OSError(f"{shown(final)} cannot be written ({error}): make room on the disk or give another path, and "
                      "run the same command again; finished cases are kept") from error  # fmt: skip
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def write_dataset(
    path: str | Path,
    records: Sequence[Mapping],
    splits: Mapping,
    data_hash: str = "",
    extra: Mapping | None = None,
    normalization: str = DEFAULT,
) -> Store:
    """Writes ``splits.json`` and then ``dataset.json``, which makes the store complete.

    Args:
      records: what ``write_case`` returned for each case.
      splits: see ``splits.make_splits``.
      data_hash: name of the contents, see ``Store``.
      extra: further entries of ``dataset.json`` (settings, versions).
      normalization: of the images, by name.
    """
    path = Path(path)
    columns = ("patient_id", "naming", "shape", "spacing_mm", "labelled", "label_voxels")
    ordered = sorted(records, key=lambda record: record["case_id"])
    table = {record["case_id"]: {column: record[column] for column in columns} for record in ordered}
    spacing = np.median([row["spacing_mm"] for row in table.values()], axis=0) if table else np.ones(3)
    dataset = {
        "format_version": FORMAT_VERSION,
        "channels": list(CHANNELS),
        "label_scheme": labels.CANONICAL_SCHEME,
        "normalization": normalization,
        "spacing_mm": spacing.tolist(),
        "data_hash": data_hash,
        **(extra or {}),
        "cases": table,
    }
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
            raise ValueError(f"{shown(path)}: another process is writing this store; wait for it to end")
        for leftover in (*(path / "cases").glob(".*.tmp"), *(path / "cases").glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _check_arrays(case_id: str, image: np.ndarray, label: np.ndarray | None) -> None:
    channels = len(CHANNELS)
    if image.dtype != np.float16 or image.ndim != 4 or image.shape[-1] != channels or not image.size:
        found = f"{image.shape} {image.dtype}"
        raise ValueError(f"{case_id}: the image must be (D, H, W, {channels}) float16, not {found}")
    if label is None:
        return
    if label.dtype != np.uint8 or label.shape != image.shape[:3]:
        found = f"{label.shape} {label.dtype}"
        raise ValueError(f"{case_id}: the label must be {image.shape[:3]} uint8, not {found}")
    if label.max() >= len(labels.NAMES):
        raise ValueError(f"{case_id}: the label must hold canonical values 0 to 3, found {label.max()}")


def _lock(file) -> bool:
    """Takes the lock, which the system gives back even after a kill -9; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: renames keep the store whole, only this guard is missing
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
    if not final.exists():
        os.rename(staging, final)
        return
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    os.rename(final, old)
    os.rename(staging, final)
    shutil.rmtree(old, ignore_errors=True)
