"""The official BraTS 2023 table of one case: its column names and its own rules for absent regions."""

from collections.abc import Iterator
from pathlib import Path

from mednext_jax.evaluate import tables
from mednext_jax.evaluate.lesionwise import PENALTY_MM

COLUMNS = (
    "Labels", "Num_TP", "Num_FP", "Num_FN", "Sensitivity", "Specificity", "Legacy_Dice", "Legacy_HD95",
    "GT_Complete_Volume", "LesionWise_Score_Dice", "LesionWise_Score_HD95",
)  # fmt: skip


def rows(table: tables.Table, run: str, case: str) -> Iterator[tuple]:
    """One row per region, in the order of COLUMNS; `table` may have been made under any policy.

    Source: get_LesionWiseResults of github.com/rachitsaluja/BraTS-2023-Metrics. Sensitivity of an absent true
    region is 0 if something is predicted there and 1 if not; specificity of a full grid is 0.
    """
    for region in table.regions:

        def value(metric: str, region: str = region) -> float:
            return table.value(run, case, region, metric)

        truth, pred = value("reference_volume_mm3"), value("volume_mm3")
        present = truth > 0, pred > 0
        dice = value("dice") if any(present) else 1.0
        hd95 = value("hd95_mm") if all(present) else PENALTY_MM if any(present) else 0.0
        sensitivity = value("sensitivity") if present[0] else 0.0 if present[1] else 1.0
        specificity = value("specificity")
        yield (
            region,
            *(value(f"lesions_{kind}") for kind in ("tp", "fp", "fn")),
            sensitivity,
            0.0 if specificity != specificity else specificity,
            dice,
            hd95,
            truth,
            value("lesionwise_dice"),
            value("lesionwise_hd95_mm"),
        )


def write(path: str | Path, table: tables.Table) -> None:
    """Writes the rows of every run and case to one CSV file, with the run and the case in front."""
    lines = (
        (run, case, row[0], *map(tables.number, row[1:]))
        for run in table.runs
        for case in table.cases_of_run(run)
        for row in rows(table, run, case)
    )
    tables.write_csv(path, ("arm", "case_id", *COLUMNS), lines)
