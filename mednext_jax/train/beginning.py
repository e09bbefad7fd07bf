"""How a run begins: anew, or from the newest checkpoint of its workdir."""

import dataclasses
import hashlib
import json
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
      base_hash: of the parameters the run began with, and ``described_hash`` of what else is in its ``base``.
      validation_hash: of the names of the validation cases: scores of other cases cannot be compared.
      went_back_to: the step of ``config.resume_step``, if this state comes after going back to it.
      best_score, best_step: of the best validation so far; None before the first.
      stale: validations since then.
      validated_step: the last step that was validated.
      scores: of that validation.
      window: metrics of the steps since the last log line.
      plateau: state of the plateau rule.
    """

    base_hash: str
    described_hash: str
    validation_hash: str
    went_back_to: int = 0
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
    step, wanted = steps[-1], config["resume_step"]
    if wanted and not _went_back(checkpoints, step, wanted):
        step = wanted
    return _resume(config, data, folder, checkpoints, mesh, step)


def _went_back(checkpoints: Checkpoints, newest: int, wanted: int) -> bool:
    """Whether the newest step comes after going back to the wanted one: the same command again then goes on."""
    try:
        return checkpoints.records(newest)["progress"].get("went_back_to") == wanted
    except ValueError:  # it is damaged, which is why one goes back
        return False


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described_hash(info: modeldir.ModelInfo) -> str:
    """Of all that is known about the base beside its parameters."""
    return _hash({**dataclasses.asdict(info), "params_hash": None})


def _begin_anew(config: Mapping, data: experiment.Data, folder: Path, mesh: jax.sharding.Mesh) -> Beginning:
    start = network.start(config, data.contract)
    parts = experiment.build(config, start, mesh)
    info = dataclasses.replace(
        start.info, provenance={"init_from": config["init_from"], "new": sorted(start.new)}
    )
    progress = Progress(modeldir.params_hash(start.params), _described_hash(info), _hash(sorted(data.validation)))
    if jax.process_index() == 0:
        modeldir.save_model(folder / BASE, info, start.params)
        workdir.write_json(folder / workdir.CONFIG_FILE, config)
        workdir.write_environment(folder, workdir.environment() | _described(data))
    return Beginning(parts, experiment.initial_state(config, parts), progress, start.report)


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
    put_back = f"put a copy of {folder / BASE} back as it was, or start anew in another --workdir"
    try:
        info, params = modeldir.load_model(folder / BASE)
    except (ValueError, OSError) as error:
        raise ValueError(f"the base of the run in {folder} cannot be read ({error}): {put_back}") from error
    modeldir.check_channels(info, data.contract.channels, data.contract.normalization)
    if (info.params_hash, _described_hash(info)) != (progress.base_hash, progress.described_hash):
        raise ValueError(
            f"{folder / BASE} is not the base that the run began with, weights or description differ: {put_back}"
        )
    parts = experiment.build(config, network.Start(info, params, frozenset(info.provenance["new"]), []), mesh)
    state = checkpoints.restore(experiment.initial_state(config, parts), step)
    data.stream.set_state(records["data"])
    if progress.validation_hash != _hash(sorted(data.validation)):
        raise ValueError(
            f"the validation cases are not those that the run in {folder} began with ({len(data.validation)} now): "
            "restore the splits of the store or choose another --workdir"
        )
    if step == config["resume_step"]:
        progress.went_back_to = step
    checkpoints.discard_after(step)
    report = [f"resumed {folder} at step {step}"]
    if jax.process_index() == 0:
        workdir.write_json(folder / workdir.CONFIG_FILE, config)
        report += workdir.write_environment(folder, workdir.environment() | _described(data))
    return Beginning(parts, state, progress, report)


def _described(data: experiment.Data) -> dict[str, Any]:
    """The data by name and hashes: all of the stream's state but the position."""
    state = {name: value for name, value in data.stream.get_state().items() if name != "next_index"}
    return {"data": {"name": data.name, **state}}
