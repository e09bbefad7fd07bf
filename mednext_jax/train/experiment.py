"""From a config to the things a run is made of: network, method, loss, optimizer, step and validator."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mednext_jax import modeldir, peft
from mednext_jax.infer.sliding_window import SlidingWindow
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import DIVISOR, MedNeXt
from mednext_jax.train import augment, limits, losses, network, optimizer, schedules
from mednext_jax.train import step as train_step
from mednext_jax.train.validation import LoadCase

Flat = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    Attributes:
      stream: endless batches ``{"image" (B, D, H, W, C), "label" (B, D, H, W) int32, "batch_case_id"}``:
        this process's rows, but the ids of the whole batch; its ``get_state()`` is JSON, its ``set_state``
        refuses a state of other data.
      contract: channels, normalisation, label scheme and regions.
      validation: case ids.
      load: case id -> image (D, H, W, C), label (D, H, W).
      name: of the cohort, for the records of the run.
    """

    stream: Iterator[dict[str, np.ndarray]]
    contract: network.DataContract
    validation: Sequence[str]
    load: LoadCase
    name: str = ""


@dataclass(frozen=True)
class Experiment:
    """All parts of a run but its state.

    Attributes:
      base: the network before the method.
      method: what it adds and trains.
      model: the network that is trained, method included.
      trainable, frozen: flat dicts of initial values.
      tx: the optimizer, over ``trainable``.
      step: pure ``(state, frozen, batch, learning_rate) -> (state, metrics)``.
      window: predicts probabilities of whole volumes.
    """

    base: network.Start
    method: peft.Method
    model: MedNeXt
    trainable: Flat
    frozen: Flat
    tx: Any
    step: Callable
    window: SlidingWindow

    @property
    def info(self) -> modeldir.ModelInfo:
        """The description of the trained network."""
        return network.described(self.base.info, self.model)

    def parameters(self, trainable: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, nested, with these trainable leaves."""
        return peft.merge_trees(trainable, self.frozen)


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for values no run can have."""
    limits.check(config)
    limits.check_patch(config["data"]["patch_voxels"], DIVISOR)
    schedules.make_schedule(config["optim"])
    optimizer.check_groups(config["optim"]["groups"])
    if config["init_head"] not in network.HEAD_CHOICES:
        raise ValueError(
            f"config.init_head is {config['init_head']!r}; it must be one of {', '.join(network.HEAD_CHOICES)}"
        )
    if config["model"]["output"] not in modeldir.OUTPUTS:
        raise ValueError(
            f"config.model.output is {config['model']['output']!r}; it must be one of "
            f"{', '.join(modeldir.OUTPUTS)}"
        )


def build(config: Mapping[str, Any], start: network.Start, mesh: jax.sharding.Mesh) -> Experiment:
    """Puts the parts together.

    Args:
      config: plain values, see ``configs/default.py``.
      start: the network and parameters before the method.

    Raises: ValueError for a method, optimizer or augmentation that does not fit.
    """
    method = method_of(config)
    base_model = start.info.network(**network.compute_options(config))
    method_key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    model, params = method.apply_to(base_model, start.params, method_key)
    trainable, frozen = peft.split(params, method.rule)
    network.check_new_are_trained(method, start.new, frozen)
    added = {path for path in trainable if path not in paths.flatten(start.params)}
    if method.fresh is not None:
        added |= peft.split(params, method.fresh)[0].keys()
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in trainable.items()}
    tx, step, window = _programs(
        model,
        start.info.output,
        tuple((name, tuple(values)) for name, values in start.info.regions.items()),
        tuple(shapes.items()),
        frozenset(added | (start.new & trainable.keys())),
        _settings(config),
        mesh,
    )
    return Experiment(start, method, model, trainable, frozen, tx, step, window)


def _settings(config: Mapping[str, Any]) -> str:
    """What the programs of a run depend on, as JSON. The learning rate is an argument of the step."""
    kept = {name: dict(config[name]) for name in ("loss", "optim", "augment", "eval")}
    del kept["optim"]["peak_lr"]
    return json.dumps({**kept, "patch_voxels": config["data"]["patch_voxels"]})


@functools.lru_cache(maxsize=16)
def _programs(
    model: MedNeXt,
    output: str,
    regions: tuple,
    shapes: tuple,
    new: frozenset[str],
    settings: str,
    mesh: jax.sharding.Mesh,
) -> tuple[Any, Callable, SlidingWindow]:
    """Optimizer, step and window, kept for the next run of this process that is alike: tracing and compiling them
    again would take longer than a small run.
    """
    config = json.loads(settings)
    tx = optimizer.make_optimizer(config["optim"], dict(shapes), new=new)

    def forward(flat: Flat, image: jax.Array) -> Any:
        return model.apply({"params": paths.unflatten(flat)}, image)

    step = train_step.make_train_step(
        forward=forward,
        loss=losses.make_loss(config["loss"], output, dict(regions)),
        tx=tx,
        augment=_augmentation(config, mesh),
        accumulate=config["optim"]["accumulate"],
        ema_decay=config["optim"]["ema_decay"],
    )
    window = SlidingWindow(
        apply=lambda params, x: model.apply({"params": params}, x),
        patch_voxels=tuple(config["patch_voxels"]),
        n_outputs=model.n_classes,
        overlap=config["eval"]["overlap"],
        windows_per_batch=config["eval"]["windows_per_device"] * len(jax.local_devices()),
        flips=config["eval"]["flips"],
        activation="sigmoid" if output == "regions" else "softmax",
    )
    return tx, step, window


def method_of(config: Mapping[str, Any]) -> peft.Method:
    """The method of ``config["peft"]``; JSON's lists become the tuples that methods take."""
    section = config["peft"].items()
    return peft.from_config({name: tuple(v) if isinstance(v, list) else v for name, v in section})


def _augmentation(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Callable | None:
    """The augmentation of ``config["augment"]`` as ``(key, image, label) -> (image, label)``, or None."""
    settings = dict(config["augment"])
    enabled = settings.pop("enabled")
    settings = augment.check_config(settings)
    if not enabled:
        return None
    sharded = mesh if mesh.devices.size > 1 else None
    return functools.partial(augment.augment, config=settings, mesh=sharded)


def batch_shapes(config: Mapping[str, Any], channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch."""
    shape = (config["data"]["batch_size"], *config["data"]["patch_voxels"])
    return {
        "image": jax.ShapeDtypeStruct((*shape, channels), np.float32),
        "label": jax.ShapeDtypeStruct(shape, np.int32),
    }


def order_seed(config: Mapping[str, Any]) -> int:
    """What decides the order of cases, the places of patches and the augmentation."""
    return config["seed"] if config["data"]["order_seed"] < 0 else config["data"]["order_seed"]


def initial_state(config: Mapping[str, Any], experiment: Experiment) -> train_step.TrainState:
    """The state before the first step, on the host."""
    use_ema = config["optim"]["ema_decay"] > 0
    return train_step.init_state(experiment.trainable, experiment.tx, order_seed(config), use_ema)
