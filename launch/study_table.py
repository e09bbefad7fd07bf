"""The study's table in plain text: what the paper reports, per arm."""

import json
from pathlib import Path

import study_steps

COLUMNS = (("WT", "dice"), ("TC", "dice"), ("ET", "dice"), ("mean", "dice"), ("mean", "sensitivity"),
           ("mean", "specificity"), ("mean", "precision"))  # fmt: skip


def text(config, folder: Path) -> str:
    """One line per arm: Dice per region and mean, sensitivity, specificity, precision, trained parameters."""
    source = json.loads((folder / "evaluation_source" / "summary.json").read_text())
    target = json.loads((folder / "evaluation" / "summary.json").read_text())
    lines = [""]
    if study_steps.is_simulated(config):
        lines += [study_steps.SIMULATED, ""]
    head = [f"{region} {metric}" if metric == "dice" else metric for region, metric in COLUMNS]
    lines.append(f"{'':28}{'cases':>6}{'seeds':>6}" + "".join(f"{h:>12}" for h in head))
    lines.append(_row("source test, pre-trained", source["arms"][study_steps.ZERO_SHOT], len(config.seeds)))
    for arm, values in target["arms"].items():
        lines.append(_row(f"target test, {arm}", values, len(config.seeds)))
    before = source["arms"][study_steps.ZERO_SHOT]["mean"]["dice"]["mean"]
    after = target["arms"][study_steps.ZERO_SHOT]["mean"]["dice"]["mean"]
    lines += ["", f"without adaptation, mean Dice {before:.3f} on the source becomes {after:.3f} on the target"]
    lines.append("intervals, paired differences and tests: see the report")
    return "\n".join(lines)


def _row(name: str, values: dict, seeds: int) -> str:
    cells = [values[region][metric]["mean"] for region, metric in COLUMNS]
    n = values["mean"]["dice"]["n"]
    shown = ["-" if cell is None else format(cell, ".3f") for cell in cells]
    return f"{name:28}{n:>6}{seeds:>6}" + "".join(f"{cell:>12}" for cell in shown)
