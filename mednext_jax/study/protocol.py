"""The protocol: everything that could be bent towards a wished result, written down before a test case is seen.

``protocol.json`` holds the config, the trials and chosen learning rates, the test cases, and the hash of all that.
``test.json`` records that the test cases were touched, when, and under which protocol. A study whose protocol is
fixed goes on with that config and no other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mednext_jax.study import rates

PROTOCOL_FILE, TEST_FILE = "protocol.json", "test.json"
FREE = ("note", "pages", "steps_per_process")  # fields of the config that may change afterwards: they decide no number


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
        "trials": {arm: {str(k): score for k, score in sorted(scores.items())} for arm, scores in trials.items()},
        "learning_rates": dict(learning_rates),
        "test_cases": {cohort: sorted(cases) for cohort, cases in test_cases.items()},
        "left_out": list(left_out),
    }
    return {**fixed, "sha256": fingerprint(fixed), "fixed_at": _now()}


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


def touch(folder: Path) -> dict[str, Any]:
    """The record that the test cases are used under the protocol in ``folder``, made at the first call.

    Raises: ValueError if they were used under another protocol.
    """
    fixed = json.loads((folder / PROTOCOL_FILE).read_text())
    file = folder / TEST_FILE
    if not file.is_file():
        return {"protocol": fixed["sha256"], "first_touched_at": _now()}
    record = json.loads(file.read_text())
    if record["protocol"] != fixed["sha256"]:
        raise ValueError(f"the test cases were used under another protocol ({file}): use a new --workdir")
    return record


def deviations(fixed: Mapping[str, Any]) -> list[str]:
    """In which points a study falls short of the protocol it should have; one sentence each."""
    config, found = fixed["config"], list(fixed["left_out"])
    trials = {arm: {int(k): score for k, score in scores.items()} for arm, scores in fixed["trials"].items()}
    if config["rates"]["trials"] < 3:
        found.append("Learning rates were not chosen by trials: every arm used its config file's own.")
    else:
        edge = [arm for arm, scores in trials.items() if not rates.is_interior(scores)]
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
    if not config["crossed"] and config["max_train_cases"] and len(config["subset_seeds"]) > 1:
        found.append("Seeds are not crossed: a replicate changes subset, initial weights and order together, so "
                     "their shares of the variance are not told apart.")  # fmt: skip
    if config["rates"]["trials"] > 1 and (config["few_shot"]["sizes"] or config["ablations"]):
        found.append("The few-shot curve and the ablations use the learning rates chosen for the main comparison.")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
