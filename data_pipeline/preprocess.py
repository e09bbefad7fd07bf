"""Makes a store of a folder of raw cases: checked, prepared in parallel, resumable, split."""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from data_pipeline import cohorts, fingerprints, integrity, labels, parallel, store, store_files
from data_pipeline import splits as splitting
from data_pipeline.cohorts import Case, Problem, shown
from data_pipeline.integrity import check
from data_pipeline.normalization import DEFAULT, NORMALIZATIONS
from data_pipeline.prepare import load_for_prediction, prepare, preprocess_case, restore

__all__ = ["check", "load_for_prediction", "preprocess", "preprocess_case", "restore"]

_MOST_SHOWN = 5


def preprocess(
    input_folder: str | Path,
    store_path: str | Path,
    *,
    workers: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    folds: int | None = None,
    splits: str | Path | None = None,
    label_map: Mapping[int, int] | None = None,
    skip_bad: bool = False,
    progress: bool = True,
    normalization: str = DEFAULT,
) -> store.Store:
    """Makes a store of all cases below ``input_folder``; run again, it goes on where it stopped.

    Cases whose files and label map are unchanged are kept. A bad case does not keep the others from being
    prepared, but the store is complete only when there is none, or with ``skip_bad``.

    Args:
      workers: processes; None takes one per usable core, see ``parallel.run``. Each needs 0.5 GB for cases
        of 240x240x155 voxels.
      seed, val_fraction, test_fraction, folds: see ``splits.make_splits``.
      splits: file with the user's own splits instead, see ``splits.read_splits``.
      label_map: {value in a segmentation: canonical label}, for values that the naming does not explain.
      skip_bad: leave cases with problems out instead of stopping.
      progress: show a bar (lines where there is no terminal), and warnings.
      normalization: name in ``normalization.NORMALIZATIONS``; predictions follow the model's.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no case, problems in the data, impossible splits, or scans or a store of other cases there.
      OSError: the disk is full, the folder cannot be written, a worker died (ChildProcessError).
    """
    label_map = labels.check_label_map(label_map)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}")
    cases, problems = cohorts.survey(input_folder)
    if not cases and not problems:
        raise ValueError(f"{shown(input_folder)}: no BraTS case; files must be named like {cohorts.EXAMPLES}")
    _stop_if_bad(problems, input_folder, skip_bad, " of names, no scan was read yet")
    _refuse_other_files(Path(store_path))

    def split(patients: Mapping[str, str]) -> dict:
        if splits:
            return splitting.read_splits(splits, patients, {p.case_id for p in problems if not p.warning})
        fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        return splitting.make_splits(patients, seed=seed, folds=folds, **fractions)

    # Once before the long work, so that a wrong fraction or name is told at once.
    split({case.case_id: case.patient_id for case in cases if case.segmentation})
    with store.writing(store_path):
        _refuse_other_cases(Path(store_path), cases, problems)
        work = partial(_prepare_into, Path(store_path), label_map, normalization)
        results = parallel.run(work, cases, workers=workers, title="preprocess", progress=progress)
        problems += [problem for _, found in results for problem in found]
        _stop_if_bad(problems, input_folder, skip_bad)
        if progress:
            _print_problems(problems)
        records = [record for record, _ in results if record is not None]
        if not records:
            raise ValueError(f"{shown(input_folder)}: every case has problems; first: {problems[0]}")
        patients = {record["case_id"]: record["patient_id"] for record in records if record["labelled"]}
        settings = _provenance(label_map)
        data_hash = _data_hash(records, normalization)
        new_splits = split(patients)
        _tell_of_changes(Path(store_path), new_splits, normalization)
        return store.write_dataset(store_path, records, new_splits, data_hash, settings, normalization)


def _prepare_into(
    path: Path, label_map: dict[int, int], normalization: str, case: Case
) -> tuple[dict | None, list[Problem]]:
    """Prepares one case into the store at ``path``, unless it is there; returns its record and problems."""
    record = _unchanged(path, label_map, normalization, case)
    if record is None:
        sources = {content: fingerprints.of(file) for content, file in _files(case).items()}
        found = integrity.examine(case, label_map)
        if found.serious:
            return None, found.problems
        image, label, record = prepare(case, found, normalization)
        record["sources"] = sources
        record["label_map"] = _json_map(label_map)
        record["warnings"] = [[problem.kind, problem.message] for problem in found.problems]
        record = store.write_case(path, case.case_id, image, label, record)
    warnings = [Problem(case.case_id, kind, message, True) for kind, message in record["warnings"]]
    return {name: value for name, value in record.items() if name != "foreground"}, warnings


def _unchanged(path: Path, label_map: dict[int, int], normalization: str, case: Case) -> dict | None:
    """Record of a case that is in the store already, whole and from the same files with the same settings."""
    folder = store.case_folder(path, case.case_id)
    try:
        record = store_files.read_record(folder / "case.json", case.case_id)
        if (record["format_version"], record["label_map"]) != (store.FORMAT_VERSION, _json_map(label_map)):
            return None
        if record["normalization"]["name"] != normalization:
            return None
        store_files.open_array(folder / "image.npy", np.float16, (*record["shape"], len(cohorts.CHANNELS)))
        if record["labelled"]:
            store_files.open_array(folder / "label.npy", np.uint8, tuple(record["shape"]))
        return record if fingerprints.are_of(record["sources"], _files(case)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: prepare it anew


def _files(case: Case) -> dict[str, Path]:
    segmentation = {cohorts.SEGMENTATION: case.segmentation} if case.segmentation else {}
    return {**case.images, **segmentation}


def _stop_if_bad(problems: Sequence[Problem], folder: str | Path, skip_bad: bool, kind: str = "") -> None:
    serious = [problem for problem in problems if not problem.warning]
    if serious and not skip_bad:
        more = f" | and {len(serious) - _MOST_SHOWN} more" if len(serious) > _MOST_SHOWN else ""
        listed = " | ".join(map(str, serious[:_MOST_SHOWN]))
        command = "launch/preprocess.py"
        remedy = f"correct them ({command} --check-only lists all) or leave those cases out ({command} --skip-bad)"
        noun = "1 problem" if len(serious) == 1 else f"{len(serious)} problems"
        raise ValueError(f"{shown(folder)}: {noun}{kind}; {remedy}: {listed}{more}")


def _print_problems(problems: Sequence[Problem]) -> None:
    """Every case that is left out, by its first problem; and the first few of what else there is to say."""
    left_out: dict[str, list[Problem]] = {}
    others = []
    for problem in problems:
        if problem.case_id and not problem.warning:
            left_out.setdefault(problem.case_id, []).append(problem)
        else:
            others.append(problem)
    for problem in others[:_MOST_SHOWN]:
        print(f"{'warning' if problem.warning else 'left out'}: {problem}", file=sys.stderr)
    if len(others) > _MOST_SHOWN:
        more = len(others) - _MOST_SHOWN
        print(f"... and {more} more; launch/preprocess.py --check-only lists all", file=sys.stderr)
    for first, *rest in left_out.values():
        print(f"left out: {first}{f' (and {len(rest)} more problems)' if rest else ''}", file=sys.stderr)
    if left_out:
        print(f"{len(left_out)} case{'s' * (len(left_out) > 1)} left out", file=sys.stderr)


def _refuse_other_files(path: Path) -> None:
    """A store among scans would be taken for them, and they for it; among other files it would be lost."""
    if scan := next((file for file in path.rglob("*.nii*") if file.is_file()), None):
        raise ValueError(f"{shown(path)}: holds scans ({shown(scan)}); a store needs a folder of its own")
    if path.is_dir() and not (path / "cases").is_dir() and (other := next(path.iterdir(), None)):
        raise ValueError(f"{shown(path)}: holds {other.name}, which is no store's; a store needs a folder of its own")


def _refuse_other_cases(path: Path, cases: Sequence[Case], problems: Sequence[Problem]) -> None:
    """A store belongs to one input: making it of another would silently drop the cases it has."""
    if not (path / "dataset.json").exists():
        return
    known = {case.case_id for case in cases} | {problem.case_id for problem in problems}
    others = sorted(store_files.read_dataset(path / "dataset.json")["cases"].keys() - known)
    if others:
        text = f"the store holds {len(others)} cases that the input lacks (first: {others[0]})"
        raise ValueError(f"{shown(path)}: {text}; choose another folder, or delete it first")


def _tell_of_changes(path: Path, splits: Mapping, normalization: str) -> None:
    """Warns where cases change sides: a network may have been trained on what is now tested; and where images do."""
    if not (path / "dataset.json").exists():
        return
    before = store.Store(path)
    if before.splits != splits:
        print(f"warning: the splits of {shown(path)} change; runs that used the old ones will not go on, and may have "
              "been trained on cases that are now for the test", file=sys.stderr)  # fmt: skip
    if before.normalization != normalization:
        print(f"warning: {shown(path)} was normalised by {before.normalization}, and is by {normalization} now; models "
              "trained on it as it was expect the former", file=sys.stderr)  # fmt: skip


def _json_map(label_map: Mapping[int, int]) -> dict[str, int]:
    return {str(value): label for value, label in sorted(label_map.items())}


def _data_hash(records: Sequence[Mapping], normalization: str) -> str:
    """Hash over the sources' contents and the settings: equal for equal stores, wherever they lie."""
    content = sorted(
        [r["case_id"], r["naming"], r["label_map"], sorted((k, s["sha256"]) for k, s in r["sources"].items())]
        for r in records
    )
    text = json.dumps([store.FORMAT_VERSION, normalization, content])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _provenance(label_map: Mapping[int, int]) -> dict:
    software = {"python": platform.python_version(), "numpy": np.__version__, "nibabel": nibabel.__version__}
    return {"label_map": _json_map(label_map), "software": software}
