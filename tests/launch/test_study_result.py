"""What a study says at the end, from tables whose right answer is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import study_conduct  # noqa: E402
import study_result  # noqa: E402

from configs import study as study_config  # noqa: E402
from mednext_jax.evaluate import tables  # noqa: E402
from mednext_jax.study import results  # noqa: E402

CASES, SEEDS = 8, 5
BASE = 0.05 * np.random.default_rng(0).standard_normal(CASES)  # how hard each case is
# Dice of every arm that the study has, before a case's own difficulty.
CLEAN = {"zero_shot": 0.6, "full": 0.7, "paper_sequential": 0.65, "paper_parallel": 0.64, "scratch": 0.5}
FAULTY = {
    "permuted.zero_shot": 0.4, "permuted_channels.full": 0.69, "permuted_channels.paper_sequential": 0.63,
    "joint.zero_shot": 0.55, "joint_normalization.full": 0.7, "joint_normalization.paper_sequential": 0.65,
    "selection_by_mean.full": 0.7, "selection_by_mean.paper_sequential": 0.65,
    "selection_by_label1.full": 0.6, "selection_by_label1.paper_sequential": 0.64,
    "legacy_adapters.paper_sequential": 0.45, "legacy_adapters.paper_parallel": 0.6, "resumed_full.full": 0.61,
}  # fmt: skip
SQUEEZED = {"squeezed.zero_shot": 0.5, "squeezed.full": 0.6, "squeezed.paper_sequential": 0.58}


def write(folder: Path, arms: dict[str, float], seeds: int = SEEDS) -> None:
    """metrics.csv of an evaluation."""
    made = tables.Table()
    for arm, dice in arms.items():
        for seed in range(3 if arm.endswith("zero_shot") else seeds):
            for case in range(CASES):
                made.add(f"{arm}@{seed}", f"case{case}", "WT", {"dice": dice + BASE[case]})
    folder.mkdir(parents=True)
    tables.write_table(folder / "metrics.csv", made)


@pytest.fixture
def study(tmp_path):
    """Config and folder of a study that was evaluated."""
    config = study_config.get_config("simulated")
    config.arms = ("scratch", "full", "paper_sequential", "paper_parallel")
    write(tmp_path / "evaluation", CLEAN)
    write(tmp_path / "evaluation_source", {"zero_shot": 0.9})
    write(tmp_path / "evaluation_ablations", FAULTY, 2)
    write(tmp_path / "evaluation_ablations_source", {"joint.zero_shot": 0.88})
    write(tmp_path / "evaluation_ablations_squeezed", SQUEEZED, 2)
    write(tmp_path / "evaluation_ablations_source_squeezed", {"squeezed.zero_shot": 0.7})
    return config, tmp_path


def ablations(study) -> tuple[dict, dict]:
    config, folder = study
    source, target = (study_result._table(folder, "main", cohort) for cohort in ("source", "target"))
    section, estimates = study_result._ablations(config, folder, source, target)
    return {row[0]: row for row in section.rows}, estimates


def test_each_fault_explains_what_it_does_to_the_drop(study):
    _, found = ablations(study)
    for fault, change in {"permuted_channels": 0.2, "squeezed": (0.7 - 0.5) - 0.3, "joint_normalization": 0.33 - 0.3,
                          "selection_by_label1": 0, "resumed_full": 0}.items():  # fmt: skip
        assert found[f"{fault}: drop_change"].mean == pytest.approx(change, abs=1e-9)


def test_each_fault_explains_what_it_does_to_the_gap_between_adapter_and_full(study):
    _, found = ablations(study)  # clean, the adapter lies 0.05 below
    for fault, change in {"permuted_channels": -0.01, "squeezed": 0.03, "joint_normalization": 0,
                          "selection_by_label1": 0.09, "legacy_adapters (paper_sequential)": -0.2,
                          "legacy_adapters (paper_parallel)": -0.04, "resumed_full": 0.09}.items():  # fmt: skip
        assert found[f"{fault}: gap_change"].mean == pytest.approx(change, abs=1e-9)


def test_the_share_of_the_drop_is_shown_where_a_fault_touches_it(study):
    rows, _ = ablations(study)
    assert rows["permuted_channels"][3].startswith("40 [")  # 0.2 of 0.9 - 0.4
    assert rows["resumed_full"][1:4] == ["", "none", ""]
    assert rows["none, all repetitions"][1].startswith("0.300 [")


def test_arms_are_compared_with_full_and_with_the_network_they_started_from(study):
    config, folder = study
    found = {(d.first, d.second): d for d in study_result._differences(config, study_result._table(folder, "main"))}
    assert len(found) == 3 + 4
    assert found["paper_sequential", "full"].estimate.mean == pytest.approx(-0.05)
    assert found["full", "zero_shot"].estimate.mean == pytest.approx(0.1)
    assert found["full", "zero_shot"].estimate.seeds == SEEDS


def test_published_results_are_compared_and_other_files_refused(study):
    _, folder = study
    mine = {"estimates": {"drop": {"mean": 0.3, "low": 0.2, "high": 0.4}}}
    (folder / "results.json").write_text(json.dumps(mine))
    assert study_result.compared(folder, study_result.published(folder / "results.json"))[1]
    said, agrees = study_result.compared(folder, {"drop": {"mean": 0.1, "low": 0.0, "high": 0.2}})
    assert not agrees and "0 of 1" in said and "drop: 0.3, published 0.1" in said
    said, agrees = study_result.compared(folder, {**mine["estimates"], "lora, 30 cases": {"mean": 0.1}})
    assert not agrees and said.startswith("not the same study: 1 of the 2") and "'lora, 30 cases'" in said
    other = folder / "other.json"
    for text in ("[]", "{}", '{"estimates": {}}', '{"estimates": {"drop": 0.3}}', "no JSON"):
        other.write_text(text)
        with pytest.raises(ValueError, match="no results of a study"):
            study_result.published(other)


def test_a_study_without_full_is_compared_with_no_adaptation_alone(study):
    config, folder = study
    config.arms = ("scratch",)
    found = study_result._differences(config, study_result._table(folder, "main"))
    assert [(d.first, d.second) for d in found] == [("scratch", "zero_shot")]
    assert isinstance(found[0], results.Difference)


def test_a_field_in_which_arms_differ_beside_what_makes_them_is_named(study):
    config, folder = study
    config.arms = ("full", "scratch")
    for arm, steps in (("full", 80), ("scratch", 90)):
        (folder / "runs" / f"{arm}@0").mkdir(parents=True)
        content = {"seed": 0, "init_from": arm, "peft": {"method": arm}, "data": {"batch_size": 2},
                   "optim": {"peak_lr": steps, "total_steps": steps}}  # fmt: skip
        (folder / "runs" / f"{arm}@0" / "config.json").write_text(json.dumps(content))
    assert study_conduct.unequal(config, folder) == ["optim.total_steps (full 80, scratch 90)"]
