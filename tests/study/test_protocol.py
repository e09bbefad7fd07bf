"""The protocol: fixed once, tied to its config, and honest about where it falls short."""

import json

import pytest

from mednext_jax.study import protocol

CONFIG = {
    "arms": ["full", "lora"], "note": "", "rates": {"trials": 3, "max_trials": 6, "subsets": 3}, "crossed": True,
    "subset_seeds": [0, 1, 2, 3, 4], "init_seeds": [0, 1, 2], "order_seeds": [0, 1, 2], "ablations": [],
    "few_shot": {"sizes": []}, "max_train_cases": 24,
}  # fmt: skip
TRIALS = {"full": {-1: 0.5, 0: 0.6, 1: 0.5}, "lora": {-1: 0.4, 0: 0.5, 1: 0.3}}


def fixed(folder, config=CONFIG, trials=TRIALS, left_out=()):
    content = protocol.content(config, trials, {"full": 1e-3, "lora": 1e-2}, {"source": ["b", "a"], "target": ["c"]},
                               left_out)  # fmt: skip
    (folder / protocol.PROTOCOL_FILE).write_text(json.dumps(content))
    return content


def test_a_study_goes_on_under_its_protocol_and_under_no_other(tmp_path):
    protocol.check(tmp_path, CONFIG)  # nothing fixed yet
    fixed(tmp_path)
    protocol.check(tmp_path, CONFIG)
    protocol.check(tmp_path, {**CONFIG, "note": "decides nothing"})
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
    record = protocol.touch(tmp_path)
    assert record["protocol"] == content["sha256"] and record["first_touched_at"] >= content["fixed_at"]
    (tmp_path / protocol.TEST_FILE).write_text(json.dumps({**record, "first_touched_at": "before"}))
    assert protocol.touch(tmp_path)["first_touched_at"] == "before"
    fixed(tmp_path, {**CONFIG, "arms": ["full"]})
    with pytest.raises(ValueError, match="under another protocol"):
        protocol.touch(tmp_path)


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
        ({"rates": {"trials": 1, "subsets": 1}}, {}, "not chosen by trials"),
        ({"ablations": ["squeezed"]}, TRIALS, "chosen for the main comparison"),
    ),
)
def test_shortcuts_are_written_down(tmp_path, change, trials, said):
    assert any(said in line for line in protocol.deviations(fixed(tmp_path, {**CONFIG, **change}, trials)))


def test_what_was_left_out_is_a_deviation(tmp_path):
    assert protocol.deviations(fixed(tmp_path, left_out=["No few-shot curve."])) == ["No few-shot curve."]
