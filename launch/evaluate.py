r"""Measures predictions against references, ours or any tool's: tables, statistics, report.

    python launch/evaluate.py --predictions=DIR --references=DIR --output=DIR
    python launch/evaluate.py --predictions=full=DIR --predictions=adapter=DIR --references=DIR --output=DIR
    python launch/evaluate.py --predictions=DIR --references=DIR --output=DIR --regions='{"liver": [1, 2]}'

Predictions are label maps named <case_id>.nii.gz; references are such a folder, or BraTS cases as downloaded
(*-seg.nii.gz, *_seg.nii.gz). Several predictions give a comparison; NAME@SEED are repetitions of one arm.
Writes metrics.csv, lesions.csv, summary.json and report.html (and viewer.html where the viewer is installed).
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import command
from absl import flags

from data_pipeline import atomic, cohorts, labels, parallel
from mednext_jax.evaluate import (
    cohort,
    labelmaps,
    lesionwise,
    measure,
    official,
    policy,
    provenance,
    summary,
    tables,
)

PREDICTIONS = flags.DEFINE_multi_string(
    "predictions", None, "DIR or NAME=DIR; repeat it to compare arms.", required=True
)
REFERENCES = flags.DEFINE_string("references", None, "Folder with the true label maps.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.", required=True)
LABELS = flags.DEFINE_multi_string(
    "labels",
    [],
    f"What the values of a folder mean: NAME=SCHEME ({', '.join(labels.SCHEMES)}) or NAME=VALUE:LABEL,... "
    "with the name of an arm or 'references'; without it the scheme is detected.",
)
REGIONS = flags.DEFINE_string(
    "regions", None, 'Regions as JSON {"name": [label, ...]} or a file of it; values are taken as they are.'
)
CHALLENGE = flags.DEFINE_enum(
    "challenge", "SSA", list(lesionwise.CHALLENGES), "Whose lesion-wise dilation and volume limit to use."
)
TOLERANCES = flags.DEFINE_list("tolerances_mm", ["0.5", "1", "2"], "Tolerances of the surface Dice (NSD).")
EMPTY = flags.DEFINE_enum("empty", "penalise", list(policy.POLICIES), "What absent regions count for.")
FORMAT = flags.DEFINE_enum(
    "format", "tidy", ["tidy", "brats2023"], "brats2023 also writes the official table, brats2023.csv."
)
IMAGES = flags.DEFINE_string("images", None, "Folder with scans for pictures; else beside the references.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one per core.", lower_bound=1)
TOLERANCE = flags.DEFINE_float(
    "affine_tolerance_mm", 0.1, "How far apart the grids of prediction and reference may lie."
)
REQUIRE_ALL = flags.DEFINE_bool(
    "require_all", False, "End with exit code 1, the results written, if a reference has no prediction."
)
NOTE = flags.DEFINE_string("note", "", "Line at the top of the report, such as: simulated data.")
PAGE = flags.DEFINE_bool("page", True, "Write report.html, and viewer.html where it can be.")
VIEWER_CASES = flags.DEFINE_integer("viewer_cases", 3, "Cases in the 3-D viewer; 0 for none.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")
OPTIONAL_FILES = ("brats2023.csv", "report.html", "viewer.html")  # those of an earlier evaluation contradict the tables


def parse_predictions(values: list[str]) -> dict[str, str]:
    """Run name to folder; a folder without a name is called by its own.

    Raises:
      ValueError: a name that is empty, reserved or there twice.
    """
    runs: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or os.path.isdir(value):
            name, path = Path(value).resolve().name, value
        if not name or name == "references" or name in runs:
            why = "is there twice" if name in runs else "means the truth" if name else "is empty"
            raise ValueError(f"--predictions={value}: the name {name!r} {why}; give another, as NAME=DIR")
        runs[name] = path
    return runs


def parse_regions(text: str) -> dict[str, tuple[int, ...]]:
    """Regions from JSON text or the path of a JSON file; a `regions` entry inside is taken."""
    try:
        inline = text.lstrip().startswith("{")
        content = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
        content = content.get("regions", content)
        regions = {str(n): tuple(int(v) for v in values) for n, values in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'--regions={text}: not JSON like {{"WT": [1, 2, 3]}} ({error})') from None
    if not regions or not all(regions.values()) or any(0 in values for values in regions.values()):
        raise ValueError(f"--regions={text}: every region needs at least one label, and 0 is the background")
    return regions


def naming(case_id: str) -> str | None:
    """The label scheme that a case's name stands for."""
    for ending in ("-seg.nii.gz", "_seg.nii.gz"):
        if parsed := cohorts.parse_name(case_id + ending):
            return parsed.naming
    return None


def with_scheme(folder: cohort.Folder, given: Mapping[str, str], as_is: bool) -> cohort.Folder:
    """The folder with its label scheme: given, or detected from values and names."""
    text = given.get(folder.name)
    if text is None and as_is:
        return folder
    if text is None:
        return cohort.relabelled(
            folder, *labelmaps.detect_scheme(str(folder.path), folder.values, labels.SCHEMES, naming)
        )
    relabel = labels.SCHEMES.get(text)
    if relabel is None:
        relabel = {0: 0, **labels.parse_label_map(text)}
    return cohort.relabelled(folder, text, relabel)


def in_processes(function: Callable, items: Sequence, title: str) -> list:
    """A ``cohort.Run`` over ``--workers`` processes; how far it is is shown where it may take a while."""
    return parallel.run(function, items, workers=WORKERS.value, title=title, progress=len(items) >= 20)


def read_folders() -> tuple[list[cohort.Folder], cohort.Folder]:
    """Arms and references, inspected, with label schemes."""
    runs = parse_predictions(PREDICTIONS.value)
    given = dict(value.partition("=")[::2] for value in LABELS.value)
    if unknown := set(given) - {"references", *runs}:
        raise ValueError(f"--labels names {sorted(unknown)}; the folders are references, {', '.join(runs)}")
    for path in (REFERENCES.value, *runs.values()):
        labelmaps.find(path)  # before any is read: that takes minutes
    folders = [
        with_scheme(cohort.open_folder(name, path, in_processes), given, as_is=bool(REGIONS.value))
        for name, path in {"references": REFERENCES.value, **runs}.items()
    ]
    for folder in folders:
        print(f"{folder.name}: {len(folder.files)} label maps in {folder.path}, labels {folder.scheme}")
        if all(set(present) <= {0} for present in folder.values.values()):
            print(f"WARNING: every label map of {folder.name} is empty", file=sys.stderr)
    return folders[1:], folders[0]


def check_output(output: Path) -> None:
    """Raises ValueError if the results would come among label maps, or in the place of what is no evaluation's."""
    for folder in (REFERENCES.value, *parse_predictions(PREDICTIONS.value).values()):
        if output.resolve() == Path(folder).resolve():
            raise ValueError(f"--output={output} holds the label maps to be measured; give a folder of its own")
    if (output / "metrics.csv").exists() and not (output / "summary.json").exists():
        raise ValueError(f"{output / 'metrics.csv'} was not written by this program; choose another --output")


def print_result(evaluation: cohort.Evaluation, result: summary.Summary) -> None:
    """The mean Dice of every arm and region; extra cases, and a banner for missing ones."""
    for arm, cases in evaluation.extra.items():
        if cases:
            print(f"{arm}: {len(cases)} extra cases, without a reference: {', '.join(cases)}", file=sys.stderr)
    for (arm, region, metric), d in result.descriptions.items():
        if metric == "dice":
            interval = f"[{d.low:.3f}, {d.high:.3f}]" if d.n > 1 else "[no interval for n < 2]"
            print(f"{arm:>16} {region:>6} Dice {d.mean:.3f} {interval} n={d.n} undefined={d.n_undefined}")
    for line in evaluation.incomplete:
        print(f"WARNING: {line}")


def main(_) -> int:
    """Scores every --predictions against the references; returns the exit code."""
    settings = measure.Settings(
        parse_regions(REGIONS.value) if REGIONS.value else labels.REGIONS,
        CHALLENGE.value,
        tuple(float(t) for t in TOLERANCES.value),
        EMPTY.value,
    )
    output = Path(OUTPUT.value)
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is told before the work
    arms, references = read_folders()
    evaluation = cohort.evaluate(arms, references, settings, in_processes, TOLERANCE.value)
    result = summary.summarise(evaluation.table, SEED.value)
    made = provenance.record(["launch/evaluate.py", *sys.argv[1:]])
    with atomic.replacing_files(output, OPTIONAL_FILES) as folder:
        tables.write_table(folder / "metrics.csv", evaluation.table)
        tables.write_lesions(folder / "lesions.csv", evaluation.lesions)
        tables.write_json(folder / "summary.json", summary.as_json(evaluation, result, made))
        if FORMAT.value == "brats2023":
            official.write(folder / "brats2023.csv", evaluation.table)
        if PAGE.value:
            from mednext_jax.evaluate import report  # matplotlib is not for the worker processes

            report.write(folder, evaluation, result, made, NOTE.value, IMAGES.value, VIEWER_CASES.value)
        written = sorted(file.name for file in folder.iterdir())
    print_result(evaluation, result)
    print(f"wrote {', '.join(written)} to {output}")
    if PAGE.value and VIEWER_CASES.value and "viewer.html" not in written:
        print("no 3-D viewer: it comes with pip install 'mednext_jax[demo]'", file=sys.stderr)
    if REQUIRE_ALL.value and evaluation.incomplete:
        print("error: predictions are missing, and --require_all was given", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main)
