"""The files of a store: where they lie, and reading them so that a damaged one is named with its remedy."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipeline.cohorts import shown

FORMAT_VERSION = 1
_CASE_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9])?")
_DATASET_FIELDS = {
    "channels": list,
    "label_scheme": str,
    "normalization": str,
    "spacing_mm": list,
    "data_hash": str,
    "cases": dict,
}
_REMEDY = "preprocess the store again"
_CASE_REMEDY = "delete its folder and preprocess the store again"


def case_folder(path: str | Path, case_id: str) -> Path:
    """Folder of a case in the store at ``path``.

    Raises:
      ValueError: a case id that is no plain name (a path, hidden, empty, too long).
    """
    if not isinstance(case_id, str) or not _CASE_ID.fullmatch(case_id):
        raise ValueError(f"case id {case_id!r} is no plain name of letters, digits, '.', '_' and '-'")
    return Path(path) / "cases" / case_id


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON object in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} is missing; {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is no valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} does not hold a JSON object; {_REMEDY}")
    return content


def read_dataset(path: Path) -> dict:
    """Reads and checks ``dataset.json``.

    Raises:
      ValueError: another format version, a missing field, or a case id that is no plain name.
    """
    dataset = read_json(path)
    if (version := dataset.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{shown(path)}: store format version {version!r}, this program reads version {FORMAT_VERSION}; "
            "preprocess the data again into a new folder"
        )
    for name, kind in _DATASET_FIELDS.items():
        if not isinstance(dataset.get(name), kind):
            raise ValueError(f"{shown(path)}: field {name!r} is missing or damaged; {_REMEDY}")
    for case_id, row in dataset["cases"].items():
        try:
            case_folder(path.parent, case_id)
        except ValueError as error:
            raise ValueError(f"{shown(path)}: {error}; {_REMEDY}") from None
        kinds = (("patient_id", str), ("labelled", bool))
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds):
            raise ValueError(f"{shown(path)}: the row of case {case_id} is damaged; {_REMEDY}")
    return dataset


def read_splits(path: Path, cases: Mapping) -> dict:
    """Reads ``splits.json`` and checks that every list holds cases of the store.

    Raises:
      FileNotFoundError, ValueError: see ``read_json``; an entry that is no list of known cases.
    """
    content = read_json(path)
    for name, entry in content.items():
        for part in entry.values() if isinstance(entry, dict) else (entry,):
            if not isinstance(part, list) or not all(isinstance(case_id, str) for case_id in part):
                raise ValueError(f"{shown(path)}: split {name!r} is not a list of case ids; {_REMEDY}")
            unknown = [case_id for case_id in part if case_id not in cases]
            if unknown:
                raise ValueError(f"{shown(path)}: split {name!r} names {unknown[0]!r}, no case of this store")
    return content


def read_record(path: Path, case_id: str) -> dict:
    """Reads ``case.json``; its foreground lists become (n, 3) int32 arrays.

    Raises:
      FileNotFoundError, ValueError: see ``read_json``; a record that does not describe this case.
    """
    record = read_json(path)
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
        raise ValueError(f"{shown(path)} is damaged ({error}); {_CASE_REMEDY}") from error
    return record


def open_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Read-only memory map of an .npy file that must have this dtype and shape.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, truncated, or something else than promised.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} is missing; {_CASE_REMEDY}") from None
    except Exception as error:  # a damaged header can fail in numpy's parser in nearly any way
        raise ValueError(f"{shown(path)} is damaged or truncated ({error}); {_CASE_REMEDY}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = f"{getattr(array, 'shape', '')} {getattr(array, 'dtype', type(array).__name__)}"
        raise ValueError(f"{shown(path)} holds {found}, not {shape} {np.dtype(dtype)}; {_CASE_REMEDY}")
    return array
