"""What a study's report says of how it was done: learning rates, protocol, and where it fell short of that."""

import json
from pathlib import Path
from typing import Any

import study_cost
import study_runs as runs

from mednext_jax.study import protocol, report
from mednext_jax.study.report import Section

# Fields of a run's config that make an arm: method, weights and their network, learning rate, an order of its own.
OF_AN_ARM = ("peft.", "init_from", "model.variant", *(f"model.{field}" for field in study_cost.NETWORK),
             "optim.peak_lr", "data.order_seed")  # fmt: skip


def rates(config: Any, fixed: dict[str, Any]) -> Section:
    """Every learning rate that was tried, its score, and the chosen ones."""
    if not fixed["trials"]:
        listed = ", ".join(f"{arm} {rate:g}" for arm, rate in fixed["learning_rates"].items())
        return Section("Learning rates", f"Every arm used the rate of its config file: {listed}.")
    rows = []
    for arm, trials in protocol.tried(fixed).items():
        ordered = sorted(trials.items())
        listed = ", ".join(f"{runs.trial_rate(config, arm, k):g}: {report.number(score)}" for k, score in ordered)
        rows.append([arm, f"{fixed['learning_rates'][arm]:g}", str(len(ordered)), listed])
    subsets = "on subsets that no repetition uses" if config.max_train_cases else "trained on all training cases"
    text = (f"Chosen by the mean Dice of the validation cases, {subsets}: the best, or what comes within "
            f"{config.rates.tolerance:g} of it and is nearest to the rate of the arm's config file.")
    return Section("Learning rates", text, ["arm", "chosen", "trials", "validation mean Dice of each"], rows)


def unequal(config: Any, folder: Path) -> list[str]:
    """In which fields the runs of the arms differ beside what makes an arm: nothing should be listed."""
    from mednext_jax.train import workdir

    found = {arm: workdir.leaves(json.loads((folder / "runs" / f"{arm}@0" / "config.json").read_text()))
             for arm in config.arms}  # fmt: skip
    fields = sorted({name for leaves in found.values() for name in leaves if not name.startswith(OF_AN_ARM)})
    values = {name: {arm: leaves.get(name) for arm, leaves in found.items()} for name in fields}
    return [f"{name} ({', '.join(f'{arm} {value}' for arm, value in by_arm.items())})"
            for name, by_arm in values.items() if len(set(map(str, by_arm.values()))) > 1]  # fmt: skip


def conduct(config: Any, fixed: dict[str, Any], folder: Path) -> Section:
    """When the protocol was fixed and the test cases used, seeds, what was equal for all arms, and deviations."""
    record = json.loads((folder / protocol.TEST_FILE).read_text())
    c = fixed["config"]
    count, differing = len(fixed["test_cases"]["target"]), unequal(config, folder)
    same = "The arms' configs are equal in every field but method, starting weights, network and learning rate"
    same = f"Beside what makes them, the arms differ in: {'; '.join(differing)}" if differing else same
    lines = [
        f"Fixed at {fixed['fixed_at']} (sha256 {fixed['sha256'][:16]}), before the first test case was used at "
        f"{record['first_touched_at']}. {count} target and {len(fixed['test_cases']['source'])} source test cases, "
        "used once, after all training.",
        f"Seeds: target subset {c['subset_seeds']}, initial weights and pre-training {c['init_seeds']}, data order "
        f"{c['order_seeds']}, {'crossed' if c['crossed'] else 'taken in turn'}. {same}; their predictions are "
        "post-processed alike.",
        "Deviations: " + (" ".join(protocol.deviations(fixed)) or "none."),
    ]
    return Section("Protocol", "\n\n".join(lines))
