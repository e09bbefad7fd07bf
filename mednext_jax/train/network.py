"""The network that a run starts from: drawn anew, or taken from a model directory and fitted to the config.

Its architecture, data contract and parameters are one model directory, ``<workdir>/base``, written once per
run: checkpoints then hold what is trained and no more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mednext_jax import loading, modeldir
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt, create_mednext, parameter_shapes
from mednext_jax.peft import attach
from mednext_jax.peft.rules import DEEP_HEADS

ALL_HEADS = r"out_\d/.*"
HEAD_CHOICES = ("loaded", "new")


class DataContract(NamedTuple):
    """What a network must agree on with the data it sees; see ``modeldir.ModelInfo`` for the fields."""

    channels: tuple[str, ...]
    normalization: str
    label_scheme: str
    regions: dict[str, list[int]]


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      info: the description, network arguments included.
      params: nested parameters.
      new: flat paths of the parameters that did not come from ``init_from`` (all of them without it).
      report: lines for people: what was loaded, what not.
    """

    info: modeldir.ModelInfo
    params: dict[str, Any]
    new: frozenset[str]
    report: list[str]


def compute_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """``dtype`` and ``remat`` of ``config["model"]`` with "auto" decided: bfloat16 on GPU, else float32."""
    dtype, remat = config["model"]["dtype"], config["model"]["remat"]
    if dtype == "auto":
        dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"config.model.dtype is {dtype!r}; it must be auto, bfloat16, float16 or float32")
    return {"dtype": dtype, "remat": "mlp" if remat == "auto" else remat}


def start(config: Mapping[str, Any], data: DataContract) -> Start:
    """The network and parameters before any method is applied.

    Raises: ValueError or FileNotFoundError if ``init_from`` does not fit the config or the data.
    """
    return _loaded(config, data) if config["init_from"] else _drawn(config, data)


def _info(config: Mapping[str, Any], data: DataContract, arguments: Mapping[str, Any]) -> modeldir.ModelInfo:
    return modeldir.ModelInfo(
        kwargs=dict(arguments),
        channels=data.channels,
        normalization=data.normalization,
        output=config["model"]["output"],
        label_scheme=data.label_scheme,
        regions=data.regions,
        patch_voxels=tuple(config["data"]["patch_voxels"]),
    )


def _arguments_of(model: MedNeXt) -> dict[str, Any]:
    """The constructor arguments of a network as plain JSON, without those that a machine chooses."""
    skipped = ("parent", "name", "dtype", "remat")
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
    values["adapters"] = [dataclasses.asdict(adapter) for adapter in model.adapters]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def described(info: modeldir.ModelInfo, model: MedNeXt, **changes: Any) -> modeldir.ModelInfo:
    """``info`` for a network that a method has changed."""
    return dataclasses.replace(info, kwargs=_arguments_of(model), **changes)


def wanted_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``MedNeXt`` arguments that ``config["model"]`` asks for; only the fields that are set."""
    section = config["model"]
    wanted = {name: section[name] for name in ("kernel_size", "n_channels", "grn") if section[name]}
    wanted |= {name: tuple(section[name]) for name in ("block_counts",) if section[name]}
    if section["exp_r"]:
        wanted["exp_r"] = (
            tuple(section["exp_r"]) if isinstance(section["exp_r"], Sequence) else section["exp_r"]
        )
    if section["variant"]:
        variant = create_mednext(section["variant"], n_classes=1)
        wanted = {"n_channels": variant.n_channels, "exp_r": variant.exp_r,
                  "block_counts": variant.block_counts} | wanted  # fmt: skip
    return wanted


def _drawn(config: Mapping[str, Any], data: DataContract) -> Start:
    """A new network, its parameters drawn from the config's seed."""
    if not config["model"]["variant"]:
        raise ValueError(
            "config.model.variant and config.init_from are both empty: set config.init_from to a model "
            "directory (to fine-tune) or config.model.variant to S, B, M or L (to train from scratch)"
        )
    if config["peft"]["method"] != "full":
        raise ValueError(
            f"config.peft.method is {config['peft']['method']!r}, which freezes the base, but "
            "config.init_from is empty: set it to a model directory or to the workdir of a pre-training run"
        )
    info = _info(config, data, {"in_channels": len(data.channels)})
    model = MedNeXt(
        in_channels=len(data.channels),
        n_classes=info.n_outputs,
        deep_supervision=config["model"]["deep_supervision"],
        **{"kernel_size": 3, **wanted_arguments(config)},
    )
    flat = attach.draw(model, jax.random.key(config["seed"]))
    return Start(described(info, model), paths.unflatten(flat), frozenset(flat), ["all parameters drawn anew"])


def _loaded(config: Mapping[str, Any], data: DataContract) -> Start:
    """The network of ``init_from``, checked against the config and the data."""
    source = config["init_from"]
    info, params = modeldir.load_model(source)
    try:
        modeldir.check_channels(info, data.channels, data.normalization)
        return _fit(config, data, info, params)
    except ValueError as error:
        raise ValueError(f"config.init_from={source}: {error}") from None


def planned(config: Mapping[str, Any]) -> tuple[MedNeXt, frozenset[str]]:
    """The network that a run would start from, and its parameters that ``init_from`` lacks; no data needed.

    Raises: ValueError or FileNotFoundError if ``init_from`` and the config do not fit.
    """
    options = compute_options(config)
    source = config["init_from"]
    if not source:
        if not config["model"]["variant"]:
            raise ValueError("config.model.variant and config.init_from are both empty: set one of them")
        n_classes = 3 if config["model"]["output"] == "regions" else 4
        deep = config["model"]["deep_supervision"]
        arguments = {"kernel_size": 3, **wanted_arguments(config)}
        return MedNeXt(n_classes=n_classes, deep_supervision=deep, **arguments, **options), frozenset()
    info = modeldir.load_info(source)
    data = DataContract(info.channels, info.normalization, info.label_scheme, info.regions)
    try:
        model, _ = _wanted_network(config, data, info)
    except ValueError as error:
        raise ValueError(f"config.init_from={source}: {error}") from None
    kept = set(parameter_shapes(info.network()))
    if config["init_head"] == "new":
        kept = {path for path in kept if not path.startswith("out_")}
    return model.clone(**options), frozenset(parameter_shapes(model).keys() - kept)


def check_new_are_trained(method: Any, new: frozenset[str], frozen: Mapping[str, Any]) -> None:
    """Raises ValueError if ``method`` leaves a parameter frozen that was not loaded: it would stay random."""
    stuck = sorted(new & frozen.keys())
    if stuck:
        raise ValueError(
            f"config.peft.method={method.name} does not train {stuck[0]}, which was not loaded: it would "
            f"stay random; add the heads (config.peft.method={method.name}+head) or set "
            "config.model.deep_supervision=False"
        )


def _check_architecture(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if a field that the config sets is not what the loaded network has."""

    def nine(value: Any) -> Any:
        return list(value) if isinstance(value, list | tuple) else value

    for name, value in wanted.items():
        has, wants = nine(found.get(name)), nine(value)
        if name == "exp_r":  # one number stands for nine
            has, wants = ([v] * 9 if isinstance(v, int) else v for v in (has, wants))
        if has != wants:
            raise ValueError(
                f"that network has {name} {has}, config.model asks for {wants}; leave config.model's fields "
                "empty to take the loaded network as it is"
            )


def _wanted_network(
    config: Mapping[str, Any], data: DataContract, info: modeldir.ModelInfo
) -> tuple[MedNeXt, modeldir.ModelInfo]:
    """The loaded network with the heads that the config asks for, and its description.

    Raises: ValueError if ``config["model"]`` asks for another architecture, or the head for other data.
    """
    _check_architecture(info.kwargs, wanted_arguments(config))
    wanted = _info(config, data, info.kwargs)
    same_head = (info.output, info.regions, info.n_outputs) == (
        wanted.output,
        wanted.regions,
        wanted.n_outputs,
    )
    if not same_head and config["init_head"] != "new":
        raise ValueError(
            f"its head gives {info.output} {list(info.regions)}, this run needs {wanted.output} "
            f"{list(wanted.regions)}; add --config.init_head=new to start with a new head"
        )
    model = info.network(n_classes=wanted.n_outputs, deep_supervision=config["model"]["deep_supervision"])
    return model, wanted


def _fit(config: Mapping[str, Any], data: DataContract, info: modeldir.ModelInfo, params: Mapping) -> Start:
    """The loaded parameters with the heads that the config asks for."""
    model, wanted = _wanted_network(config, data, info)
    new_head = config["init_head"] == "new"
    shapes = parameter_shapes(model)
    flat = {path: leaf for path, leaf in paths.flatten(params).items()}
    heads = (ALL_HEADS,) if new_head else (DEEP_HEADS,)
    if new_head:
        flat = {path: leaf for path, leaf in flat.items() if not path.startswith("out_")}
    loaded, report = loading.merge(shapes, flat, allow_new=heads, allow_dropped=(DEEP_HEADS,))
    new = frozenset(shapes.keys() - loaded.keys())
    drawn = attach.draw(model, jax.random.key(config["seed"]), set(new))
    every = {path: loaded.get(path, drawn.get(path)) for path in shapes}
    lines = [
        f"loaded {config['init_from']}: {line}" if i == 0 else line for i, line in enumerate(report.lines())
    ]
    return Start(described(wanted, model), paths.unflatten(every), new, lines)
