"""What a study will take, before it runs: how many training runs, and their arithmetic, counted."""

import ast
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import command
import study_runs as runs
from ml_collections import ConfigDict

NETWORK = ("n_channels", "kernel_size", "block_counts", "exp_r", "grn")


def overridden(config: Any, overrides: Iterable[str]) -> Any:
    """A run's config with ``field=value`` applied, as its command line would."""
    for override in overrides:
        field, _, text = override.partition("=")
        section = config
        for name in field.split("."):
            if not isinstance(section, Mapping | ConfigDict) or name not in section:
                raise ValueError(f"the config has no field {field!r}; configs/default.py lists them")
            section = section[name]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        config.update_from_flattened_dict({field: value})
    return config


def keep_off_devices() -> None:
    """Networks are only traced in the study's own process: JAX must not take the memory of a GPU that steps need."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def settings_of(config: Any, file: str, overrides: Iterable[str]) -> Any:
    """The config of a run, but for its data and seeds."""
    settings = importlib.import_module(f"configs.{file}").get_config(config.variant or None)
    return overridden(settings.lock(), overrides)  # locked: an unknown field is an error, as on the command line


def flops(config: Any, run: runs.Run) -> float:
    """Operations of a whole run: steps times those of a step. The network is the given or the pre-trained one."""
    from mednext_jax.train import dry_run
    from mednext_jax.train.workdir import plain

    settings = settings_of(config, run.file, run.overrides)
    settings.init_from = config.pretrain.init_from if run.base is None else ""
    if run.base:
        settings.model = settings_of(config, "pretrain", config.pretrain.overrides).model
    return dry_run.cost(plain(settings)).step_flops * settings.optim.total_steps


def check_networks(config: Any) -> None:
    """Raises ValueError if an arm that starts anew trains another network than the others; OSError without weights."""
    from mednext_jax import modeldir

    keep_off_devices()
    if source := config.pretrain.init_from:
        given = modeldir.load_info(source).network()
    else:
        source, given = "pre-training", _drawn(config, "pretrain", config.pretrain.overrides)
    for name in config.arms:
        recipe = config.recipes[name]
        if recipe.file != "scratch":
            continue
        own = _drawn(config, recipe.file, (*recipe.overrides, *config.overrides))
        for field in NETWORK:
            has, wants = getattr(own, field), getattr(given, field)
            if _nine(has) != _nine(wants):
                raise ValueError(
                    f"arm {name} would train a network with {field} {has}, {source} has {wants}: "
                    f"set config.model in configs/{recipe.file}.py to the same network (model.variant for S, B, M, L, "
                    f"model.{field} else) by --config.recipes.{name}.overrides, or leave {name} out of config.arms"
                )


def _drawn(config: Any, file: str, overrides: Iterable[str]) -> Any:
    """The network that a run draws anew; its number of classes is not that of the data."""
    from mednext_jax.nn.mednext import MedNeXt
    from mednext_jax.train import network
    from mednext_jax.train.workdir import plain

    wanted = network.wanted_arguments(plain(settings_of(config, file, overrides)))
    return MedNeXt(n_classes=1, **{"kernel_size": 3, **wanted})


def check_runs(config: Any) -> None:
    """Raises ValueError for a run that training would refuse: before a protocol binds the study to its config."""
    from mednext_jax.train import experiment
    from mednext_jax.train.workdir import plain

    keep_off_devices()
    seen = set()
    for run in (run for found in groups(config).values() for run in found):
        if (kind := (run.file, run.overrides)) in seen:
            continue
        seen.add(kind)
        try:
            settings = settings_of(config, run.file, run.overrides)
            experiment.check_config(plain(settings))
            if run.name.startswith(runs.TRIALS) and not settings.eval.every:
                raise ValueError("no validation would judge it: set eval.every in config.rates.overrides")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"run {run.name} could not be trained: {command.one_line(error)}") from None


def _nine(value: Any) -> tuple:
    """A value per stage; one number stands for nine."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 9


def groups(config: Any) -> dict[str, list[runs.Run]]:
    """The runs of a study by what they are for; of the learning rates, the first grid of every arm."""
    rates = {name: runs.own_rate(config, name) for name in config.arms}
    first = range(-(config.rates.trials // 2), config.rates.trials - config.rates.trials // 2)
    trials = [run for name in config.arms for trial in first for run in runs.trial_runs(config, name, trial)]
    return {
        "pre-training": list(runs.pretrainings(config)),
        "learning rates (first grids)": trials if config.rates.trials > 1 else [],
        "arms": runs.final_runs(config, rates),
        "few-shot curve": runs.few_shot_runs(config, rates),
        "faults": runs.ablation_runs(config, rates),
    }


def report(config: Any, tflops: float) -> Iterator[str]:
    """Runs, arithmetic and hours of every part, one line each as it is counted, and of the whole.

    Args:
      tflops: 10^12 operations per second that a device sustains in training.
    """
    keep_off_devices()
    known: dict[tuple, float] = {}
    total = [0, 0.0]
    yield f"{'':30} {'runs':>5} {'PFLOP':>10} {f'hours at {tflops:g} TFLOP/s':>24}"
    for name, found in groups(config).items():
        work = 0.0
        for run in found:
            kind = (run.file, tuple(o for o in run.overrides if not o.startswith(("optim.peak_lr", "data.max_train"))))
            if kind not in known:
                known[kind] = flops(config, run)
            work += known[kind]
        yield _line(name, len(found), work, tflops)
        total = [total[0] + len(found), total[1] + work]
    yield _line("in all", *total, tflops)


def _line(name: str, count: int, work: float, tflops: float) -> str:
    hours = work / (tflops * 1e12 * 3600)
    shown = "under 0.01" if 0 < hours < 0.01 else f"{hours:.3g}"
    return f"{name:30} {count:>5} {work / 1e15:>10.4g} {shown:>24}"
