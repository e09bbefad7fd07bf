"""Measures whole folders: several predictions ("arms") against one set of references, cases in parallel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mednext_jax.evaluate import labelmaps, measure
from mednext_jax.evaluate.tables import Table

Run = Callable[[Callable[[Any], Any], Sequence, str], list]  # (function, items, title) -> results, in order


def in_turn(function: Callable[[Any], Any], items: Sequence, title: str) -> list:
    """``[function(item) for item in items]``; another ``Run`` may take several processes, or show ``title``."""
    return [function(item) for item in items]


@dataclass(frozen=True)
class Folder:
    """A folder of label maps, inspected.

    Attributes:
      name: of the arm, or "references".
      path: where it lies.
      files: case id to file.
      inspections: case id to what the file holds.
      scheme: name of the label scheme, for the record.
      relabel: value in the files to label; None leaves values as they are.
    """

    name: str
    path: Path
    files: Mapping[str, Path]
    inspections: Mapping[str, labelmaps.Inspection]
    scheme: str = "as is"
    relabel: Mapping[int, int] | None = None

    @property
    def values(self) -> dict[str, tuple[int, ...]]:
        """Case id to label values present."""
        return {case: i.values for case, i in self.inspections.items()}


@dataclass(frozen=True)
class Evaluation:
    """Everything measured, and what could not be.

    Attributes:
      settings: what was measured.
      references, arms: the folders.
      table: all values.
      lesions: (arm, case, region) to the lesion table.
      missing: arm to cases that have a reference but no prediction.
      extra: arm to cases that have a prediction but no reference.
    """

    settings: measure.Settings
    references: Folder
    arms: tuple[Folder, ...]
    table: Table
    lesions: Mapping[tuple[str, str, str], tuple]
    missing: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, tuple[str, ...]]

    @property
    def incomplete(self) -> list[str]:
        """One line for people per arm that lacks predictions."""
        n = len(self.references.files)
        return [
            f"{arm} has no prediction for {len(cases)} of {n} reference cases, which are in none of its means: "
            f"{', '.join(cases)}"
            for arm, cases in self.missing.items()
            if cases
        ]


def open_folder(name: str, path: str | Path, run: Run = in_turn) -> Folder:
    """Finds and inspects the label maps of a folder; the scheme is still open. Raises as `labelmaps` does."""
    files = labelmaps.find(path)
    found = run(labelmaps.inspect, list(files.values()), f"reading {name}")
    return Folder(name, Path(path), files, dict(zip(files, found, strict=True)))


def relabelled(folder: Folder, scheme: str, relabel: Mapping[int, int]) -> Folder:
    """The same folder under a label scheme."""
    return replace(folder, scheme=scheme, relabel=relabel)


def check_values(folder: Folder) -> None:
    """Raises ValueError if a file holds a value that the folder's relabelling does not know."""
    for case, present in folder.values.items():
        unknown = set(present) - set(folder.relabel if folder.relabel is not None else present)
        if unknown:
            what = f"label {sorted(unknown)} is unknown in scheme {folder.scheme}"
            raise ValueError(f"{folder.files[case]}: {what}")


def evaluate(
    arms: Sequence[Folder],
    references: Folder,
    settings: measure.Settings,
    run: Run = in_turn,
    affine_tolerance_mm: float = 0.1,
) -> Evaluation:
    """Measures every case that an arm and the references share.

    Raises:
      ValueError: an arm shares no case with the references, a value is unknown, or a case's two files are one or do
        not lie on one grid (the message names arm and case). Nothing is measured before all cases have passed.
    """
    jobs, missing, extra = [], {}, {}
    for folder in (references, *arms):
        check_values(folder)
    for arm in arms:
        shared = [c for c in references.files if c in arm.files]
        missing[arm.name] = tuple(c for c in references.files if c not in arm.files)
        extra[arm.name] = tuple(c for c in arm.files if c not in references.files)
        if not shared:
            raise ValueError(
                f"{arm.name}: no case in {arm.path} has a reference in {references.path}: "
                f"found {next(iter(arm.files))}, looked for {next(iter(references.files))}"
            )
        for case in shared:
            if arm.files[case].samefile(references.files[case]):
                raise ValueError(
                    f"case {case} ({arm.name}): {arm.files[case]} is both prediction and reference and would score "
                    "1; keep predictions and references in folders of their own"
                )
            problem = labelmaps.geometry_problem(
                arm.inspections[case], references.inspections[case], affine_tolerance_mm
            )
            if problem:
                raise ValueError(f"case {case} ({arm.name}): {problem}")
            jobs.append((arm, case))
    inputs = [
        (arm.files[case], arm.relabel, references.files[case], references.relabel,
         references.inspections[case].spacing_mm)
        for arm, case in jobs
    ]  # fmt: skip
    results = run(partial(_measure, settings), inputs, "measuring")
    table, lesions = Table(), {}
    for (arm, case), regions in zip(jobs, results, strict=True):
        for region, result in regions.items():
            table.add(arm.name, case, region, result.values)
            lesions[arm.name, case, region] = result.lesions
    return Evaluation(settings, references, tuple(arms), table, lesions, missing, extra)


def _measure(settings: measure.Settings, job) -> dict[str, measure.RegionResult]:
    pred_file, pred_relabel, truth_file, truth_relabel, spacing_mm = job
    pred = labelmaps.read(pred_file, pred_relabel)
    return measure.measure(pred, labelmaps.read(truth_file, truth_relabel), spacing_mm, settings)
