"""The steps of a study: which command makes what, in order. Nothing is run here."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import atomic, cohorts
from data_pipeline.store import Store

LAUNCH = Path(__file__).resolve().parent
CONFIGS = LAUNCH.parent / "configs"
COHORTS = ("source", "target")
ZERO_SHOT = "zero_shot"
SIMULATED = "Simulated data: these numbers say that the software works, nothing about patients."


@dataclass(frozen=True)
class Step:
    """One command of the study.

    Attributes:
      name: unique; also the name of the note that says it is done.
      argv: the command.
      prepare: what has to be there before it runs.
    """

    name: str
    argv: tuple[str, ...]
    prepare: Callable[[], None] = lambda: None

    def shown(self) -> str:
        """The command as one would type it."""
        return shlex.join(["python", *self.argv[1:]])

    def _note(self, folder: Path) -> Path:
        return folder / "done" / f"{self.name}.json"

    def is_done(self, folder: Path) -> bool:
        """Whether the step is done, by this very command.

        Raises:
          ValueError: it was done by another command.
        """
        note = self._note(folder)
        if not note.is_file():
            return False
        if json.loads(note.read_text())["command"] != list(self.argv[1:]):
            raise ValueError(f"step {self.name!r} in {folder} was done by another command (see {note}); use a new "
                             "--workdir, or remove the note to do the step again")
        return True

    def mark_done(self, folder: Path, seconds: float) -> None:
        """Leaves a note that the step is done."""
        self._note(folder).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(self._note(folder), {"command": list(self.argv[1:]), "seconds": round(seconds, 1)})


def report(folder: Path) -> Path:
    """The page to read at the end."""
    return folder / "evaluation" / "report.html"


def launcher(name: str, *flags: str) -> tuple[str, ...]:
    """``python launch/<name>.py --flag ...``."""
    return (sys.executable, str(LAUNCH / f"{name}.py"), *(f"--{flag}" for flag in flags))


def root_of(config, folder: Path, cohort: str) -> Path:
    """The cohort's raw folder.

    Raises:
      ValueError: the config names none and does not simulate.
    """
    if config[cohort].root:
        return Path(config[cohort].root)
    if not config.simulate.enabled:
        raise ValueError(f"no data: give --config.{cohort}.root=FOLDER of BraTS cases as downloaded, or use the "
                         "variant configs/study.py:demo, which simulates both cohorts")
    return folder / "cohorts" / cohort


def is_simulated(config) -> bool:
    """Whether any cohort of the study is simulated."""
    return config.simulate.enabled and any(not config[cohort].root for cohort in COHORTS)


def count(config) -> int:
    """Number of steps."""
    per_seed = (0 if config.pretrain.init_from else 1) + 2 + 2 * len(config.arms)
    return (1 if is_simulated(config) else 0) + len(COHORTS) + per_seed * len(config.seeds) + 2


def steps(config, folder: Path) -> Iterator[Step]:
    """Every step in order. Later ones are drawn up when earlier ones are done: they read what those wrote."""
    if is_simulated(config):
        yield _simulate(config, folder)
    for cohort in COHORTS:
        yield _preprocess(config, folder, cohort)
    source_runs, target_runs = {}, {}
    for seed in config.seeds:
        base = config.pretrain.init_from
        if not base:
            base = str(folder / "runs" / f"pretrain@{seed}")
            yield _train(config, folder, f"pretrain@{seed}", "pretrain", "source", config.pretrain.overrides, seed)
        for cohort, runs in (("source", source_runs), ("target", target_runs)):
            runs[f"{ZERO_SHOT}@{seed}"] = folder / "predictions" / cohort / f"{ZERO_SHOT}@{seed}"
            yield _predict(config, folder, cohort, f"{ZERO_SHOT}@{seed}", base)
        for arm, file, overrides in config.arms:
            run = f"{arm}@{seed}"
            init = () if file == "scratch" else (f"init_from={base}",)
            yield _train(config, folder, run, file, "target", (*init, *overrides), seed)
            target_runs[run] = folder / "predictions" / "target" / run
            yield _predict(config, folder, "target", run, str(folder / "runs" / run))
    yield _evaluate(config, folder, "source", source_runs, "evaluation_source")
    yield _evaluate(config, folder, "target", target_runs, "evaluation")


def _simulate(config, folder: Path) -> Step:
    s = config.simulate
    which = "both" if all(not config[c].root for c in COHORTS) else next(c for c in COHORTS if not config[c].root)
    argv = launcher(
        "simulate", f"output={folder / 'cohorts'}", f"which={which}", f"source_cases={s.source_cases}",
        f"target_cases={s.target_cases}", f"spacing_mm={s.spacing_mm}", f"seed={s.seed}",
    )  # fmt: skip
    return Step("simulate", argv)


def _store(folder: Path, cohort: str) -> Path:
    return folder / "stores" / cohort


def _preprocess(config, folder: Path, cohort: str) -> Step:
    c = config[cohort]
    flags = [f"input={root_of(config, folder, cohort)}", f"output={_store(folder, cohort)}", f"seed={c.split_seed}"]
    if c.splits:
        flags.append(f"splits={c.splits}")
    else:
        flags += [f"val_fraction={c.val_fraction}", f"test_fraction={c.test_fraction}"]
    return Step(f"preprocess_{cohort}", launcher("preprocess", *flags))


def _train(config, folder: Path, run: str, file: str, cohort: str, overrides, seed: int) -> Step:
    variant = f":{config.variant}" if config.variant else ""
    fields = (f"data.store={_store(folder, cohort)}", f"seed={seed}", f"data.subset_seed={seed}", *overrides)
    argv = launcher(
        "train", f"config={CONFIGS / file}.py{variant}", f"workdir={folder / 'runs' / run}",
        *(f"config.{field}" for field in fields),
    )  # fmt: skip
    return Step(f"train_{run}", argv)


def _test_cases(folder: Path, cohort: str) -> Path:
    return folder / "test_cases" / cohort


def _predict(config, folder: Path, cohort: str, run: str, model: str) -> Step:
    p = config.predict
    flags = [
        f"model={model}", f"input={_test_cases(folder, cohort)}", f"overlap={p.overlap}",
        f"output={folder / 'predictions' / cohort / run}",
    ]  # fmt: skip
    if p.flips:
        flags.append("flips")
    if p.thresholds:
        flags.append(f"thresholds={','.join(p.thresholds)}")
    prepare = lambda: _link_test_cases(root_of(config, folder, cohort), _store(folder, cohort),  # noqa: E731
                                       _test_cases(folder, cohort))
    return Step(f"predict_{cohort}_{run}", launcher("predict", *flags), prepare)


def _link_test_cases(root: Path, store: Path, target: Path) -> None:
    """Makes ``target`` hold one folder of links per test case, so that other tools see just these cases.

    Raises:
      ValueError: the store has no test cases.
    """
    wanted = set(Store(store).split("test"))
    if not wanted:
        raise ValueError(f"{store} has no test cases; raise test_fraction or give a splits file with a list 'test'")
    for case in cohorts.scan(root):
        if case.case_id not in wanted:
            continue
        (target / case.case_id).mkdir(parents=True, exist_ok=True)
        for file in (*case.images.values(), case.segmentation):
            link = target / case.case_id / file.name
            if not link.exists():
                link.symlink_to(file.resolve())


def _evaluate(config, folder: Path, cohort: str, runs: dict[str, Path], name: str) -> Step:
    note = config.note or (SIMULATED if is_simulated(config) else "")
    argv = launcher(
        "evaluate", *(f"predictions={run}={path}" for run, path in runs.items()),
        f"references={_test_cases(folder, cohort)}", f"output={folder / name}", f"note={note}",
    )  # fmt: skip
    return Step(f"evaluate_{cohort}", argv)
