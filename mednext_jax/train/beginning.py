"""How a run begins: anew, or from the newest checkpoint of its workdir."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mednext_jax import modeldir
from mednext_jax.train import experiment, network, workdir
from mednext_jax.train.checkpoints import Checkpoints
from mednext_jax.train.step import TrainState

BASE = "base"


@dataclasses.dataclass
class Progress:
    """What the loop remembers beside the training state; plain JSON, part of every checkpoint.

    Attributes:
      base_hash: of the parameters the run began with.
      best_score, best_step: of the best validation so far; None before the first.
      stale: validations since then.
      validated_step: the last step that was validated.
      scores: of that validation.
      window: metrics of the steps since the last log line.
      plateau: state of the plateau rule.
    """

    base_hash: str
    best_score: float | None = None
    best_step: int = 0
    stale: int = 0
    validated_step: int = 0
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    window: list[dict[str, float]] = dataclasses.field(default_factory=list)
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, getattr(field.type, "__origin__", field.type)):  # of dict[str, float]: dict
                raise TypeError(f"{field.name} is {value!r}")

    def written(self, step: int) -> tuple[int, int]:
        """Last step whose validation, and whose line of means, was in the log when ``step`` was saved."""
        return self.validated_step, step - bool(self.window)


class Beginning(NamedTuple):
    """Everything at the first step of this process; ``state`` is on the host."""

    parts: experiment.Experiment
    state: TrainState
    progress: Progress
    report: list[str]


def begin(
    config: Mapping[str, Any],
    data: experiment.Data,
    folder: Path,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
) -> Beginning:
    """Resumes if the workdir holds a complete checkpoint, starts anew otherwise.

    Raises: ValueError or FileNotFoundError if config, data or files do not fit; nothing was changed then.
    """
    steps = checkpoints.steps()
    if not steps:
        if config["resume_step"]:
            raise FileNotFoundError(
                f"config.resume_step is {config['resume_step']}, but {folder} has no checkpoint"
            )
        return _begin_anew(config, data, folder, mesh)
    return _resume(config, data, folder, checkpoints, mesh, config["resume_step"] or steps[-1])


def _begin_anew(config: Mapping, data: experiment.Data, folder: Path, mesh: jax.sharding.Mesh) -> Beginning:
    start = network.start(config, data.contract)
    parts = experiment.build(config, start, mesh)
    info = dataclasses.replace(
        start.info, provenance={"init_from": config["init_from"], "new": sorted(start.new)}
    )
    base_hash = modeldir.params_hash(start.params)
    if jax.process_index() == 0:
        modeldir.save_model(folder / BASE, info, start.params)
        workdir.write_json(folder / workdir.CONFIG_FILE, config)
        workdir.write_json(folder / workdir.ENVIRONMENT_FILE, workdir.environment() | _described(data))
    return Beginning(parts, experiment.initial_state(config, parts), Progress(base_hash), start.report)


def _resume(
    config: Mapping,
    data: experiment.Data,
    folder: Path,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    step: int,
) -> Beginning:
    records = checkpoints.records(step)
    workdir.check_same_config(records["config"], config, folder)
    try:
        progress = Progress(**records["progress"])
    except TypeError as error:
        raise checkpoints.damaged(step, f"its record progress does not fit: {error}") from error
    info, params = modeldir.load_model(folder / BASE)
    modeldir.check_channels(info, data.contract.channels, data.contract.normalization)
    if info.params_hash != progress.base_hash:
        raise ValueError(f"{folder / BASE} is not the base that the checkpoints of {folder} were trained on")
    parts = experiment.build(config, network.Start(info, params, frozenset(info.provenance["new"]), []), mesh)
    state = checkpoints.restore(experiment.initial_state(config, parts), step)
    data.stream.set_state(records["data"])
    checkpoints.discard_after(step)
    if jax.process_index() == 0:
        workdir.write_json(folder / workdir.CONFIG_FILE, config)
        workdir.write_json(folder / workdir.ENVIRONMENT_FILE, workdir.environment() | _described(data))
    return Beginning(parts, state, progress, [f"resumed {folder} at step {step}"])


def _described(data: experiment.Data) -> dict[str, Any]:
    """The data by name and hashes: all of the stream's state but the position."""
    state = {name: value for name, value in data.stream.get_state().items() if name != "next_index"}
    return {"data": {"name": data.name, **state}}
