"""Which cases train, validate and test: drawn by patient from a seed, or taken from the user's file.

A patient's time points always stay together. Folds divide the patients that are not in the test set; ``val``
is one draw of its own, so that a run without folds has a validation set of the size asked for.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.cohorts import shown

_PARTS = ("train", "val", "test")
DEFAULT_FOLDS = 5


def make_splits(
    patients: Mapping[str, str],
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    folds: int | None = None,
) -> dict:
    """Draws named splits and folds.

    Args:
      patients: {case id: patient id} of the cases with a segmentation.
      val_fraction, test_fraction: parts of the patients; a fraction above 0 takes at least one patient (val
        first) as long as one is left to train on.
      folds: number of folds, 0 for none. None: ``DEFAULT_FOLDS``, or one per patient in a smaller cohort (none for a
        single patient).

    Returns:
      ``{"train": [...], "val": [...], "test": [...], "fold0": {"train": [...], "val": [...]}, ...}``, each
      list sorted. The draw depends on seed and patients alone, not on their order.

    Raises:
      ValueError: fractions outside 0 to 1 or that leave nobody to train on; folds below 0, equal to 1, or more than
        there are patients outside the test set.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}: it must be at least 0 and below 1")
    if val_fraction + test_fraction >= 1:
        both = f"val_fraction {val_fraction} and test_fraction {test_fraction}"
        raise ValueError(f"{both} leave no case to train on")
    if folds is not None and (folds < 0 or folds == 1):
        raise ValueError(f"folds is {folds}: 0 (none) or at least 2 is needed")
    names = np.array(sorted(set(patients.values())), dtype=object)
    np.random.default_rng(seed).shuffle(names)
    n_val = _share(val_fraction, len(names), len(names) - 1)
    n_test = _share(test_fraction, len(names), len(names) - n_val - 1)
    test, val, train = names[:n_test], names[n_test : n_test + n_val], names[n_test + n_val :]
    splits: dict = {
        part: _cases_of(patients, chosen) for part, chosen in zip(_PARTS, (train, val, test), strict=True)
    }
    rest = names[n_test:]
    if folds is not None and folds > len(rest):
        raise ValueError(f"folds is {folds}, but there are {len(rest)} patients to divide: give at most {len(rest)}")
    count = min(DEFAULT_FOLDS, len(rest)) if folds is None else folds
    for k in range(count if count >= 2 else 0):
        held_out = set(rest[k::count])
        others = set(rest) - held_out
        splits[f"fold{k}"] = {"train": _cases_of(patients, others), "val": _cases_of(patients, held_out)}
    return splits


def read_splits(path: str | Path, patients: Mapping[str, str], left_out: Collection[str] = ()) -> dict:
    """Reads the user's splits and checks them against the cases.

    Two forms of JSON are known: an object ``{"train": [...], "val": [...], "test": [...], "fold0": {"train",
    "val"}}`` with any of the names, and nnU-Net's ``splits_final.json``, a list of ``{"train", "val"}`` that
    become ``fold0, fold1, ...``. If only folds are given, ``train`` and ``val`` are those of ``fold0``.

    Args:
      patients: {case id: patient id} of the cases with a segmentation.
      left_out: cases that were skipped on purpose; they are dropped from the lists.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not of these forms, an unknown case, a case twice in a list, or a patient on both sides.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)}: no such file with splits") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is no valid JSON ({error})") from error
    if isinstance(content, list) and all(isinstance(fold, dict) for fold in content):
        content = {f"fold{k}": fold for k, fold in enumerate(content)}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{shown(path)}: expected an object of named lists, or a list of train/val pairs")
    folds = {name: part for name, part in content.items() if isinstance(part, dict)}
    named = {name: part for name, part in content.items() if name not in folds}
    if not named and folds:
        named = {part: next(iter(folds.values())).get(part, []) for part in ("train", "val")}
    named = {part: named.get(part, []) for part in _PARTS} | named
    check = _Checker(path, patients, frozenset(left_out))
    result: dict = {name: check.cases(name, part) for name, part in named.items()}
    for name, fold in folds.items():
        if fold.keys() != {"train", "val"}:
            raise ValueError(f"{shown(path)}: {name} must hold the two lists train and val")
        result[name] = {part: check.cases(f"{name}/{part}", fold[part]) for part in ("train", "val")}
        check.apart(name, result[name])
    check.apart("the file", {part: result[part] for part in _PARTS})
    return result


class _Checker:
    """Checks lists of the user's file against the cases there are."""

    def __init__(self, path: Path, patients: Mapping[str, str], left_out: frozenset[str]):
        self.path, self.patients, self.left_out = path, patients, left_out

    def cases(self, name: str, part: object) -> list[str]:
        """A list of known cases, without those left out."""
        if not isinstance(part, list) or not all(isinstance(case_id, str) for case_id in part):
            raise ValueError(f"{shown(self.path)}: {name} is not a list of case ids")
        kept = [case_id for case_id in part if case_id not in self.left_out]
        for case_id in kept:
            if case_id not in self.patients:
                why = "is not among the cases with a segmentation"
                raise ValueError(f"{shown(self.path)}: {name} names {case_id!r}, which {why}")
        if len(set(kept)) < len(kept):
            twice = next(case_id for case_id in kept if kept.count(case_id) > 1)
            raise ValueError(f"{shown(self.path)}: {name} names {twice!r} twice")
        return sorted(kept)

    def apart(self, where: str, parts: Mapping[str, Sequence[str]]) -> None:
        """No patient may be in two parts, not even with different time points."""
        owner: dict[str, str] = {}
        for part, case_ids in parts.items():
            for case_id in case_ids:
                patient = self.patients[case_id]
                if owner.setdefault(patient, part) != part:
                    text = f"patient {patient} is in both {owner[patient]} and {part} of {where}"
                    raise ValueError(f"{shown(self.path)}: {text}")


def _share(fraction: float, total: int, most: int) -> int:
    """Patients for a fraction: rounded, at least one if anything was asked for, never above ``most``."""
    wanted = max(round(fraction * total), 1) if fraction > 0 else 0
    return max(min(wanted, most), 0)


def _cases_of(patients: Mapping[str, str], chosen: Collection[str]) -> list[str]:
    wanted = set(chosen)
    return sorted(case_id for case_id, patient in patients.items() if patient in wanted)
