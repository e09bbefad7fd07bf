"""The steps of a study in order: data, pre-training, learning rates, protocol, runs, test, result.

``plan`` draws up what is known so far: which learning rates are tried next depends on the trials before, and what
follows on the chosen ones. Nothing is run here.
"""

from pathlib import Path
from typing import Any

import study_cohorts as cohorts
import study_result
import study_runs as runs
from study_steps import Step, launcher

from data_pipeline import atomic
from mednext_jax.study import protocol, rates

PROTOCOL, RESULT = "protocol", "result"


def plan(config: Any, folder: Path) -> list[Step]:
    """Every step that is known so far; once there is a protocol, it says which trials and learning rates there are.

    Raises: ValueError if the study's cohorts or its protocol do not allow this config.
    """
    protocol.check(folder, config.to_dict())  # another process may have fixed one just now
    fixed = protocol.read(folder)
    steps = cohorts.steps(config, folder)
    cohorts.check_cases(config, folder)  # too few of them are told before days of training
    steps += [_train(config, folder, run) for run in runs.pretrainings(config)]
    learning_rates, trials = {}, []
    for arm in config.arms:
        if config.rates.trials < 2:
            learning_rates[arm] = runs.own_rate(config, arm)
            continue
        scores = fixed.trials[arm] if fixed else runs.trial_scores(config, folder, arm)
        wanted = [] if fixed else rates.wanted(
            scores, config.rates.trials, config.rates.max_trials, config.rates.tolerance)
        trials += [(trial, run) for trial in {*scores, *wanted} for run in runs.trial_runs(config, arm, trial)]
        if fixed:
            learning_rates[arm] = fixed.learning_rates[arm]
        elif not wanted:
            learning_rates[arm] = runs.trial_rate(config, arm, rates.chosen(scores, config.rates.tolerance))
    # One trial of every arm after the other, so that processes side by side do not compile the same program.
    steps += [_train(config, folder, run) for _, run in sorted(trials, key=lambda found: found[0])]
    if len(learning_rates) < len(config.arms):
        return steps
    prepared = tuple(step.name for step in steps)
    steps.append(Step(PROTOCOL, action=lambda: _fix(config, folder, learning_rates), needs=prepared))
    final = [*runs.final_runs(config, learning_rates), *runs.few_shot_runs(config, learning_rates),
             *runs.ablation_runs(config, learning_rates)]
    trained = [_train(config, folder, run, needs=(PROTOCOL,)) for run in final]
    return steps + trained + _test(config, folder, final, (PROTOCOL, *(step.name for step in trained)))


def _train(config: Any, folder: Path, run: runs.Run, needs: tuple[str, ...] = ()) -> Step:
    base = (f"train_{run.base}",) if run.base else ()
    store, prepared = cohorts.store(config, folder, run.cohort, run.data)
    name = f"train_{run.name.replace('/', '_')}"
    return Step(name, launcher("train", *runs.command(run, config, folder, store)), needs=(*needs, *base, *prepared))


def _fix(config: Any, folder: Path, learning_rates: dict[str, float]) -> None:
    if protocol.read(folder):  # the process that fixed it ended before it could say so
        return
    trials = {arm: runs.trial_scores(config, folder, arm) for arm in config.arms if config.rates.trials >= 2}
    cases = {cohort: cohorts.test_cases(config, folder, cohort) for cohort in cohorts.NAMES}
    content = protocol.content(config.to_dict(), trials, learning_rates, cases, runs.left_out(config))
    atomic.write_json(folder / protocol.PROTOCOL_FILE, content)


def _test(config: Any, folder: Path, final: list[runs.Run], needs: tuple[str, ...]) -> list[Step]:
    """Predictions of the test cases, after all training, then evaluations and the result."""
    groups: dict[tuple[str, str, str], dict[str, Path]] = {}
    predictions = []

    def predict(name: str, model: str, cohort: str, data: str, group: str) -> None:
        where = folder / "predictions" / cohort / name
        flags, action = cohorts.prediction(config, folder, cohort, data)

        def prepare() -> None:
            _touch(config, folder)
            action()

        argv = launcher("predict", f"model={model}", f"output={where}", *flags, *_prediction_flags(config))
        predictions.append(Step(f"predict_{cohort}_{name}", argv, prepare, needs))
        groups.setdefault((group, cohort, data if data == "squeezed" else ""), {})[name] = where

    for data in (runs.CLEAN, *runs.faulty_data(config)):
        used = runs.replicates(config)[: config.ablation.replicates if data else None]
        prefix, group = (f"{data}.", "ablations") if data else ("", "main")
        for init in sorted({runs.zero_shot_init(config, seeds) for seeds in used}):
            base = runs.pretrained(config, init, data)
            model = config.pretrain.init_from or str(folder / "runs" / base)
            for cohort in cohorts.NAMES:
                if cohort == "target" or data in ("", *runs.PRETRAINED_AGAIN):
                    predict(f"{prefix}{runs.ZERO_SHOT}@{init}", model, cohort, data, group)
    main = {run.name for run in runs.final_runs(config, dict.fromkeys(config.arms, 0.0))}
    few = {run.name for run in runs.few_shot_runs(config, dict.fromkeys(config.arms, 0.0))}
    for run in final:
        group = "main" if run.name in main else "few_shot" if run.name in few else "ablations"
        predict(run.name, str(folder / "runs" / run.name), "target", run.data, group)
    evaluations = [_evaluate(config, folder, group, cohort, data, found, tuple(step.name for step in predictions))
                   for (group, cohort, data), found in groups.items()]
    result = Step(RESULT, action=lambda: study_result.write(config, folder),
                  needs=tuple(step.name for step in evaluations))  # fmt: skip
    return [*predictions, *evaluations, result]


def _touch(config: Any, folder: Path) -> None:
    cases = {cohort: cohorts.test_cases(config, folder, cohort) for cohort in cohorts.NAMES}
    atomic.write_json(folder / protocol.TEST_FILE, protocol.touch(folder, cases))


def _prediction_flags(config: Any) -> list[str]:
    p = config.predict
    flags = [f"overlap={p.overlap}", *(["flips"] if p.flips else [])]
    for name in ("thresholds", "min_component_mm3"):
        if p[name]:
            flags.append(f"{name}={','.join(p[name])}")
    return flags


def _evaluate(config, folder: Path, group: str, cohort: str, data: str, found: dict[str, Path], needs) -> Step:
    output = study_result.evaluation(folder, group, cohort, data)
    page = ("viewer_cases=3",) if group in config.pages else ("nopage",)
    argv = launcher(
        "evaluate", *(f"predictions={run}={path}" for run, path in found.items()),
        f"references={cohorts.references(config, folder, cohort, data)}", f"output={output}",
        f"note={cohorts.note(config)}", *page,
    )  # fmt: skip
    return Step(f"evaluate_{output.name}", argv, needs=needs)

