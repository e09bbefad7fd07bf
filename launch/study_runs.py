"""The training runs of a study: which config, which data, which seeds. Each is a command of launch/train.py."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from study_steps import LAUNCH

from mednext_jax.study import rates

CONFIGS = LAUNCH.parent / "configs"
ZERO_SHOT = "zero_shot"
CLEAN = ""
FAULTY_DATA = {"permuted_channels": "permuted", "squeezed": "squeezed", "joint_normalization": "joint"}
PRETRAINED_AGAIN = ("squeezed", "joint")  # faults that pre-training has too
FAULTS = (*FAULTY_DATA, "selection_by_label1", "legacy_adapters", "resumed_full")
LEGACY_ARMS = ("paper_sequential", "paper_parallel")
TRIALS = "trials/"  # in front of the names of runs that try a learning rate
FIRST_TUNING_SEED = 1000  # of tuning subsets: no replicate uses it


class Seeds(NamedTuple):
    """What one repetition of an arm depends on."""

    subset: int
    init: int
    order: int


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      name: also its folder below ``runs``.
      file: config file of ``configs``.
      overrides: ``field=value`` of its config.
      cohort: "source" or "target".
      data: fault of the data, "" for none.
      base: name of the run it starts from; "" for a fresh network, None for the given weights.
      seeds: of this repetition.
    """

    name: str
    file: str
    overrides: tuple[str, ...]
    cohort: str
    data: str
    base: str | None
    seeds: Seeds


def replicates(config: Any, cases: int | None = None) -> list[Seeds]:
    """The seeds of each repetition of an arm that trains on ``cases`` target cases; None: on the main comparison's.

    With 0, all cases, there is one subset: repetitions that differed by its seed alone would be one and the same.
    The first few, which few-shot curve and faults take, differ in every seed.
    """
    pairs = [(init, config.order_seeds[i % len(config.order_seeds)]) for i, init in enumerate(config.init_seeds)]
    subsets = config.subset_seeds if (config.max_train_cases if cases is None else cases) else config.subset_seeds[:1]
    if not pairs or not subsets:
        return []
    if config.crossed:
        return [Seeds(subset, *pairs[(i + shift) % len(pairs)])
                for shift in range(len(pairs)) for i, subset in enumerate(subsets)]  # fmt: skip
    count = max(len(subsets), len(pairs))
    return [Seeds(subsets[r % len(subsets)], *pairs[r % len(pairs)]) for r in range(count)]


def zero_shot_init(config: Any, seeds: Seeds) -> int:
    """The init seed by which the network is known that a repetition starts from: given weights are one network."""
    return replicates(config)[0].init if config.pretrain.init_from else seeds.init


def levels(config: Any) -> list[tuple[int, int]] | None:
    """Subset and initial weights of every repetition, if seeds are crossed; None if no two share their subset."""
    return [(seeds.subset, seeds.init) for seeds in replicates(config)] if config.crossed else None


def few_shot_arms(config: Any) -> list[str]:
    """The arms of the few-shot curve that the study has."""
    return [name for name in config.few_shot.arms if name in config.arms]


def few_shot_sizes(config: Any) -> tuple[int, ...]:
    """Numbers of target cases that are trained on beside the main comparison's."""
    if not few_shot_arms(config):
        return ()
    return tuple(size for size in config.few_shot.sizes if size != config.max_train_cases)


def faults(config: Any) -> list[str]:
    """The faults that arms and weights of the study allow to put in."""
    return [fault for fault in config.ablations if not _obstacle(config, fault)]


def left_out(config: Any) -> list[str]:
    """A sentence on everything that the config asks for and the chosen arms or the given weights rule out."""
    said = []
    if config.few_shot.sizes and not few_shot_arms(config):
        said.append(f"No few-shot curve: config.arms has none of {', '.join(config.few_shot.arms)}.")
    reasons: dict[str, list[str]] = {}
    for fault in config.ablations:
        if reason := _obstacle(config, fault):
            reasons.setdefault(reason, []).append(fault)
    return said + [f"Not put in: {', '.join(names)}: {reason}." for reason, names in reasons.items()]


def _obstacle(config: Any, fault: str) -> str:
    """Why a fault cannot be put in; empty if it can."""
    if lacking := [name for name in config.ablation.arms if name not in config.arms]:
        return f"faults are compared by {' and '.join(config.ablation.arms)}, and config.arms lacks {lacking[0]}"
    if config.pretrain.init_from and FAULTY_DATA.get(fault) in PRETRAINED_AGAIN:
        return "pre-training has this fault too, and config.pretrain.init_from gives its weights"
    if fault == "legacy_adapters" and not set(LEGACY_ARMS) & set(config.arms):
        return f"config.arms has none of {', '.join(LEGACY_ARMS)}"
    if fault == "resumed_full" and "full" not in config.arms:
        return "config.arms lacks full"
    return ""


def pretrained(config: Any, init: int, data: str = CLEAN) -> str | None:
    """Name of the pre-training run that an arm starts from; None if weights are given."""
    if config.pretrain.init_from:
        return None
    return f"{data + '.' if data in PRETRAINED_AGAIN else ''}pretrain@{init}"


def pretrainings(config: Any) -> Iterator[Run]:
    """One pre-training per init seed, and again for faults of the data that it has too."""
    if config.pretrain.init_from:
        return
    for data in (CLEAN, *(data for data in faulty_data(config) if data in PRETRAINED_AGAIN)):
        used = replicates(config)[: config.ablation.replicates if data else None]
        for init in sorted({seeds.init for seeds in used}):
            yield Run(pretrained(config, init, data), "pretrain", _patch(config, data, config.pretrain.overrides),
                      "source", data, "", Seeds(0, init, init))  # fmt: skip


def faulty_data(config: Any) -> list[str]:
    """The faulty versions of the cohorts that the ablations need."""
    return [FAULTY_DATA[fault] for fault in faults(config) if fault in FAULTY_DATA]


def arm(config: Any, name: str, arm_name: str, seeds: Seeds, extra: tuple[str, ...] = (), data: str = CLEAN) -> Run:
    """One run of an arm."""
    recipe = config.recipes[arm_name]
    base = "" if recipe.file == "scratch" else pretrained(config, seeds.init, data)
    overrides = (f"data.max_train_cases={config.max_train_cases}", *recipe.overrides, *config.overrides, *extra)
    return Run(name, recipe.file, _patch(config, data, overrides), "target", data, base, seeds)


def own_rate(config: Any, arm_name: str) -> float:
    """The learning rate of an arm's config file, the centre of its grid."""
    recipe = config.recipes[arm_name]
    for override in reversed((*recipe.overrides, *config.overrides)):
        if override.startswith("optim.peak_lr="):
            return float(override.partition("=")[2])
    module = importlib.import_module(f"configs.{recipe.file}")
    return module.get_config(config.variant or None).optim.peak_lr


def trial_rate(config: Any, arm_name: str, trial: int) -> float:
    """The learning rate of a trial."""
    return rates.rate(own_rate(config, arm_name), config.rates.factor, trial)


def trial_runs(config: Any, arm_name: str, trial: int) -> list[Run]:
    """The runs whose validation scores judge one learning rate."""
    rate = trial_rate(config, arm_name, trial)
    # A rate may be too high to train at all: that is a bad score, not the end of the study.
    extra = (f"optim.peak_lr={rate}", "max_bad_steps=1000000000", *config.rates.overrides)
    inits = [seeds.init for seeds in replicates(config)]
    return [
        arm(config, f"{TRIALS}{arm_name}@{trial}@{i}", arm_name,
            Seeds(FIRST_TUNING_SEED + i, inits[i % len(inits)], FIRST_TUNING_SEED + i), extra)
        for i in range(config.rates.subsets)
    ]  # fmt: skip


def trial_scores(config: Any, folder: Path, arm_name: str) -> dict[int, float]:
    """Validation score of every trial whose runs are all finished, mean over its subsets."""
    scores: dict[int, float] = {}
    for trial in range(-config.rates.max_trials, config.rates.max_trials + 1):
        files = [folder / "runs" / run.name / "result.json" for run in trial_runs(config, arm_name, trial)]
        if all(file.is_file() for file in files):
            found = [json.loads(file.read_text())["best_score"] for file in files]
            scores[trial] = sum(float("nan") if s is None else s for s in found) / len(found)
    return scores


def final_runs(config: Any, learning_rates: dict[str, float]) -> list[Run]:
    """Every arm and repetition of the main comparison."""
    return [
        arm(config, f"{name}@{r}", name, seeds, (f"optim.peak_lr={learning_rates[name]}",))
        for name in config.arms
        for r, seeds in enumerate(replicates(config))
    ]


def few_shot_runs(config: Any, learning_rates: dict[str, float]) -> list[Run]:
    """The curve over the number of target cases, beside the main comparison's number."""
    return [
        arm(config, f"{name}_n{size}@{r}", name, seeds,
            (f"optim.peak_lr={learning_rates[name]}", f"data.max_train_cases={size}"))
        for size in few_shot_sizes(config)
        for name in few_shot_arms(config)
        for r, seeds in enumerate(replicates(config, size)[: config.few_shot.replicates])
    ]  # fmt: skip


def ablation_runs(config: Any, learning_rates: dict[str, float]) -> list[Run]:
    """The arms again, with one fault of the released study each."""
    found = []
    repeated = list(enumerate(replicates(config)[: config.ablation.replicates]))

    def add(fault: str, arms, extra=(), data=CLEAN) -> None:
        for name in arms:
            rate = (f"optim.peak_lr={learning_rates[name]}",)
            found.extend(arm(config, f"{fault}.{name}@{r}", name, seeds, (*rate, *extra), data)
                         for r, seeds in repeated)  # fmt: skip

    for fault in faults(config):
        if fault in FAULTY_DATA:
            add(fault, config.ablation.arms, data=FAULTY_DATA[fault])
        elif fault == "selection_by_label1":
            every = max(1, _total_steps(config) // config.ablation.validations)
            add("selection_by_mean", config.ablation.arms, (f"eval.every={every}",))
            add(fault, config.ablation.arms, (f"eval.every={every}", "eval.score=label1"))
        elif fault == "legacy_adapters":
            add(fault, [name for name in LEGACY_ARMS if name in config.arms], ("peft.legacy=True",))
        else:  # resumed_full
            left = own_rate(config, "full") * config.ablation.rate_decay
            add(fault, ("full",), (f"optim.peak_lr={left}", "optim.schedule=constant", "optim.warmup_steps=0"))
    return found


def _total_steps(config: Any) -> int:
    for override in reversed(config.overrides):
        if override.startswith("optim.total_steps="):
            return int(override.partition("=")[2])
    module = importlib.import_module("configs.full")
    return module.get_config(config.variant or None).optim.total_steps


def _patch(config: Any, data: str, overrides) -> tuple[str, ...]:
    """Squeezed volumes are seen whole, as the released study did."""
    if data != "squeezed":
        return tuple(overrides)
    size = ",".join(str(16 * -(-voxels // 16)) for voxels in config.ablation.squeezed_voxels)
    return (*overrides, f"data.patch_voxels={size}")


def command(run: Run, config: Any, folder: Path, store: Path) -> tuple[str, ...]:
    """Arguments of launch/train.py."""
    variant = f":{config.variant}" if config.variant else ""
    init = () if run.base == "" else (f"init_from={config.pretrain.init_from or folder / 'runs' / run.base}",)
    fields = (
        f"data.store={store}", f"seed={run.seeds.init}", f"data.subset_seed={run.seeds.subset}",
        f"data.order_seed={run.seeds.order}", *init, *run.overrides,
    )  # fmt: skip
    last = dict(field.split("=", 1) for field in fields)  # a tuple that is given twice would be joined
    return (f"config={CONFIGS / run.file}.py{variant}", f"workdir={folder / 'runs' / run.name}",
            *(f"config.{name}={value}" for name, value in last.items()))
