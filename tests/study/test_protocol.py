"""The protocol: fixed once, tied to its config, and honest about where it falls short."""

import json
import math

import pytest

from data_pipeline import atomic
from mednext_jax.study import protocol

CONFIG = {
    "arms": ["full", "lora"], "note": "", "crossed": True,
    "rates": {"trials": 3, "max_trials": 6, "subsets": 3, "tolerance": 0.005},
    "subset_seeds": [0, 1, 2, 3, 4], "init_seeds": [0, 1, 2], "order_seeds": [0, 1, 2], "ablations": [],
    "few_shot": {"sizes": [], "replicates": 3}, "max_train_cases": 24, "ablation": {"replicates": 3},
    "pretrain": {"init_from": ""},
}  # fmt: skip
TRIALS = {"full": {-1: 0.5, 0: 0.6, 1: 0.5}, "lora": {-1: 0.4, 0: 0.5, 1: 0.3}}


def fixed(folder, config=CONFIG, trials=TRIALS, left_out=()):
    content = protocol.content(config, trials, {"full": 1e-3, "lora": 1e-2}, {"source": ["b", "a"], "target": ["c"]},
                               left_out)  # fmt: skip
    atomic.write_json(folder / protocol.PROTOCOL_FILE, content)
    return content


def test_a_study_goes_on_under_its_protocol_and_under_no_other(tmp_path):
    protocol.check(tmp_path, CONFIG)  # nothing fixed yet
    fixed(tmp_path)
    protocol.check(tmp_path, CONFIG)
    protocol.check(tmp_path, {**CONFIG, "steps_per_process": 7})  # decides nothing
    with pytest.raises(ValueError, match="another config.arms"):
        protocol.check(tmp_path, {**CONFIG, "arms": ["full"]})


def test_a_protocol_changed_by_hand_is_refused(tmp_path):
    content = fixed(tmp_path)
    content["learning_rates"]["lora"] = 1.0
    (tmp_path / protocol.PROTOCOL_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed after it was written"):
        protocol.check(tmp_path, CONFIG)


def test_the_first_use_of_the_test_cases_is_recorded_and_kept(tmp_path):
    content = fixed(tmp_path)
    cases = {"source": ["a", "b"], "target": ["c"]}
    record = protocol.touch(tmp_path, cases)
    assert record["protocol"] == content["sha256"] and record["first_touched_at"] >= content["fixed_at"]
    (tmp_path / protocol.TEST_FILE).write_text(json.dumps({**record, "first_touched_at": "before"}))
    assert protocol.touch(tmp_path, cases)["first_touched_at"] == "before"
    fixed(tmp_path, {**CONFIG, "arms": ["full"]})
    with pytest.raises(ValueError, match="under another protocol"):
        protocol.touch(tmp_path, cases)


def test_other_test_cases_than_the_protocols_are_refused(tmp_path):
    fixed(tmp_path)
    with pytest.raises(ValueError, match=r"the target's test cases are not those of the protocol .*\(d and 0 more\)"):
        protocol.touch(tmp_path, {"source": ["a", "b"], "target": ["c", "d"]})


def test_a_trial_that_had_no_score_is_kept_as_one_that_loses(tmp_path):
    content = fixed(tmp_path, trials={**TRIALS, "lora": {-1: math.nan, 0: 0.5, 1: 0.3}})
    scores = protocol.read(tmp_path).trials["lora"]
    assert math.isnan(scores.pop(-1)) and scores == {0: 0.5, 1: 0.3}
    assert protocol.deviations(content) == []


def test_a_full_protocol_has_no_deviations(tmp_path):
    assert protocol.deviations(fixed(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "trials", "said"),
    (
        ({}, {**TRIALS, "lora": {-1: 0.1, 0: 0.2, 1: 0.3}}, "edge of the largest grid allowed: lora"),
        ({}, {**TRIALS, "lora": {-1: 0.1, 0: 0.2, 1: 0.3, 2: 0.1}}, "full 3, lora 4"),
        ({"subset_seeds": [0]}, TRIALS, "1 value(s) of subset_seeds"),
        ({"crossed": False}, TRIALS, "not crossed"),
        ({"max_train_cases": 0}, TRIALS, "trains on all training cases"),
        ({"rates": {"trials": 1, "subsets": 1, "tolerance": 0.005}}, {}, "not chosen by trials"),
        ({"ablations": ["squeezed"]}, TRIALS, "chosen for the main comparison"),
        ({"ablations": ["squeezed"], "ablation": {"replicates": 2}}, TRIALS, "2 repetition(s) of the ablations"),
        ({"few_shot": {"sizes": [1], "replicates": 1}}, TRIALS, "1 repetition(s) of the few-shot curve"),
        ({"rates": {"trials": 2, "subsets": 1, "tolerance": 0.005}}, TRIALS, "chosen on 1 tuning subset(s)"),
        ({"pretrain": {"init_from": "MODEL"}}, TRIALS, "One given network, MODEL, instead of one pre-training"),
    ),
)
def test_shortcuts_are_written_down(tmp_path, change, trials, said):
    assert any(said in line for line in protocol.deviations(fixed(tmp_path, {**CONFIG, **change}, trials)))


def test_what_was_left_out_is_a_deviation(tmp_path):
    assert protocol.deviations(fixed(tmp_path, left_out=["No few-shot curve."])) == ["No few-shot curve."]
