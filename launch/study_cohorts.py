"""The cohorts of a study: where they come from, their stores and test cases, and their versions with a fault."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study_runs import faults, faulty_data, few_shot_sizes
from study_steps import Step, launcher

from data_pipeline import cohorts, labels, nifti, preprocess
from data_pipeline.simulate.cohort import SIMULATOR_VERSION
from data_pipeline.store import Store

NAMES = ("source", "target")
SIMULATED = "Simulated data: these numbers say that the software works, nothing about patients."
OF_FILES = ("permuted", "squeezed")  # faults that are in the files; the other is in the preprocessing


def check(config: Any, cohort: str) -> None:
    """Raises ValueError if the config names no data of a cohort and does not simulate it."""
    c = config[cohort]
    if c.root and c.store:
        raise ValueError(f"config.{cohort}.root and config.{cohort}.store are both given: one of them is enough")
    if c.store and faults(config):
        raise ValueError(f"the ablations need raw scans: give --config.{cohort}.root=FOLDER or --config.ablations='()'")
    if not (c.root or c.store or config.simulate.enabled):
        raise ValueError(f"no data: give --config.{cohort}.root=FOLDER of BraTS cases as downloaded, or use the "
                         "variant configs/study.py:demo, which simulates both cohorts")
    if _simulates(config, cohort) and config.simulate.version != SIMULATOR_VERSION:
        raise ValueError(f"config.simulate.version is {config.simulate.version}, this simulator is version "
                         f"{SIMULATOR_VERSION}: its cohorts differ, and so would the results")
    if c.root and not Path(c.root).is_dir():
        raise ValueError(f"config.{cohort}.root={c.root} is no folder; give that of the BraTS cases")
    if c.splits and not Path(c.splits).is_file():
        raise ValueError(f"config.{cohort}.splits={c.splits} is no file; give a JSON with your splits")
    if not (c.store or c.splits):
        _check_fractions(config, cohort)


def _check_fractions(config: Any, cohort: str) -> None:
    c = config[cohort]
    if not 0 < c.test_fraction < 1:
        raise ValueError(f"config.{cohort}.test_fraction is {c.test_fraction}; a part is to be tested on")
    if not 0 <= c.val_fraction < 1 - c.test_fraction:
        raise ValueError(f"config.{cohort}.val_fraction is {c.val_fraction}; with {c.test_fraction} for testing it "
                         "must leave cases for training")


def check_stores(config: Any) -> None:
    """Raises ValueError or OSError if a given store is none, or has too few cases."""
    for cohort in NAMES:
        if config[cohort].store:
            Store(config[cohort].store)
    check_cases(config, Path())


def check_cases(config: Any, folder: Path) -> None:
    """Raises ValueError if a cohort whose store is complete has too few cases to train on, to choose by or to test."""
    for cohort in NAMES:
        if is_prepared(config, folder, cohort):
            test_cases(config, folder, cohort)
    if is_prepared(config, folder, "target"):
        training_cases(config, folder)
        _check_validation(config, folder)


def is_simulated(config: Any) -> bool:
    """Whether any cohort of the study is simulated."""
    return any(_simulates(config, cohort) for cohort in NAMES)


def note(config: Any) -> str:
    """The line on top of every report."""
    return config.note or (SIMULATED if is_simulated(config) else "")


def steps(config: Any, folder: Path) -> list[Step]:
    """Simulation, faulty versions and stores."""
    found = [_simulate(config, folder)] if is_simulated(config) else []
    for data in ("", *faulty_data(config)):
        for cohort in NAMES:
            if config[cohort].store or (data == "permuted" and cohort == "source"):
                continue
            if data in OF_FILES:
                found.append(_fault(config, folder, cohort, data))
            found.append(_preprocess(config, folder, cohort, data))
    return found


def store(config: Any, folder: Path, cohort: str, data: str) -> tuple[Path, tuple[str, ...]]:
    """The store to train on, and the step that makes it."""
    if config[cohort].store:
        return Path(config[cohort].store), ()
    return folder / "stores" / _version(cohort, data), (f"preprocess_{_version(cohort, data)}",)


def is_prepared(config: Any, folder: Path, cohort: str) -> bool:
    """Whether a cohort's store is complete."""
    return (store(config, folder, cohort, "")[0] / "dataset.json").is_file()


def test_cases(config: Any, folder: Path, cohort: str) -> list[str]:
    """The ids of a cohort's test cases.

    Raises: ValueError if there is none.
    """
    path, _ = store(config, folder, cohort, "")
    found = Store(path).split("test")
    if not found:
        raise ValueError(f"{path} has no test cases; {_other_splits(config, cohort)}")
    return list(found)


def training_cases(config: Any, folder: Path) -> list[str]:
    """The ids of the target's training cases.

    Raises: ValueError if an arm or the few-shot curve wants more than there are.
    """
    path, _ = store(config, folder, "target", "")
    held = Store(path)
    found = [case for case in held.split("train") if held.cases[case]["labelled"]]
    wanted = {"max_train_cases": config.max_train_cases, "few_shot.sizes": max(few_shot_sizes(config), default=0)}
    for field, most in wanted.items():
        if most > len(found):
            raise ValueError(f"config.{field} asks for {most} training cases, {path} has {len(found)}: give fewer "
                             f"(--config.{field}=...), or {_other_splits(config, 'target')}")
    return found


def _check_validation(config: Any, folder: Path) -> None:
    path, _ = store(config, folder, "target", "")
    held = Store(path)
    if config.rates.trials > 1 and not any(held.cases[case]["labelled"] for case in held.split("val")):
        raise ValueError(f"{path} has no validation cases to choose learning rates by: config.rates.trials=1 takes the "
                         f"config files' own, or {_other_splits(config, 'target')}")


def references(config: Any, folder: Path, cohort: str, data: str) -> Path:
    """Folder of the test cases' true segmentations, on the grid on which they are scored."""
    return folder / "test_cases" / _version(cohort, data if data == "squeezed" else "")


def prediction(config: Any, folder: Path, cohort: str, data: str) -> tuple[list[str], Callable[[], None]]:
    """Flags that give launch/predict.py the test cases, and what puts them there."""
    if config[cohort].store:
        target = references(config, folder, cohort, data)
        return [f"input={config[cohort].store}", "split=test"], lambda: _write_references(
            Path(config[cohort].store), target)
    version = _version(cohort, data if data in OF_FILES else "")
    target = folder / "test_cases" / version
    return [f"input={target}"], lambda: _link(_raw(config, folder, cohort, data), test_cases(config, folder, cohort),
                                              target)


def _other_splits(config: Any, cohort: str) -> str:
    """How to get other splits than a store has."""
    if config[cohort].store:
        return "make the store with other splits (launch/preprocess.py --test_fraction, --val_fraction or --splits)"
    return f"give other config.{cohort}.test_fraction and val_fraction, or lists as config.{cohort}.splits"


def _version(cohort: str, data: str) -> str:
    return f"{cohort}_{data}" if data else cohort


def _simulates(config: Any, cohort: str) -> bool:
    return config.simulate.enabled and not (config[cohort].root or config[cohort].store)


def _raw(config: Any, folder: Path, cohort: str, data: str) -> Path:
    if data in OF_FILES:
        return folder / "cohorts" / _version(cohort, data)
    return Path(config[cohort].root) if config[cohort].root else folder / "cohorts" / cohort


def _simulate(config: Any, folder: Path) -> Step:
    s = config.simulate
    which = "both" if all(_simulates(config, c) for c in NAMES) else next(c for c in NAMES if _simulates(config, c))
    argv = launcher(
        "simulate", f"output={folder / 'cohorts'}", f"which={which}", f"source_cases={s.source_cases}",
        f"target_cases={s.target_cases}", f"spacing_mm={s.spacing_mm}", f"seed={s.seed}",
    )  # fmt: skip
    return Step("simulate", argv)


def _fault(config: Any, folder: Path, cohort: str, data: str) -> Step:
    fault = {"permuted": "permuted_channels", "squeezed": "squeezed"}[data]
    argv = launcher(
        "fault", f"fault={fault}", f"input={_raw(config, folder, cohort, '')}",
        f"output={_raw(config, folder, cohort, data)}",
        f"voxels={','.join(map(str, config.ablation.squeezed_voxels))}",
    )  # fmt: skip
    return Step(f"fault_{_version(cohort, data)}", argv, needs=("simulate",) if _simulates(config, cohort) else ())


def _preprocess(config: Any, folder: Path, cohort: str, data: str) -> Step:
    c = config[cohort]
    path, _ = store(config, folder, cohort, data)
    flags = [f"input={_raw(config, folder, cohort, data)}", f"output={path}", f"seed={c.split_seed}"]
    if data == "joint":
        flags.append("normalization=zscore_joint")
    if c.splits:
        flags.append(f"splits={c.splits}")
    else:
        flags += [f"val_fraction={c.val_fraction}", f"test_fraction={c.test_fraction}"]
    needs = (f"fault_{_version(cohort, data)}",) if data in OF_FILES else ("simulate",) if _simulates(config, cohort) \
        else ()
    return Step(f"preprocess_{_version(cohort, data)}", launcher("preprocess", *flags), needs=needs)


def _link(root: Path, wanted: list[str], target: Path) -> None:
    """Makes ``target`` hold one folder of links per test case, so that other tools see just these cases."""
    chosen = set(wanted)
    for case in cohorts.scan(root):
        if case.case_id not in chosen:
            continue
        (target / case.case_id).mkdir(parents=True, exist_ok=True)
        for file in (*case.images.values(), case.segmentation):
            with contextlib.suppress(FileExistsError):  # another process may be making the same links
                (target / case.case_id / file.name).symlink_to(file.absolute())


def _write_references(path: Path, target: Path) -> None:
    """Writes the true segmentations of a store's test cases, each in its own space and scheme."""
    held = Store(path)
    for case_id in held.split("test"):
        file = target / f"{case_id}.nii.gz"
        if not file.exists():
            _, label, record = held.load(case_id)
            native = preprocess.restore(labels.from_canonical(label, record["label_scheme"]), record)
            file.parent.mkdir(parents=True, exist_ok=True)
            nifti.write_like(file, native, record)
