"""The last step of a study: from evaluations and runs to the tables, the page and results.json."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import study_cohorts
import study_conduct
import study_cost
import study_runs as runs

from data_pipeline import atomic
from mednext_jax.evaluate import tables
from mednext_jax.evaluate.tables import Table
from mednext_jax.study import agreement, figures, protocol, report, results
from mednext_jax.study.report import Section
from mednext_jax.study.results import Estimate

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE, FIGURES = "results.json", "results.md", "report.html", "figures"
SELECTION_CONTROL = "selection_by_mean"


def evaluation(folder: Path, group: str, cohort: str, data: str) -> Path:
    """Folder of one evaluation; that of the main comparison is ``evaluation``."""
    parts = ("evaluation", *((group,) if group != "main" else ()), *(("source",) if cohort == "source" else ()),
             *((data,) if data else ()))  # fmt: skip
    return folder / "_".join(parts)


def page(folder: Path) -> Path:
    """The page to read at the end."""
    return folder / PAGE_FILE


def text(folder: Path) -> str:
    """The main table for the terminal."""
    content = json.loads((folder / RESULT_FILE).read_text())
    table = content["tables"]["Comparison"]
    lines = ["", *([content["note"], ""] if content["note"] else []), report.plain_text(table["header"], table["rows"])]
    return "\n".join([*lines, "", content["drop"]])


def published(file: Path) -> agreement.Estimates:
    """The estimates in a published results.json. Raises: ValueError if the file holds no results of a study."""
    try:
        expected = json.loads(file.read_text())["estimates"]
        if expected and all({"mean", "low", "high"} <= estimate.keys() for estimate in expected.values()):
            return expected
    except FileNotFoundError:
        raise ValueError(f"--expected={file}: no such file; give the results.json of a study") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    raise ValueError(f"--expected={file} holds no results of a study; give the results.json of one")


def compared(folder: Path, expected: agreement.Estimates) -> tuple[str, bool]:
    """What the study in ``folder`` says beside published estimates, and whether all of it agrees."""
    found = json.loads((folder / RESULT_FILE).read_text())["estimates"]
    if lacking := expected.keys() - found.keys():
        return (f"not the same study: {len(lacking)} of the {len(expected)} published estimates are of arms, sizes or "
                f"faults that this one does not have, such as {min(lacking)!r}"), False
    outside = agreement.disagreements(expected, found)
    lines = [f"{len(expected) - len(outside)} of {len(expected)} estimates lie within the published intervals"]
    return "\n".join([*lines, *outside]), not outside


def write(config: Any, folder: Path) -> None:
    """Writes results.json, results.md, report.html and the report's pictures."""
    fixed = json.loads((folder / protocol.PROTOCOL_FILE).read_text())
    sections, estimates, drop = _sections(config, folder, fixed)
    title, note = "Adapting a pre-trained network to a small cohort", study_cohorts.note(config)
    content = {
        "note": note,
        "protocol": fixed["sha256"],
        "learning_rates": fixed["learning_rates"],
        "deviations": protocol.deviations(fixed),
        "drop": drop,
        "estimates": {name: dataclasses.asdict(value) for name, value in estimates.items()},
        "tables": {s.title: {"header": list(s.header), "rows": list(map(list, s.rows))} for s in sections if s.rows},
    }
    pages = sorted(folder.glob("evaluation*/report.html"))
    links = {f"Report: {path.parent.name}": str(path.relative_to(folder)) for path in pages}
    atomic.write_bytes(folder / MARKDOWN_FILE, report.markdown(title, note, sections).encode())
    atomic.write_bytes(page(folder), report.page(title, note, sections, links).encode())
    for section in sections:
        if section.picture:
            (folder / FIGURES).mkdir(exist_ok=True)
            atomic.write_bytes(folder / FIGURES / f"{section.name}.png", figures.png(section.picture))
    tables.write_json(folder / RESULT_FILE, content)


def _table(folder: Path, group: str, cohort: str = "target", data: str = "") -> Table:
    return tables.read_table(evaluation(folder, group, cohort, data) / "metrics.csv")


def _sections(config: Any, folder: Path, fixed: dict[str, Any]) -> tuple[list[Section], dict[str, Estimate], str]:
    """The report's sections, every estimate in them by a name, and the sentence on the drop."""
    source, target = _table(folder, "main", "source"), _table(folder, "main")
    named = {"source test, pre-trained": results.scores(source, runs.ZERO_SHOT)}
    named |= {f"target test, {arm}": results.scores(target, arm, _levels(config, arm))
              for arm in target.arms}  # fmt: skip
    estimates = {f"{row}, {column}": value for row, found in named.items() for column, value in found.items()}
    zero = estimates[f"target test, {runs.ZERO_SHOT}, mean dice"]
    drop = results.apart(*(results.mean_dice(table, runs.ZERO_SHOT) for table in (source, target)))
    estimates["drop"] = drop
    before = estimates["source test, pre-trained, mean dice"]
    said = (f"Without adaptation, mean Dice {before.mean:.3f} on the source's test cases becomes {zero.mean:.3f} on "
            f"the target's: a drop of {report.with_interval(drop)}.")
    differences = _differences(config, target)
    estimates |= {f"{d.first} - {d.second}": d.estimate for d in differences}
    costs = {arm: _cost(config, folder, arm) for arm in config.arms}
    sections = [
        Section("Comparison", said + " Means over cases and repetitions, 95% bootstrap intervals over both.",
                *report.score_rows(named), figures.boxes(target, list(target.arms))),
        Section("Paired differences", "Of mean Dice over the regions. Intervals: 95% bootstrap over cases and "
                "repetitions, arms paired by both. p: Wilcoxon signed-rank over cases, repetitions averaged; Holm over "
                "the rows of this table.", *report.difference_rows(differences)),
        _cost_section(config, costs, target, zero),
        Section("Learning curves", "Training loss, mean over repetitions.",
                picture=figures.learning_curves({arm: _curve(config, folder, arm) for arm in config.arms})),
    ]  # fmt: skip
    for wanted, section in ((runs.few_shot_sizes(config), _few_shot), (runs.faults(config), _ablations)):
        if wanted:
            made, found = section(config, folder, source, target)
            sections.append(made)
            estimates |= found
    sections += [study_conduct.rates(config, fixed), study_conduct.conduct(config, fixed, folder)]
    return sections, estimates, said


def _levels(config: Any, arm: str) -> list[tuple[int, int]] | None:
    """Of the repetitions of an arm; the network without adaptation has one per set of initial weights."""
    return None if arm == runs.ZERO_SHOT else runs.levels(config)


def _differences(config: Any, target: Table) -> list[results.Difference]:
    """Every arm against full fine-tuning, and against no adaptation of the network that it started from."""
    pairs = {}
    if "full" in config.arms:
        pairs = {(arm, "full"): (results.mean_dice(target, arm), results.mean_dice(target, "full"))
                 for arm in config.arms if arm != "full"}  # fmt: skip
    seeds = [str(runs.zero_shot_init(config, repetition)) for repetition in runs.replicates(config)]
    zero = results.mean_dice(target, runs.ZERO_SHOT, seeds)
    pairs |= {(arm, runs.ZERO_SHOT): (results.mean_dice(target, arm), zero) for arm in config.arms}
    return results.differences(pairs, runs.levels(config))


def _cost(config: Any, folder: Path, arm: str) -> dict[str, Any]:
    """What an arm costs: counted arithmetic, and what its runs measured (times: medians over repetitions)."""
    from mednext_jax.train import dry_run

    study_cost.keep_off_devices()
    names = [f"{arm}@{r}" for r in range(len(runs.replicates(config)))]
    measured = [json.loads((folder / "runs" / name / "result.json").read_text()) for name in names]
    settings = json.loads((folder / "runs" / names[0] / "config.json").read_text())
    counted = dry_run.cost(settings)
    seconds = [json.loads((folder / "done" / f"train_{name}.json").read_text())["seconds"] for name in names]
    adapter = folder / "runs" / names[0] / "adapter" / "adapter_model.safetensors"
    model = next((folder / "runs" / names[0] / "model").glob("*.safetensors"))
    return {
        "trainable": counted.trainable,
        "step_flops": counted.step_flops,
        "steps": measured[0]["step"],
        "seconds_per_step": statistics.median(m["cost"]["seconds_per_step"] or float("nan") for m in measured),
        "temporary_bytes": measured[0]["cost"]["temporary_bytes"],
        "peak_device_bytes": measured[0]["cost"]["peak_device_bytes"],
        "seconds": statistics.median(seconds),
        "file_bytes": (adapter if adapter.is_file() else model).stat().st_size,
    }


def _cost_section(
    config: Any, costs: dict[str, dict[str, Any]], target: Table, zero: results.Estimate
) -> Section:
    header = ["arm", "trained parameters", "GFLOP per step", "of full", "seconds per step", "step memory (MiB)",
              "seconds per run", "file (kB)"]  # fmt: skip
    reference = costs.get("full", next(iter(costs.values())))["step_flops"]
    rows = [
        [arm, f"{c['trainable']:,}", f"{c['step_flops'] / 1e9:.3g}", f"{c['step_flops'] / reference:.2f}",
         report.number(c["seconds_per_step"]),
         report.number((c["peak_device_bytes"] or c["temporary_bytes"] or float("nan")) / 2**20, 0),
         f"{c['seconds']:.0f}", f"{c['file_bytes'] / 1e3:,.0f}"]
        for arm, c in costs.items()
    ]  # fmt: skip
    points = {arm: (c["step_flops"] * c["steps"], c["trainable"],
                    results.estimate(results.mean_dice(target, arm), runs.levels(config)))
              for arm, c in costs.items()}  # fmt: skip
    text = ("Arithmetic is counted; times are medians over repetitions on this machine, other work on it included (of "
            "an interrupted run those of its last start); memory is the first repetition's (on a CPU the compiled "
            "step's temporaries).")
    return Section("Accuracy against compute", text, header, rows, figures.accuracy_against_compute(points, zero))


def _curve(config: Any, folder: Path, arm: str) -> tuple[list[int], list[float]]:
    losses: dict[int, list[float]] = {}
    for r in range(len(runs.replicates(config))):
        for line in (folder / "runs" / f"{arm}@{r}" / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record.get("loss") is not None:
                losses.setdefault(record["step"], []).append(record["loss"])
    return list(losses), [statistics.fmean(values) for values in losses.values()]


def _few_shot(config: Any, folder: Path, source: Table, target: Table) -> tuple[Section, dict[str, Estimate]]:
    del source
    table, arms = _table(folder, "few_shot"), runs.few_shot_arms(config)
    sizes = {size: table for size in runs.few_shot_sizes(config)}
    names = {size: {arm: f"{arm}_n{size}" for arm in arms} for size in sizes}
    own = config.max_train_cases or len(study_cohorts.training_cases(config, folder))
    sizes[own], names[own] = target, {arm: arm for arm in arms}
    levels = {size: runs.levels(config) if size == own else None for size in sizes}  # the others differ in every seed
    curve = results.few_shot(sizes, names, levels)
    zero = results.estimate(results.mean_dice(target, runs.ZERO_SHOT))
    header = ["arm", *(f"{size} case{'s' * (size > 1)}" for size in sorted(sizes))]
    rows = [[arm, *(report.with_interval(points[size]) for size in sorted(points))] for arm, points in curve.items()]
    rows.append(["zero-shot", *[report.number(zero.mean)] * len(sizes)])
    text = ("Mean Dice on the target's test cases over the number of training cases; at most "
            f"{config.few_shot.replicates} repetitions each, at {own} those of the main comparison.")
    estimates = {f"{arm}, {size} cases": value for arm, points in curve.items() for size, value in points.items()}
    return Section("Few-shot", text, header, rows, figures.few_shot_curve(curve, zero)), estimates


def _ablations(config: Any, folder: Path, source: Table, target: Table) -> tuple[Section, dict[str, Estimate]]:
    """Each fault alone; full and adapter arm are those of the ablation (the adapter is paper_sequential)."""
    full, adapter = config.ablation.arms
    clean = results.Setting((source, runs.ZERO_SHOT), (target, runs.ZERO_SHOT), (target, full), (target, adapter))
    effects = [results.effect(*one) for fault in runs.faults(config) for one in _settings(config, folder, fault, clean)]
    text = (f"Each fault of the released study alone, {config.ablation.replicates} repetitions, compared with the same "
            f"repetitions without it; the adapter is {adapter}. A positive change of the drop is a part of the drop "
            "that the fault makes. Squeezed volumes are scored on their own grid, as the released code does. Selection "
            "is compared with selection by the mean over as many validations. Full fine-tuning by resuming is trained "
            "at the rate that its schedule leaves.")
    names = ("drop_change", "gap", "gap_change")
    estimates = {f"{e.fault}: {name}": getattr(e, name) for e in effects for name in names}
    rows = report.effect_rows(results.effect("none", clean, clean), effects)
    return Section("Faults of the released study", text, *rows, figures.effects(effects)), estimates


def _settings(
    config: Any, folder: Path, fault: str, clean: results.Setting
) -> Iterator[tuple[str, results.Setting, results.Setting]]:
    """(name, the study with the fault, the one to compare it with); the legacy adapters are two."""
    (full, adapter), table = config.ablation.arms, _table(folder, "ablations")

    def replaced(setting: results.Setting, **places: tuple[Table, str]) -> results.Setting:
        return dataclasses.replace(setting, **places)

    if data := runs.FAULTY_DATA.get(fault):
        squeezed = "squeezed" if data == "squeezed" else ""
        own, zero = _table(folder, "ablations", data=squeezed), f"{data}.{runs.ZERO_SHOT}"
        places = {"zero_shot": (own, zero), "full": (own, f"{fault}.{full}"), "adapter": (own, f"{fault}.{adapter}")}
        if data in runs.PRETRAINED_AGAIN:
            places["source"] = (_table(folder, "ablations", "source", squeezed), zero)
        yield fault, replaced(clean, **places), clean
    elif fault == "selection_by_label1":
        faulty, control = (replaced(clean, full=(table, f"{name}.{full}"), adapter=(table, f"{name}.{adapter}"))
                           for name in (fault, SELECTION_CONTROL))  # fmt: skip
        yield fault, faulty, control
    elif fault == "legacy_adapters":
        for arm in (arm for arm in runs.LEGACY_ARMS if arm in config.arms):
            corrected = replaced(clean, adapter=(clean.adapter[0], arm))
            yield f"{fault} ({arm})", replaced(clean, adapter=(table, f"{fault}.{arm}")), corrected
    else:
        yield fault, replaced(clean, full=(table, f"{fault}.{full}")), clean
