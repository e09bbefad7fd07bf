"""The study's plan: which commands run, in which order, and what happens when one of them stops."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import study  # noqa: E402
import study_check  # noqa: E402
import study_cohorts  # noqa: E402
import study_cost  # noqa: E402
import study_plan  # noqa: E402
import study_runs  # noqa: E402
import study_steps  # noqa: E402
from study_worker import Worker  # noqa: E402

from configs import study as study_config  # noqa: E402
from data_pipeline import atomic, preprocess  # noqa: E402
from data_pipeline.cohorts import scan  # noqa: E402
from mednext_jax import modeldir  # noqa: E402
from mednext_jax.nn.mednext import MedNeXt  # noqa: E402
from mednext_jax.nn.paths import unflatten  # noqa: E402
from mednext_jax.peft.attach import draw  # noqa: E402
from mednext_jax.study import protocol  # noqa: E402
from mednext_jax.train.network import described  # noqa: E402
from tests.study.cohorts import write_cohort  # noqa: E402


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "study.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def plan(config, folder) -> dict[str, study_steps.Step]:
    steps = study_plan.plan(config, folder)
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def finish(folder: Path, run: study_runs.Run, score: float) -> None:
    """Leaves the result that a training run would leave."""
    (folder / "runs" / run.name).mkdir(parents=True)
    (folder / "runs" / run.name / "result.json").write_text(json.dumps({"best_score": score}))


def test_every_arm_is_trained_then_predicts_and_all_are_evaluated_once(tmp_path):
    config = study_config.get_config("demo")
    names = list(plan(config, tmp_path))
    assert names[:3] == ["simulate", "preprocess_source", "preprocess_target"]
    for arm in config.arms:
        assert names.index("protocol") < names.index(f"train_{arm}@0") < names.index(f"predict_target_{arm}@0")
    assert names[-3:] == ["evaluate_evaluation_source", "evaluate_evaluation", "result"]


def test_no_test_case_is_predicted_before_the_protocol_and_all_training(tmp_path):
    steps = plan(study_config.get_config("demo"), tmp_path)
    training = {name for name in steps if name.startswith("train_") and name != "train_pretrain@0"}
    for name, step in steps.items():
        if name.startswith("predict_"):
            assert {"protocol", *training} <= set(step.needs)


def test_every_arm_but_scratch_starts_from_the_same_pretrained_network(tmp_path):
    steps = plan(study_config.get_config("demo"), tmp_path)
    base = f"--config.init_from={tmp_path / 'runs' / 'pretrain@0'}"
    assert base in steps["train_full@0"].argv and base in steps["train_conv_adapter@0"].argv
    assert not any("init_from" in word for word in steps["train_scratch@0"].argv)


def test_subset_initialisation_and_order_have_seeds_of_their_own(tmp_path):
    config = study_config.get_config("demo")
    config.subset_seeds, config.init_seeds, config.order_seeds = (5, 6, 7, 8), (1, 2), (3, 4)
    config.max_train_cases = 6
    steps = plan(config, tmp_path)
    wanted = {"--config.data.subset_seed=7", "--config.seed=1", "--config.data.order_seed=3"}
    assert wanted <= set(steps["train_full@2"].argv)
    assert [name for name in steps if name.startswith("train_pretrain")] == ["train_pretrain@1", "train_pretrain@2"]
    config.crossed = True
    assert sum(name.startswith("train_full@") for name in plan(config, tmp_path)) == 4 * 2


@pytest.mark.parametrize("cases", (24, 0))
@pytest.mark.parametrize("crossed", (True, False))
def test_no_two_repetitions_of_an_arm_are_the_same_run(cases, crossed):
    config = study_config.get_config("real")
    config.max_train_cases, config.crossed = cases, crossed
    rates = dict.fromkeys(config.arms, 1e-3)
    seeds = [one.seeds for one in study_runs.final_runs(config, rates) if one.name.startswith("full@")]
    told_apart = {one if cases else one[1:] for one in seeds}  # without a subset its seed has no effect
    wanted = {(24, True): 15, (24, False): 5, (0, True): 3, (0, False): 3}
    assert len(told_apart) == len(seeds) == wanted[cases, crossed]
    assert all(len({one[i] for one in seeds[:3]}) == 3 for i in ((0, 1, 2) if cases else (1, 2)))
    few = {one.seeds.subset for one in study_runs.few_shot_runs(config, rates) if one.name.startswith("full_n5@")}
    assert len(few) == 5  # these draw subsets whatever the main comparison does


def test_the_few_shot_curve_trains_on_its_numbers_of_cases(tmp_path):
    config = study_config.get_config("real")
    rates, folder = dict.fromkeys(config.arms, 1e-3), tmp_path / "store"
    found = {one.name: study_runs.command(one, config, tmp_path, folder) for one in
             study_runs.few_shot_runs(config, rates)}  # fmt: skip
    for size in (1, 5, 10, 30):
        assert f"--config.data.max_train_cases={size}".removeprefix("--") in found[f"full_n{size}@0"]
    config.few_shot.sizes = (1, 24)  # the main comparison's own number is not trained twice
    assert {one.name.split("@")[0] for one in study_runs.few_shot_runs(config, rates)} == {
        f"{arm}_n1" for arm in config.few_shot.arms
    }


def test_more_training_cases_than_there_are_is_told_before_anything_is_trained(tmp_path):
    config = study_config.get_config("demo")
    config.target.store = str(tmp_path / "store")
    preprocess.preprocess(write_cohort(tmp_path / "raw", 6, True), config.target.store, test_fraction=0.2)
    there = len(study_cohorts.training_cases(config, tmp_path))
    config.max_train_cases = there + 1
    said = f"config.max_train_cases asks for {there + 1} training cases, .*store has {there}"
    with pytest.raises(ValueError, match=said):
        study_plan.plan(config, tmp_path)
    config.max_train_cases, config.few_shot.sizes = there, (1, 9)
    with pytest.raises(ValueError, match=r"config.few_shot.sizes asks for 9 training cases"):
        study_plan.plan(config, tmp_path)


def test_what_training_would_refuse_is_told_before_a_protocol_binds_the_study(tmp_path):
    config = study_config.get_config("demo")
    config.overrides = ("optim.total_steps=10",)
    with pytest.raises(ValueError, match=r"run scratch@0 could not be trained: config.optim.warmup_steps is 10"):
        study_check.check(config, tmp_path)
    config.overrides = ("optim.total_step=10",)
    with pytest.raises(ValueError, match=r"could not be trained: .*total_step"):
        study_check.check_config(config)


def test_a_given_store_without_test_cases_is_told_with_its_remedy(tmp_path):
    config = study_config.get_config("demo")
    config.target.store = str(tmp_path / "store")
    preprocess.preprocess(write_cohort(tmp_path / "raw", 5, True), config.target.store)
    with pytest.raises(ValueError, match=r"store has no test cases; make the store .*preprocess.py --test_fraction"):
        study_check.check_config(config)


@pytest.mark.parametrize(
    ("arms", "sizes", "said"),
    (
        (("full", "lora"), (1, 5, 30), ["config.arms lacks paper_sequential"]),
        (("lora",), (), ["No few-shot curve: config.arms has none of scratch, full", "config.arms lacks full"]),
        (("full", "paper_sequential"), (1, 5, 30), []),
    ),
)
def test_fewer_arms_are_a_study_and_what_they_rule_out_is_said(tmp_path, arms, sizes, said):
    config = study_config.get_config("simulated")
    config.arms, config.rates.trials = arms, 1
    left_out = study_runs.left_out(config)
    assert len(left_out) == len(said) and all(part in line for part, line in zip(said, left_out, strict=True))
    assert study_runs.few_shot_sizes(config) == sizes
    names = plan(config, tmp_path)
    assert any("squeezed" in name for name in names) == ("paper_sequential" in arms)
    assert ("evaluate_evaluation_few_shot" in names) == bool(sizes)


def given_weights(folder: Path, n_channels: int) -> str:
    network = MedNeXt(in_channels=4, n_classes=3, n_channels=n_channels, exp_r=2, block_counts=(1,) * 9)
    info = modeldir.ModelInfo({"in_channels": 4}, ("a", "b", "c", "d"), "zscore_brain", "regions", "brats2023",
                              {"WT": [1], "TC": [2], "ET": [3]}, (16, 16, 16))  # fmt: skip
    modeldir.save_model(folder, described(info, network), unflatten(draw(network, jax.random.key(0))))
    return str(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    (
        ("arms", ("full", "full"), "config.arms has 'full' more than once"),
        ("arms", (), "config.arms names no arm"),
        ("ablation.arms", ("full",), "config.ablation.arms must name two arms"),
        ("subset_seeds", (0, 0), "config.subset_seeds has 0 more than once"),
        ("order_seeds", (0, 1, 2, 3), "config.order_seeds has 4 values, config.init_seeds 3"),
        ("init_seeds", (), "config.init_seeds needs a value"),
        ("rates.subsets", 0, "config.rates.subsets is 0; it must be at least 1"),
        ("rates.max_trials", 2, "config.rates.max_trials is 2, smaller than the first grid"),
        ("rates.factor", 1.0, "config.rates.factor is 1.0; it must be greater than 1"),
        ("rates.overrides", (), "run trials/.* could not be trained: no validation would judge it"),
        ("few_shot.sizes", (5, 5), "config.few_shot.sizes has 5 more than once"),
        ("few_shot.sizes", (0,), "config.few_shot.sizes has 0"),
        ("ablation.replicates", 0, "config.ablation.replicates is 0"),
        ("predict.overlap", 1.5, "config.predict.overlap is 1.5"),
        ("predict.thresholds", ("x",), "config.predict.thresholds=x: give one number, or one per region"),
        ("predict.min_component_mm3", ("TUMOUR:5",), "names the region 'TUMOUR'; known: WT"),
        ("pretrain.overrides", ("model.n_channels=16",), "scratch would train .* n_channels 8, pre-training has 16"),
        ("target.test_fraction", 0.0, "config.target.test_fraction is 0.0; a part is to be tested on"),
        ("source.val_fraction", 0.9, "config.source.val_fraction is 0.9; .* must leave cases for training"),
        ("source.root", "absent", "config.source.root=absent is no folder"),
        ("target.splits", "absent", "config.target.splits=absent is no file"),
    ),
)  # fmt: skip
def test_what_no_study_can_have_is_told_before_anything_runs(tmp_path, monkeypatch, field, value, said):
    config = study_config.get_config("simulated")
    config.update_from_flattened_dict({field: value})
    # Whether every run could be trained takes a second, and has tests of its own.
    if field not in ("rates.overrides",):
        monkeypatch.setattr(study_cost, "check_runs", lambda config: None)
    with pytest.raises(ValueError, match=said):
        study_check.check(config, tmp_path)


def test_one_folder_as_source_and_target_is_refused(tmp_path):
    config = study_config.get_config("demo")
    config.source.root, config.target.root = str(tmp_path), f"{tmp_path}/../{tmp_path.name}"
    with pytest.raises(ValueError, match="source and target are both"):
        study_check.check(config, tmp_path / "study")


def test_a_rule_of_post_processing_may_be_a_number(tmp_path):
    config = study_config.get_config("demo")
    config.predict.min_component_mm3 = (50,)  # what --config.predict.min_component_mm3=50 gives
    study_check.split_names(config)
    study_check.check(config, tmp_path)
    assert "--min_component_mm3=50" in plan(config, tmp_path)["predict_target_full@0"].argv


def protocol_of(config, folder: Path, rates: dict, trials: dict) -> None:
    content = protocol.content(config.to_dict(), trials, rates, {"source": ["a"], "target": ["b"]}, ())
    atomic.write_json(folder / protocol.PROTOCOL_FILE, content)


def test_the_protocol_decides_the_learning_rates_whatever_became_of_the_trials(tmp_path):
    config = study_config.get_config("simulated")
    config.arms, config.ablations, config.few_shot.sizes = ("full", "lora"), (), ()
    fixed = {"full": 0.004, "lora": 0.03}
    protocol_of(config, tmp_path, fixed, {arm: {-1: 0.1, 0: 0.2, 1: 0.1} for arm in fixed})
    for trial, score in ((-1, 0.9), (0, 0.1), (1, 0.1)):  # of full alone, and they say something else
        for one in study_runs.trial_runs(config, "full", trial):
            finish(tmp_path, one, score)
    steps = plan(config, tmp_path)
    for arm, rate in fixed.items():
        assert f"--config.optim.peak_lr={rate}" in steps[f"train_{arm}@0"].argv
    assert {name for name in steps if "lora@2" in name and "trials" in name} == set()
    assert steps["result"]


def test_another_config_than_the_protocols_is_refused_while_the_study_runs_too(tmp_path):
    config = study_config.get_config("demo")
    protocol_of(config, tmp_path, dict.fromkeys(config.arms, 1e-3), {})
    config.arms = ("full",)
    with pytest.raises(ValueError, match=r"fixed with another config\.arms"):
        study_plan.plan(config, tmp_path)


def test_a_given_network_is_tested_once_and_stands_beside_every_repetition(tmp_path):
    config = study_config.get_config("simulated")
    config.pretrain.init_from, config.rates.trials, config.few_shot.sizes = given_weights(tmp_path / "given", 8), 1, ()
    names = plan(config, tmp_path)
    assert [name for name in names if "predict_target_zero_shot" in name] == ["predict_target_zero_shot@0"]
    assert {study_runs.zero_shot_init(config, seeds) for seeds in study_runs.replicates(config)} == {0}


def test_processes_that_link_the_same_test_cases_at_once_do_not_disturb_each_other(tmp_path):
    raw = write_cohort(tmp_path / "raw", 3, True)
    ids = [case.case_id for case in scan(raw)]
    target = tmp_path / "links"
    for _ in range(2):
        study_cohorts._link(raw, ids, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(ids)
    assert all(file.resolve().is_file() for file in target.rglob("*.nii.gz"))


def test_the_workdir_is_the_same_from_wherever_it_is_named(tmp_path):
    protocol_of(study_config.get_config("simulated"), tmp_path, {}, {})
    result = run("--config=configs/study.py:demo", f"--workdir={os.path.relpath(tmp_path, ROOT)}")
    assert f"the protocol in {tmp_path / protocol.PROTOCOL_FILE} was fixed with another config" in result.stderr


def test_given_weights_are_not_trained_again_and_their_own_faults_are_left_out(tmp_path):
    config = study_config.get_config("simulated")
    config.pretrain.init_from, config.rates.trials = given_weights(tmp_path / "given", 8), 1
    study_check.check(config, tmp_path)
    names = plan(config, tmp_path)
    assert not any("pretrain" in name or "squeezed" in name or "joint" in name for name in names)
    assert "train_permuted_channels.full@0" in names
    assert [line for line in study_runs.left_out(config) if "squeezed, joint_normalization" in line]
    assert f"--config.init_from={tmp_path / 'given'}" in names["train_permuted_channels.full@0"].argv
    config.pretrain.init_from = given_weights(tmp_path / "wider", 12)
    with pytest.raises(ValueError, match="arm scratch would train a network with n_channels 8, .*wider has 12"):
        study_check.check(config, tmp_path)
    config.arms = tuple(arm for arm in config.arms if arm != "scratch")
    study_check.check(config, tmp_path)
    config.pretrain.init_from = str(tmp_path / "absent")
    with pytest.raises((ValueError, OSError), match="absent"):
        study_check.check(config, tmp_path)


def test_names_with_commas_are_several(tmp_path):
    config = study_config.get_config("demo")
    config.arms = ("full,lora",)  # what --config.arms=full,lora gives
    study_check.split_names(config)
    assert config.arms == ("full", "lora")
    study_check.check(config, tmp_path)


def test_another_simulator_than_the_frozen_one_is_refused(tmp_path):
    config = study_config.get_config("simulated")
    config.simulate.version += 1
    with pytest.raises(ValueError, match="config.simulate.version"):
        study_check.check(config, tmp_path)


def test_nothing_final_is_planned_before_every_arms_learning_rate_is_chosen(tmp_path):
    config = study_config.get_config("simulated")
    config.arms, config.ablations, config.few_shot.sizes = ("full", "lora"), (), ()
    assert "protocol" not in plan(config, tmp_path)
    for arm, best in (("full", 0), ("lora", 1)):
        for trial in (-1, 0, 1):
            for one in study_runs.trial_runs(config, arm, trial):
                finish(tmp_path, one, -abs(trial - best))
    names = plan(config, tmp_path)  # lora's best lies at the edge: one more trial
    assert "train_trials_lora@2@0" in names and "protocol" not in names
    for one in study_runs.trial_runs(config, "lora", 2):
        finish(tmp_path, one, -1)
    steps = plan(config, tmp_path)
    assert "protocol" in steps and f"--config.optim.peak_lr={study_runs.trial_rate(config, 'lora', 1)}" in \
        steps["train_lora@4"].argv
    tuning = {seeds.subset for seeds in study_runs.replicates(config)}
    assert all(one.seeds.subset not in tuning for one in study_runs.trial_runs(config, "lora", 0))


def test_each_fault_changes_one_thing(tmp_path):
    config = study_config.get_config("simulated")
    config.ablation.replicates = 2
    rates = dict.fromkeys(config.arms, 1e-3)
    clean = {one.name: one for one in study_runs.final_runs(config, rates)}
    found = {one.name: one for one in study_runs.ablation_runs(config, rates)}
    assert found["permuted_channels.full@1"].overrides == clean["full@1"].overrides
    assert found["permuted_channels.full@1"].data == "permuted"
    assert found["permuted_channels.full@1"].base == clean["full@1"].base == "pretrain@1"
    assert found["joint_normalization.full@0"].base == "joint.pretrain@0"
    assert set(found["legacy_adapters.paper_parallel@0"].overrides) - set(clean["paper_parallel@0"].overrides) == \
        {"peft.legacy=True"}
    changed = set(found["selection_by_label1.full@0"].overrides) - set(found["selection_by_mean.full@0"].overrides)
    assert changed == {"eval.score=label1"}
    assert any(o.startswith("optim.peak_lr=4e-09") for o in found["resumed_full.full@0"].overrides)


def test_the_dry_run_counts_the_runs_that_the_plan_has(tmp_path):
    config = study_config.get_config("simulated")
    config.rates.update(trials=1, max_trials=1)  # with more the plan grows as it goes
    planned = [name for name in plan(config, tmp_path) if name.startswith("train_")]
    assert sum(map(len, study_cost.groups(config).values())) == len(planned)
    config.rates.trials = 3
    assert len(study_cost.groups(config)["learning rates (first grids)"]) == \
        3 * config.rates.subsets * len(config.arms)


def test_the_dry_run_counts_arithmetic_of_what_a_run_overrides(tmp_path):
    config = study_config.get_config("demo")
    small = ("model.n_channels=2", "model.kernel_size=1", "model.block_counts=0,0,0,0,0,0,0,0,0")
    config.pretrain.overrides = (*small, "data.patch_voxels=16,16,16")
    config.overrides = ("data.patch_voxels=16,16,16", "optim.total_steps=10")
    one = study_cost.flops(config, study_runs.arm(config, "full", "full", study_runs.Seeds(0, 0, 0)))
    twice = ("optim.total_steps=20",)
    assert study_cost.flops(config, study_runs.arm(config, "full", "full", study_runs.Seeds(0, 0, 0), twice)) == 2 * one


def test_a_finished_step_is_skipped_but_not_when_its_command_was_another(tmp_path):
    one = step("one", "a.py", "--x=1")
    assert not one.is_done(tmp_path)
    one.mark_done(tmp_path, 2.0)
    assert one.is_done(tmp_path)
    with pytest.raises(ValueError, match="done by another command"):
        step("one", "a.py", "--x=2").is_done(tmp_path)
    assert json.loads((tmp_path / "done" / "one.json").read_text())["seconds"] == 2.0


WAITS = "import os, time; [time.sleep(0.02) for _ in range(3000) if not os.path.exists(VALUE.value)]"


def step(name: str, *argv: str) -> study_steps.Step:
    return study_steps.Step(name, (sys.executable, *argv))


def script(folder: Path, name: str, text: str) -> str:
    """A command of its own, with flags as our commands have them."""
    path = folder / f"{name}.py"
    path.write_text("import sys\nfrom absl import app, flags\nVALUE = flags.DEFINE_string('value', None, '')\n"
                    f"def main(_):\n    {text}\nif __name__ == '__main__':\n    app.run(main)\n")
    return str(path)


def ended(worker: Worker) -> int:
    """The exit code of what a worker does, at most a minute later."""
    until = time.monotonic() + 60
    while (code := worker.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return code


def test_a_worker_does_commands_one_after_the_other_as_if_each_were_typed(tmp_path):
    says = script(tmp_path, "says", "print(VALUE.value, end='')")
    fails = script(tmp_path, "fails", "sys.exit(3)")
    dies = script(tmp_path, "dies", "import os; os.abort()")
    worker, codes = Worker(), []
    with study_steps.claimed(tmp_path, "step") as claim:
        for number, argv in enumerate(([says, "--value=a"], [fails], [says, "--value=b"], [says], [dies])):
            worker.begin(step(str(number), *argv), tmp_path, claim)
            codes.append(ended(worker))
    worker.close(60)
    assert codes == [0, 3, 0, 0, -signal.SIGABRT]
    assert [(tmp_path / "logs" / f"{i}.log").read_text() for i in (0, 2, 3)] == ["a", "b", "None"]
    assert sorted(note.stem for note in (tmp_path / "done").iterdir()) == ["0", "2", "3"]


def test_a_step_is_claimed_by_one_process_and_stays_claimed_while_its_command_runs(tmp_path):
    gate = tmp_path / "gate"
    worker = Worker()
    with study_steps.claimed(tmp_path, "waits") as claim, study_steps.claimed(tmp_path, "waits") as second:
        assert claim is not None and second is None
        worker.begin(step("waits", script(tmp_path, "waits", WAITS), f"--value={gate}"), tmp_path, claim)
    with study_steps.claimed(tmp_path, "waits") as while_it_runs:
        assert while_it_runs is None
    gate.touch()
    assert ended(worker) == 0
    with study_steps.claimed(tmp_path, "waits") as afterwards:
        assert afterwards is not None
    worker.close(60)


GIVES_WORK_AND_WAITS = '''
import sys, time
sys.path[:0] = [{launch!r}]
import study_steps
from study_worker import Worker
from pathlib import Path
folder = Path({folder!r})
with study_steps.claimed(folder, "waits") as claim:
    worker = Worker()
    worker.begin(study_steps.Step("waits", tuple({argv!r})), folder, claim)
    print("begun", flush=True)
    time.sleep(60)
'''


def test_what_a_worker_does_counts_even_if_the_study_that_gave_the_work_is_killed(tmp_path):
    gate = tmp_path / "gate"
    waits = step("waits", script(tmp_path, "waits", WAITS), f"--value={gate}")
    text = GIVES_WORK_AND_WAITS.format(launch=str(ROOT / "launch"), folder=str(tmp_path), argv=waits.argv)
    study = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert study.stdout.readline() == b"begun\n"
    until = time.monotonic() + 60
    while (who := study_steps.signed_by(tmp_path, "waits")).split()[1] == str(study.pid):  # the worker is starting
        assert time.monotonic() < until
        time.sleep(0.02)
    study.kill()
    study.communicate()
    assert who.startswith("process ") and not waits.is_done(tmp_path)
    with study_steps.claimed(tmp_path, "waits") as claim:
        assert claim is None
    gate.touch()
    while not waits.is_done(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_study_says_how_much_is_done_and_for_whom_it_waits(tmp_path, capsys):
    first, second = step("first", "a.py"), step("second", "b.py")
    third = study_steps.Step("third", (sys.executable, script(tmp_path, "third", "pass")), needs=("second",))
    first.mark_done(tmp_path, 1.0)
    one = study.Study(study_config.get_config("demo"), tmp_path, jobs=1)

    def plan(*_):
        if one.elsewhere and not second.is_done(tmp_path):  # it has said for whom it waits
            second.mark_done(tmp_path, 1.0)
            elsewhere.close()
        return [first, second, third]

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as elsewhere:
        patch.setattr(study_plan, "plan", plan)
        patch.setattr(study, "LOOK_SECONDS", 0.1)
        elsewhere.enter_context(study_steps.claimed(tmp_path, "second"))
        assert one.to_the_end() == (3, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 3 steps known so far are done"
    assert lines[1].startswith(f"second is at work in process {os.getpid()} on ") and lines[1].endswith("; waiting")
    assert lines[2].startswith("[2/3] second") and lines[2].endswith("waited for another process")
    assert lines[3] == "third ..." and lines[-1].startswith("[3/3] third")


def test_a_step_at_work_is_told_at_growing_intervals(tmp_path, capsys):
    one = study.Study(study_config.get_config("demo"), tmp_path, jobs=1)
    one.elsewhere = {"train": study.Clock(), "older": study.Clock(time.monotonic() - 61)}
    log = study_steps.log_of(tmp_path, "older")
    log.parent.mkdir()
    log.write_text("step 20 loss 0.7\n\n")
    one._say_how_far()
    one._say_how_far()
    assert capsys.readouterr().out == "older ... 61 s  step 20 loss 0.7\n"
    assert one.elsewhere["older"].tell_after == 120


def test_a_name_that_is_no_arm_or_fault_is_told_with_its_field(tmp_path):
    result = run("--config=configs/study.py:demo", "--config.arms=full,lorra", "--dry_run")
    assert result.returncode == 1
    assert result.stderr.startswith("error: config.arms names 'lorra'; known: conv_adapter, ")
    assert result.stderr.count("\n") == 1
    config = study_config.get_config("simulated")
    config.few_shot.arms = ("fulll",)
    with pytest.raises(ValueError, match="config.few_shot.arms names 'fulll'"):
        study_check.check_names(config)
    config = study_config.get_config("simulated")
    study_check.check_names(config)
    config.ablations = ("squezed",)
    with pytest.raises(ValueError, match="config.ablations names 'squezed'; known: permuted_channels, squeezed"):
        study_check.check_names(config)


def test_expected_results_are_read_before_the_work(tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    for file, words in (("none.json", "no such file"), ("empty.json", "holds no results of a study")):
        result = run("--config=configs/study.py:demo", f"--workdir={tmp_path / 'study'}",
                     f"--expected={tmp_path / file}")  # fmt: skip
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "study").exists()


def test_a_study_without_data_says_in_one_line_what_to_do(tmp_path):
    result = run("--config=configs/study.py:real", f"--workdir={tmp_path / 'study'}")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "--config.source.root" in result.stderr


def test_a_failing_step_ends_the_study_with_its_name_its_message_and_its_command(tmp_path):
    for name in ("empty", "empty too"):
        (tmp_path / name).mkdir()
    result = run(
        "--config=configs/study.py:real", f"--workdir={tmp_path / 'study'}", "--config.ablations=()",
        f"--config.source.root={tmp_path / 'empty'}", f"--config.target.root={tmp_path / 'empty too'}",
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step 'preprocess_source' ended with exit code 1")
    assert "no BraTS case" in last and "launch/preprocess.py" in last
