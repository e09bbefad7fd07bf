"""The report: one self-contained HTML page (no network) of an evaluation, and the viewer beside it."""

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import jinja2
import numpy as np

from mednext_jax.evaluate import definitions, measure, palette, pictures, plots, policy, statistics, viewer
from mednext_jax.evaluate import summary as summaries
from mednext_jax.evaluate.cohort import Evaluation, Folder
from mednext_jax.evaluate.labelmaps import read
from mednext_jax.evaluate.lesionwise import CHALLENGES
from mednext_jax.evaluate.tables import MEAN_REGION, Table, write_text

HERE = Path(__file__).parent
CHARTED = ("dice", "lesionwise_dice", "hd95_mm", "lesionwise_hd95_mm", "nsd_1mm", "sensitivity", "precision")
HEADLINE = ("dice", "lesionwise_dice", "hd95_mm", "lesionwise_hd95_mm", "nsd_1mm", "sensitivity", "precision")
PER_CASE = (
    "dice", "lesionwise_dice", "hd95_mm", "lesionwise_hd95_mm", "nsd_1mm", "sensitivity", "precision",
    "lesions_tp", "lesions_fp", "lesions_fn", "volume_mm3", "reference_volume_mm3",
)  # fmt: skip
MAX_PICTURES = 24  # overlays of a page; a hundred kilobytes each
WIDE_BOXES = 9  # a box plot with more boxes takes the full width
MAX_PAIRS = 6  # pairs of arms that get charts of their own; the table has all


@dataclass(frozen=True)
class Figure:
    """A picture for the page: address (data URI), what it shows in words, caption, full width or not."""

    source: str
    alt: str
    caption: str = ""
    wide: bool = False


def write(
    output: Path,
    evaluation: Evaluation,
    summary: summaries.Summary,
    made: Mapping,
    note: str = "",
    images: str | Path | None = None,
    viewer_cases: int = 3,
) -> None:
    """Writes ``report.html`` and, where the viewer is installed, ``viewer.html`` into the folder `output`.

    Args:
      made: of `provenance.record`.
      note: line shown in a banner, such as "simulated data".
      images: folder with the scans behind the labels; without it they are looked for beside the references.
      viewer_cases: how many of the chosen cases go into the viewer.
    """
    chosen = chosen_cases(evaluation.table)
    scans = {case: _scan(evaluation, case, images) for case in chosen}
    viewer_file = viewer.write(output / "viewer.html", evaluation, chosen, scans, viewer_cases, note)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": show, "name": plots.title}
    page = environment.get_template("report.html").render(
        style=_asset("report.css"),
        script=_asset("report.js"),
        note=note,
        made=made,
        evaluation=evaluation,
        table=evaluation.table,
        rules=CHALLENGES[evaluation.settings.challenge],
        policy=policy.POLICIES[evaluation.settings.empty],
        lesionwise_note=policy.LESIONWISE_NOTE,
        definitions={m: definitions.of(m) for m in evaluation.table.metrics},
        colours=palette.colours([*evaluation.table.regions, MEAN_REGION]),
        headline=[m for m in HEADLINE if m in evaluation.table.metrics],
        per_case=[m for m in PER_CASE if m in evaluation.table.metrics],
        summary=summary,
        regions_of={m: summaries.regions_of(evaluation.table, m) for m in evaluation.table.metrics},
        holm_family=summaries.HOLM_FAMILY,
        compared=[c for c in summary.comparisons.items() if c[0][3] in HEADLINE],
        charts=_charts(evaluation.table),
        pairs=_pair_charts(evaluation.table),
        volumes=_volume_charts(evaluation.table),
        cases=_case_figures(evaluation, chosen, scans),
        viewer=viewer_file.name if viewer_file else None,
        folders=(evaluation.references, *evaluation.arms),
        fingerprint=fingerprint,
        better_is=better_is,
    )
    write_text(output / "report.html", page)


def show(value: float, metric: str) -> str:
    """A number for readers, with the decimals its metric deserves; undefined is a dash."""
    if math.isnan(value):
        return "–"
    whole = metric.endswith("_mm3") or (metric in summaries.COUNTS and float(value).is_integer())
    return f"{value:,.{0 if whole else 1 if metric.endswith('_mm') or metric in summaries.COUNTS else 3}f}"


def fingerprint(folder: Folder) -> str:
    """Short hash over the names and contents of all label files of a folder."""
    text = "".join(f"{case}{inspection.sha256}" for case, inspection in sorted(folder.inspections.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chosen_cases(table: Table) -> dict[str, str]:
    """Worst, median and best case by mean Dice over regions and arms: case id to what it is."""
    arms = list(table.arms)
    cases = sorted(set.intersection(*(set(table.cases(arm)) for arm in arms)))
    if not cases:
        return {}
    scores = np.stack(
        [statistics.mean(table.matrix(arm, MEAN_REGION, "dice", cases), axis=0) for arm in arms]
    )
    scores = statistics.mean(scores, axis=0)
    order = [cases[i] for i in np.argsort(scores) if not math.isnan(scores[i])] or cases[:1]
    places = {"worst": 0, "median": len(order) // 2, "best": len(order) - 1}
    chosen: dict[str, str] = {}
    for what, place in places.items():
        if len(order) > 2 or what != "median":
            chosen.setdefault(order[place], what if len(order) > 1 else "only")
    return chosen


def _scan(evaluation: Evaluation, case: str, images) -> tuple[str, Path] | None:
    beside = evaluation.references.files[case].parent
    return pictures.find_scan(case, [Path(images)] if images else [beside])


def _charts(table: Table) -> list[Figure]:
    figures = []
    for metric in (m for m in CHARTED if m in table.metrics):
        alt = f"Box and strip plot of {plots.title(metric)} for {', '.join(table.regions)}; "
        alt += f"arms: {', '.join(table.arms)}. Numbers are in the summary table."
        wide = len(table.arms) * len(table.regions) > WIDE_BOXES
        figures.append(Figure(_svg(plots.boxes(table, metric)), alt, plots.title(metric), wide))
    return figures


def _pair_charts(table: Table) -> list[Figure]:
    figures = []
    for first, second in list(combinations(table.arms, 2))[:MAX_PAIRS]:
        for metric in (m for m in ("dice", "lesionwise_dice", "hd95_mm") if m in table.metrics):
            caption = f"{plots.title(metric)}: {first} − {second}"
            alt = f"Sorted differences per case, {caption}, per region. Numbers are in the comparison table."
            figures.append(Figure(_svg(plots.paired_differences(table, first, second, metric)), alt, caption))
    return figures


def _volume_charts(table: Table) -> list[Figure]:
    alt = "Scatter plot of Dice against the true volume of each region, one point per case and arm."
    figures = [Figure(_svg(plots.dice_against_volume(table)), alt, "Dice against true volume")]
    for arm in table.arms:
        alt = f"Bland-Altman plot of predicted and true volumes of {arm}, per region."
        figures.append(Figure(_svg(plots.bland_altman(table, arm)), alt, f"Volumes, {arm} (Bland-Altman)"))
    return figures


def _case_figures(evaluation: Evaluation, chosen: Mapping[str, str], scans) -> list[tuple[str, list[Figure]]]:
    """(heading, overlays of all runs) of every chosen case."""
    runs = evaluation.arms[: max(MAX_PICTURES // max(len(chosen), 1), 1)]
    return [
        (
            case if what == "only" else f"{what} case: {case}",
            [_overlay(evaluation, run, case, scans[case]) for run in runs],
        )
        for case, what in chosen.items()
    ]


def _overlay(evaluation: Evaluation, run: Folder, case: str, scan: tuple[str, Path] | None) -> Figure:
    seen = case_view(evaluation, run, case, scan)
    table = evaluation.table
    dice = ", ".join(f"{r} {show(table.value(run.name, case, r, 'dice'), 'dice')}" for r in table.regions)
    alt = f"Case {case}, {run.name}: {seen.channel}, reference, prediction and errors in three planes."
    png = pictures.overlay_png(seen, evaluation.settings.regions)
    return Figure(_data_uri(png, "image/png"), f"{alt} Dice: {dice}.", f"{run.name}: Dice {dice}")


def case_view(evaluation: Evaluation, run: Folder, case: str, scan: tuple[str, Path] | None) -> pictures.View:
    """Prediction and truth of one case, with its scan, in RAS order."""
    truth = read(evaluation.references.files[case], evaluation.references.relabel)
    pred = read(run.files[case], run.relabel)
    return pictures.view(pred, truth, evaluation.references.inspections[case].affine, scan)


def better_is(metric: str) -> str:
    """Arrow that says which way is better."""
    return "↑" if measure.higher_is_better(metric) else "↓"


def _svg(text: str) -> str:
    return _data_uri(text.encode(), "image/svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _asset(name: str) -> str:
    return (HERE / "assets" / name).read_text(encoding="utf-8")
