"""The protocol: everything that could be bent towards a wished result, written down before a test case is seen.

``protocol.json`` holds the config, the trials and chosen learning rates, the test cases, and the hash of all that.
``test.json`` records that the test cases were touched, when, and under which protocol. A study whose protocol is
fixed goes on with that config and no other.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mednext_jax.study import rates

PROTOCOL_FILE, TEST_FILE = "protocol.json", "test.json"
FREE = ("steps_per_process",)  # fields of the config that may change afterwards: no step depends on them


def fingerprint(content: Mapping[str, Any]) -> str:
    """Hash of JSON content without its own ``sha256`` and ``fixed_at``."""
    kept = {name: value for name, value in content.items() if name not in ("sha256", "fixed_at")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def content(
    config: Mapping[str, Any],
    trials: Mapping[str, Mapping[int, float]],
    learning_rates: Mapping[str, float],
    test_cases: Mapping[str, Sequence[str]],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """What is fixed.

    Args:
      config: of the study, plain values.
      trials: arm -> trial -> validation score.
      learning_rates: arm -> the chosen rate.
      test_cases: cohort -> case ids.
      left_out: sentences on what the config asks for and the study cannot have.
    """
    fixed = {
        "config": json.loads(json.dumps(config)),
        "trials": {arm: {str(k): None if math.isnan(score) else score for k, score in sorted(scores.items())}
                   for arm, scores in trials.items()},
        "learning_rates": dict(learning_rates),
        "test_cases": {cohort: sorted(cases) for cohort, cases in test_cases.items()},
        "left_out": list(left_out),
    }
    return {**fixed, "sha256": fingerprint(fixed), "fixed_at": _now()}


@dataclass(frozen=True)
class Fixed:
    """What a protocol says of the runs: arm -> trial -> validation score, arm -> rate, cohort -> test cases."""

    trials: dict[str, dict[int, float]]
    learning_rates: dict[str, float]
    test_cases: dict[str, list[str]]


def read(folder: Path) -> Fixed | None:
    """The protocol of the study in ``folder``; None as long as there is none."""
    file = folder / PROTOCOL_FILE
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    return Fixed(tried(found), found["learning_rates"], found["test_cases"])


def tried(fixed: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Arm -> trial -> validation score, from the content of a protocol; NaN of a trial that had none."""
    return {arm: {int(k): math.nan if score is None else score for k, score in scores.items()}
            for arm, scores in fixed["trials"].items()}  # fmt: skip


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a protocol was fixed in ``folder`` with another config, or was changed by hand."""
    file = folder / PROTOCOL_FILE
    if not file.is_file():
        return
    fixed = json.loads(file.read_text())
    if fingerprint(fixed) != fixed["sha256"]:
        raise ValueError(f"{file} was changed after it was written: restore it or use a new --workdir")
    old, new = fixed["config"], json.loads(json.dumps(config))
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            raise ValueError(
                f"the protocol in {file} was fixed with another config.{name}; a protocol is not changed once it "
                "stands: restore the value or use a new --workdir"
            )


def touch(folder: Path, test_cases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The record that the test cases are used under the protocol in ``folder``, made at the first call.

    Args:
      test_cases: cohort -> ids of those that are there now.

    Raises: ValueError if they are others than the protocol's, or were used under another protocol.
    """
    fixed = json.loads((folder / PROTOCOL_FILE).read_text())
    for cohort, cases in test_cases.items():
        if changed := sorted(set(cases) ^ set(fixed["test_cases"][cohort])):
            raise ValueError(f"the {cohort}'s test cases are not those of the protocol in {folder} ({changed[0]} and "
                             f"{len(changed) - 1} more): restore the splits of its store or use a new --workdir")
    file = folder / TEST_FILE
    if not file.is_file():
        return {"protocol": fixed["sha256"], "first_touched_at": _now()}
    record = json.loads(file.read_text())
    if record["protocol"] != fixed["sha256"]:
        raise ValueError(f"the test cases were used under another protocol ({file}): use a new --workdir")
    return record


def deviations(fixed: Mapping[str, Any]) -> list[str]:
    """In which points a study falls short of the protocol it should have; one sentence each."""
    config, trials, found = fixed["config"], tried(fixed), list(fixed["left_out"])
    if given := config["pretrain"]["init_from"]:
        found.append(f"One given network, {given}, instead of one pre-training per init seed: whether it has seen "
                     "cases that are tested here is not known, and the intervals leave out the chance of its training.")
    if config["rates"]["trials"] < 2:
        found.append("Learning rates were not chosen by trials: every arm used its config file's own.")
    else:
        edge = [arm for arm, scores in trials.items() 
                if not rates.is_interior(scores, config["rates"]["tolerance"])]  # fmt: skip
        if edge:
            found.append(f"The best learning rate lies at the edge of the largest grid allowed: {', '.join(edge)}.")
        counts = {arm: len(scores) for arm, scores in trials.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
            found.append(f"Grids were extended for some arms, so the number of trials differs: {listed}.")
        if config["rates"]["subsets"] < 3:
            found.append(f"Learning rates were chosen on {config['rates']['subsets']} tuning subset(s): with few, "
                         "the choice is partly luck.")
    for field, least in (("subset_seeds", 5), ("init_seeds", 3), ("order_seeds", 3)):
        if field == "subset_seeds" and not config["max_train_cases"]:
            too = ", and learning rates are chosen on them too" if config["rates"]["trials"] > 1 else ""
            found.append("Every repetition trains on all training cases (config.max_train_cases=0): the intervals "
                         f"leave out the chance of which cases those are{too}.")
        elif len(config[field]) < least:
            found.append(f"{len(config[field])} value(s) of {field}; {least} are wanted.")
    for part, asked in (("few_shot", config["few_shot"]["sizes"]), ("ablation", config["ablations"])):
        if asked and (count := config[part]["replicates"]) < 3:
            found.append(f"{count} repetition(s) of the {'few-shot curve' if part == 'few_shot' else 'ablations'}: "
                         "their intervals hold the chance of the cases more than that of the seeds.")
    if not config["crossed"] and config["max_train_cases"] and len(config["subset_seeds"]) > 1:
        found.append("Seeds are not crossed: a replicate changes subset, initial weights and order together, so "
                     "their shares of the variance are not told apart.")  # fmt: skip
    if config["rates"]["trials"] > 1 and (config["few_shot"]["sizes"] or config["ablations"]):
        found.append("The few-shot curve and the ablations use the learning rates chosen for the main comparison.")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
