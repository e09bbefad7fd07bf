"""The last step of a study: from evaluations and runs to the tables, the page and results.json."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import study_cohorts
import study_runs as runs

from data_pipeline import atomic
from mednext_jax.evaluate import tables
from mednext_jax.evaluate.tables import Table
from mednext_jax.study import figures, protocol, report, results
from mednext_jax.study.report import Section

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE = "results.json", "results.md", "report.html"
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


def write(config: Any, folder: Path) -> None:
    """Writes results.json, results.md and report.html."""
    fixed = json.loads((folder / protocol.PROTOCOL_FILE).read_text())
    sections, drop = _sections(config, folder, fixed)
    title, note = "Adapting a pre-trained network to a small cohort", study_cohorts.note(config)
    content = {
        "note": note,
        "protocol": fixed["sha256"],
        "learning_rates": fixed["learning_rates"],
        "deviations": protocol.deviations(fixed),
        "drop": drop,
        "tables": {s.title: {"header": list(s.header), "rows": list(map(list, s.rows))} for s in sections if s.rows},
    }
    links = {f"Report: {path.name}": f"{path.name}/report.html" for path in sorted(folder.glob("evaluation*"))}
    atomic.write_bytes(folder / MARKDOWN_FILE, report.markdown(title, note, sections).encode())
    atomic.write_bytes(page(folder), report.page(title, note, sections, links).encode())
    atomic.write_json(folder / RESULT_FILE, content)


def _table(folder: Path, group: str, cohort: str = "target", data: str = "") -> Table:
    return tables.read_table(evaluation(folder, group, cohort, data) / "metrics.csv")


def _sections(config: Any, folder: Path, fixed: dict[str, Any]) -> tuple[list[Section], str]:
    source, target = _table(folder, "main", "source"), _table(folder, "main")
    zero = results.estimate(results.mean_dice(target, runs.ZERO_SHOT))
    named = {"source test, pre-trained": results.scores(source, runs.ZERO_SHOT)}
    named |= {f"target test, {arm}": results.scores(target, arm) for arm in target.arms}
    before = named["source test, pre-trained"]["mean dice"].mean
    drop = (f"Without adaptation, mean Dice {before:.3f} on the source's test cases becomes {zero.mean:.3f} on the "
            "target's.")
    costs = {arm: _cost(config, folder, arm) for arm in config.arms}
    curves = {arm: _curve(config, folder, arm) for arm in config.arms}
    sections = [
        Section("Comparison", drop + " Means over cases and repetitions, 95% bootstrap intervals over both.",
                *report.score_rows(named)),
        _differences(target, config.arms),
        _cost_section(costs, target, zero),
        Section("Learning curves", picture=figures.learning_curves(curves)),
    ]  # fmt: skip
    if config.few_shot.sizes:
        sections.append(_few_shot(config, folder, target, zero))
    if config.ablations:
        sections.append(_ablations(config, folder, source, target))
    sections += [_rates(config, fixed), _protocol(fixed, folder)]
    return sections, drop


def _differences(target: Table, arms) -> Section:
    """Every arm against full fine-tuning and against no adaptation, from the evaluation's own comparisons."""
    from mednext_jax.evaluate.summary import summarise

    found = summarise(target).comparisons
    header, rows = ["first − second", "mean Dice", "first better / equal / worse", "p", "Holm p"], []
    for other in ("full", runs.ZERO_SHOT):
        for arm in (a for a in target.arms if a != other and other in target.arms):
            if arm == runs.ZERO_SHOT:
                continue
            pair, sign = ((arm, other), 1) if (arm, other, "mean", "dice") in found else ((other, arm), -1)
            c = found[(*pair, "mean", "dice")]
            low, high = sorted((sign * c.low, sign * c.high))
            wins, losses = (c.wins, c.losses)[::sign]
            rows.append([f"{arm} − {other}", f"{sign * c.mean_difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                         f"{wins} / {c.ties} / {losses}", f"{c.p:.2g}", f"{c.p_holm:.2g}"])  # fmt: skip
    return Section("Paired differences", "Intervals: 95% bootstrap over cases and repetitions, arms paired by both. p: "
                   "Wilcoxon signed-rank over cases, repetitions averaged; Holm over all regions and pairs of arms.",
                   header, rows)  # fmt: skip


def _cost(config: Any, folder: Path, arm: str) -> dict[str, Any]:
    """What an arm costs: counted arithmetic, and what its runs measured (medians over repetitions)."""
    from mednext_jax.train import dry_run

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


def _cost_section(costs: dict[str, dict[str, Any]], target: Table, zero: results.Estimate) -> Section:
    header = ["arm", "trained parameters", "FLOPs of a step (of full)", "seconds per step", "step memory (MiB)",
              "seconds per run", "file (kB)"]  # fmt: skip
    reference = costs.get("full", next(iter(costs.values())))["step_flops"]
    rows = [
        [arm, f"{c['trainable']:,}", f"{c['step_flops'] / reference:.2f}", report.number(c["seconds_per_step"]),
         report.number((c["peak_device_bytes"] or c["temporary_bytes"] or float("nan")) / 2**20, 0),
         f"{c['seconds']:.0f}", f"{c['file_bytes'] / 1e3:,.0f}"]
        for arm, c in costs.items()
    ]  # fmt: skip
    points = {arm: (c["step_flops"] * c["steps"], c["trainable"], results.estimate(results.mean_dice(target, arm)))
              for arm, c in costs.items()}  # fmt: skip
    text = ("Arithmetic is counted; times and memory are medians over repetitions on this machine (on a CPU the "
            "compiled step's temporaries), other work on it included.")
    return Section("Accuracy against compute", text, header, rows, figures.accuracy_against_compute(points, zero))


def _curve(config: Any, folder: Path, arm: str) -> tuple[list[int], list[float]]:
    losses: dict[int, list[float]] = {}
    for r in range(len(runs.replicates(config))):
        for line in (folder / "runs" / f"{arm}@{r}" / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record.get("loss") is not None:
                losses.setdefault(record["step"], []).append(record["loss"])
    return list(losses), [statistics.fmean(values) for values in losses.values()]


def _few_shot(config: Any, folder: Path, target: Table, zero: results.Estimate) -> Section:
    table, arms = _table(folder, "few_shot"), [a for a in config.few_shot.arms if a in config.arms]
    sizes = {size: table for size in config.few_shot.sizes}
    names = {size: {arm: f"{arm}_n{size}" for arm in arms} for size in sizes}
    if config.max_train_cases:
        sizes[config.max_train_cases], names[config.max_train_cases] = target, {arm: arm for arm in arms}
    curve = results.few_shot(sizes, names)
    header = ["arm", *(f"{size} cases" for size in sorted(sizes))]
    rows = [[arm, *(report.with_interval(points[size]) for size in sorted(points))] for arm, points in curve.items()]
    rows.append(["zero-shot", *[report.number(zero.mean)] * len(sizes)])
    text = (f"Mean Dice on the target's test cases over the number of training cases; {config.few_shot.replicates} "
            "repetitions each, those of the main comparison at its own number.")
    return Section("Few-shot", text, header, rows, figures.few_shot_curve(curve, zero))


def _ablations(config: Any, folder: Path, source: Table, target: Table) -> Section:
    """Each fault alone; full and adapter arm are those of the ablation (the adapter is paper_sequential)."""
    full, adapter = config.ablation.arms
    clean = results.Setting((source, runs.ZERO_SHOT), (target, runs.ZERO_SHOT), (target, full), (target, adapter))
    table = _table(folder, "ablations")
    effects = []
    for fault in config.ablations:
        data, faulty, control = runs.FAULTY_DATA.get(fault, ""), {}, clean
        if data:
            own = _table(folder, "ablations", data="squeezed") if data == "squeezed" else table
            faulty = {"zero_shot": (own, f"{data}.{runs.ZERO_SHOT}"), "full": (own, f"{fault}.{full}"),
                      "adapter": (own, f"{fault}.{adapter}")}  # fmt: skip
            if data in runs.PRETRAINED_AGAIN:
                squeezed = "squeezed" if data == "squeezed" else ""
                faulty["source"] = (_table(folder, "ablations", "source", squeezed), f"{data}.{runs.ZERO_SHOT}")
        elif fault == "selection_by_label1":
            faulty = {"full": (table, f"{fault}.{full}"), "adapter": (table, f"{fault}.{adapter}")}
            control = dataclasses.replace(clean, full=(table, f"{SELECTION_CONTROL}.{full}"),
                                          adapter=(table, f"{SELECTION_CONTROL}.{adapter}"))  # fmt: skip
        elif fault == "legacy_adapters":
            faulty = {"adapter": (table, f"{fault}.{adapter}")}
        else:
            faulty = {"full": (table, f"{fault}.{full}")}
        effects.append(results.effect(fault, dataclasses.replace(control, **faulty), control))
    text = (f"Each fault of the released study alone, {config.ablation.replicates} repetitions; the adapter is "
            f"{adapter}. A positive change of the drop is a part of the drop that the fault makes. Squeezed volumes "
            "are scored on their own grid, as the released code does. Selection is compared with selection by the mean "
            "over as many validations. Full fine-tuning by resuming is trained at the rate that its schedule leaves.")
    return Section("Faults of the released study", text, *report.effect_rows(effects))


def _rates(config: Any, fixed: dict[str, Any]) -> Section:
    if not fixed["trials"]:
        listed = ", ".join(f"{arm} {rate:g}" for arm, rate in fixed["learning_rates"].items())
        return Section("Learning rates", f"Every arm used the rate of its config file: {listed}.")
    rows = []
    for arm, trials in fixed["trials"].items():
        ordered = sorted((int(k), score) for k, score in trials.items())
        listed = ", ".join(f"{runs.trial_rate(config, arm, k):g}: {report.number(score)}" for k, score in ordered)
        rows.append([arm, f"{fixed['learning_rates'][arm]:g}", str(len(ordered)), listed])
    text = "Chosen by the mean Dice of the validation cases, on subsets that no repetition uses."
    return Section("Learning rates", text, ["arm", "chosen", "trials", "validation mean Dice of each"], rows)


def _protocol(fixed: dict[str, Any], folder: Path) -> Section:
    record = json.loads((folder / protocol.TEST_FILE).read_text())
    c = fixed["config"]
    count = len(fixed["test_cases"]["target"])
    lines = [
        f"Fixed at {fixed['fixed_at']} (sha256 {fixed['sha256'][:16]}), before the first test case was used at "
        f"{record['first_touched_at']}. {count} target and {len(fixed['test_cases']['source'])} source test cases, "
        "used once, after all training.",
        f"Seeds: target subset {c['subset_seeds']}, initial weights and pre-training {c['init_seeds']}, data order "
        f"{c['order_seeds']}, {'crossed' if c['crossed'] else 'one repetition per subset'}. Same steps, patches, "
        "augmentation and post-processing for every arm.",
        "Deviations: " + (" ".join(protocol.deviations(fixed)) or "none."),
    ]
    return Section("Protocol", "\n\n".join(lines))
