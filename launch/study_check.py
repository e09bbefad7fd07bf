"""What a study's config must be, told before anything runs: a protocol binds the study to it for days."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_cohorts as cohorts
import study_cost
import study_runs as runs

from data_pipeline.labels import REGIONS
from mednext_jax.infer.postprocess import PostProcess, by_region
from mednext_jax.study import protocol

RULES = ("thresholds", "min_component_mm3")  # of post-processing


def split_names(config: Any) -> None:
    """Makes two names of the one that ``--config.arms=full,lora`` is read as, and texts of numbers among rules."""
    lists = ((config, "arms"), (config, "ablations"), (config.few_shot, "arms"), (config.ablation, "arms"))
    for section, field in (*lists, *((config.predict, rule) for rule in RULES)):
        section[field] = tuple(name for value in section[field] for name in str(value).split(","))


def check(config: Any, folder: Path) -> None:
    """Raises ValueError for a config that no study can have, or not the one in ``folder``."""
    check_config(config)
    for cohort in cohorts.NAMES:
        cohorts.check(config, cohort)
    given = [os.path.realpath(config[cohort].root or config[cohort].store) for cohort in cohorts.NAMES
             if config[cohort].root or config[cohort].store]  # fmt: skip
    if len(given) == 2 and given[0] == given[1]:
        raise ValueError(f"source and target are both {given[0]}: what is tested would have been trained on")
    protocol.check(folder, config.to_dict())


def check_config(config: Any) -> None:
    """Raises ValueError or OSError for names, numbers, stores, weights or runs that no study can have."""
    check_names(config)
    _check_numbers(config)
    _check_rules(config)
    cohorts.check_stores(config)
    study_cost.check_runs(config)
    study_cost.check_networks(config)


def check_names(config: Any) -> None:
    """Raises ValueError for an arm or fault that there is not, or that is named twice."""
    arms = {"arms": config.arms, "few_shot.arms": config.few_shot.arms, "ablation.arms": config.ablation.arms}
    for field, names in arms.items():
        for name in names:
            if name not in config.recipes:
                raise ValueError(f"config.{field} names {name!r}; known: {', '.join(config.recipes)}")
        _check_once(field, names)
    for name in config.ablations:
        if name not in runs.FAULTS:
            raise ValueError(f"config.ablations names {name!r}; known: {', '.join(runs.FAULTS)}")
    _check_once("ablations", config.ablations)
    if not config.arms:
        raise ValueError("config.arms names no arm")
    if config.ablations and len(config.ablation.arms) != 2:
        raise ValueError("config.ablation.arms must name two arms, full fine-tuning and an adapter to compare with it")


def _check_once(field: str, values: Sequence) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"config.{field} has {value!r} more than once")


def _check_numbers(config: Any) -> None:
    for field in ("subset_seeds", "init_seeds", "order_seeds"):
        if not config[field]:
            raise ValueError(f"config.{field} needs a value")
        _check_once(field, config[field])
    if len(config.order_seeds) > len(config.init_seeds):
        raise ValueError(f"config.order_seeds has {len(config.order_seeds)} values, config.init_seeds "
                         f"{len(config.init_seeds)}: each goes with one init seed, the others would never be used")
    least = {
        "rates.trials": 1, "rates.subsets": 1, "rates.tolerance": 0, "few_shot.replicates": 1, "ablation.replicates": 1,
        "ablation.validations": 1, "steps_per_process": 1, "max_train_cases": 0,
    }  # fmt: skip
    for field, smallest in least.items():
        section, _, name = field.rpartition(".")
        value = (config[section] if section else config)[name]
        if not value >= smallest:
            raise ValueError(f"config.{field} is {value}; it must be at least {smallest}")
    if not config.rates.factor > 1:
        raise ValueError(f"config.rates.factor is {config.rates.factor}; it must be greater than 1")
    if config.rates.max_trials < config.rates.trials:
        raise ValueError(f"config.rates.max_trials is {config.rates.max_trials}, smaller than the first grid, "
                         f"config.rates.trials={config.rates.trials}")
    _check_once("few_shot.sizes", config.few_shot.sizes)
    for size in config.few_shot.sizes:
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"config.few_shot.sizes has {size!r}; numbers of training cases are wanted")


def _check_rules(config: Any) -> None:
    """How test cases will be predicted: told then, it would be too late."""
    if not 0 <= config.predict.overlap < 1:
        raise ValueError(f"config.predict.overlap is {config.predict.overlap}; it must be at least 0 and below 1")
    rules = {rule: by_region(f"config.predict.{rule}", list(config.predict[rule]), list(REGIONS))
             for rule in RULES if config.predict[rule]}  # fmt: skip
    PostProcess(**rules).check(REGIONS)
