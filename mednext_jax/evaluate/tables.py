"""The tidy table of results (`arm,case_id,region,metric,value`) and the other files of an evaluation."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mednext_jax.evaluate import statistics

COLUMNS = ("arm", "case_id", "region", "metric", "value")
LESION_COLUMNS = (
    "arm", "case_id", "region", "kind", "truth_mm3", "predicted_mm3", "dice", "hd95_mm", "centre_voxel",
)  # fmt: skip
SEED_MARK = "@"
MEAN_REGION = "mean"


class Table:
    """Values by run, case, region and metric.

    A run is one folder of predictions. Runs named ``NAME@SEED`` are repetitions of the arm ``NAME`` with
    another seed; a run without the mark is an arm of its own with one seed.
    """

    def __init__(self):
        self._values: dict[tuple[str, str, str], dict[str, float]] = {}
        self._cases: dict[str, dict[str, None]] = {}  # of every run; dicts keep the order of insertion
        self._regions: dict[str, None] = {}
        self._metrics: dict[str, None] = {}

    def add(self, run: str, case: str, region: str, values: Mapping[str, float]) -> None:
        """Adds values (metric name to number) of one run, case and region."""
        self._values.setdefault((run, case, region), {}).update(values)
        self._cases.setdefault(run, {})[case] = None
        self._regions[region] = None
        self._metrics |= dict.fromkeys(values)

    def __len__(self) -> int:
        return sum(len(v) for v in self._values.values())

    def rows(self) -> Iterable[tuple[str, str, str, str, float]]:
        """(run, case, region, metric, value) in the order of insertion."""
        for (run, case, region), values in self._values.items():
            for metric, value in values.items():
                yield run, case, region, metric, value

    @property
    def runs(self) -> list[str]:
        return list(self._cases)

    @property
    def arms(self) -> dict[str, list[str]]:
        """Arm to its runs."""
        arms: dict[str, list[str]] = {}
        for run in self._cases:
            arms.setdefault(run.partition(SEED_MARK)[0], []).append(run)
        return arms

    def seeds(self, arm: str) -> list[str]:
        """What stands behind the mark in the names of an arm's runs; [""] for a run without one."""
        return [run.partition(SEED_MARK)[2] for run in self.arms[arm]]

    @property
    def regions(self) -> list[str]:
        return list(self._regions)

    @property
    def metrics(self) -> list[str]:
        return list(self._metrics)

    def cases_of_run(self, run: str) -> list[str]:
        """Cases of one run, sorted."""
        return sorted(self._cases[run])

    def cases(self, arm: str) -> list[str]:
        """Cases that every run of the arm has, sorted."""
        return sorted(set.intersection(*(set(self._cases[run]) for run in self.arms[arm])))

    def value(self, run: str, case: str, region: str, metric: str) -> float:
        """One number; NaN if it is not in the table."""
        return self._values.get((run, case, region), {}).get(metric, math.nan)

    def matrix(self, arm: str, region: str, metric: str, cases: Sequence[str] | None = None) -> np.ndarray:
        """(seeds, cases) values of an arm; NaN where undefined.

        The region "mean" (unless there is a real one of that name) is a case's mean over its defined regions.
        """
        cases = self.cases(arm) if cases is None else cases
        if region == MEAN_REGION and region not in self.regions:
            parts = np.stack([self.matrix(arm, r, metric, cases) for r in self.regions])
            return statistics.mean(parts, axis=0)
        runs = self.arms[arm]
        values = [[self.value(run, case, region, metric) for case in cases] for run in runs]
        return np.array(values, float).reshape(len(runs), len(cases))


def number(value: float) -> str:
    """Shortest text that reads back as the same number; counts without point, undefined as ``nan``."""
    value = float(value)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def write_table(path: str | Path, table: Table) -> None:
    """Writes ``metrics.csv``."""
    write_csv(path, COLUMNS, ((*row[:4], number(row[4])) for row in table.rows()))


def read_table(path: str | Path) -> Table:
    """Reads what `write_table` wrote; raises ValueError naming file and line if it is no such table."""
    table = Table()
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise ValueError(f"{path}: the first line must be {','.join(COLUMNS)}")
        for row in reader:
            try:
                run, case, region, metric, value = row
                table.add(run, case, region, {metric: float(value)})
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return table


def write_lesions(path: str | Path, lesions: Mapping[tuple[str, str, str], Iterable]) -> None:
    """Writes ``lesions.csv``: one line per lesion of every run, case and region."""
    rows = (
        (*key, x.kind, number(x.truth_mm3), number(x.predicted_mm3), number(x.dice), number(x.hd95_mm),
         " ".join(map(str, x.centre_voxel)))
        for key, found in lesions.items()
        for x in found
    )  # fmt: skip
    write_csv(path, LESION_COLUMNS, rows)


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes a CSV file whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: str | Path, content) -> None:
    """Writes JSON whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes to a temporary name beside `path`, then renames."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
