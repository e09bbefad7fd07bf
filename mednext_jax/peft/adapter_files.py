"""An adapter on disk: what one site trained, apart from the base it was trained on.

    <directory>/adapter_model.safetensors   the trained parameters, one float32 tensor per flat path
    <directory>/adapter_config.json         method, options, hashes, channels, normalisation, cohort, scores
    <directory>/README.md                   the same for people

Only JSON and safetensors are read, from these two fixed names, so opening a stranger's adapter runs no code
of theirs. The configuration holds the hashes of the tensors and of those of the base's parameters that the
adapter does not bring itself: it goes onto a base that has these, or is refused.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mednext_jax import modeldir, tensor_file
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.peft import adapter_card, attach, merging, registry, rules

FORMAT = "mednext_jax.adapter"
FORMAT_VERSION = 1
TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter in memory.

    Attributes:
      method: what was added and trained.
      tensors: the trained parameters, flat, float32 numpy arrays.
      config: the content of ``adapter_config.json``.
      where: its directory, for messages.
    """

    method: registry.Method
    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    where: Path

    def apply_to(self, model: Any, base_params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The adapted network and its nested parameters: the base's with this adapter's in their places.

        Heads of deep supervision may be on one side only: the adapter's are left out where the base has none, the
        base's stay where the adapter has none.

        Raises:
          ValueError: the adapter does not fit the network.
        """
        adapted = model.clone(adapters=self.method.adapters)
        expected = parameter_shapes(adapted)
        trainable, _ = rules.split(expected, self.method.rule)
        tensors = {path: leaf for path, leaf in self.tensors.items() if path in expected or not _only_trains(path)}
        needed = {path: leaf for path, leaf in trainable.items() if path in tensors or not _only_trains(path)}
        attach.check_params(tensors, needed, f"the adapter {self.where} on this network")
        return adapted, paths.unflatten({**paths.flatten(base_params), **tensors})


def save_adapter(
    directory: str | os.PathLike,
    method: registry.Method,
    params: Mapping[str, Any],
    base_params: Mapping[str, Any],
    info: modeldir.ModelInfo,
    cohort: str = "",
    scores: Mapping[str, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the trained part of ``params``, bound to its base, into ``directory``.

    Each file is written under a temporary name and renamed, the configuration last.

    Args:
      directory: made if needed; the adapter's three files in it are replaced, others left alone.
      params: all parameters of the adapted network (or the trained ones alone), nested or flat.
      base_params: the base's parameters, as its model directory holds them.
      info: the base's description; gives channels, normalisation and output.
      cohort: a name for what it was trained on.
      scores: metric name -> value.
      provenance: free JSON: configuration, versions.

    Returns: the directory.

    Raises:
      ValueError: the method trains nothing in ``params``, or ``scores`` or ``provenance`` are not JSON.
    """
    trained, _ = rules.split(params, method.rule)
    tensors = {path: np.ascontiguousarray(np.asarray(trained[path], np.float32)) for path in sorted(trained)}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "options": method.options,
        "parameters": sum(leaf.size for leaf in tensors.values()),
        "base_hash": modeldir.params_hash(base_params),
        "frozen_hash": _frozen_hash(base_params, tensors),
        "tensors_hash": modeldir.params_hash(tensors),
        "channels": info.channels,
        "normalization": info.normalization,
        "output": info.output,
        "label_scheme": info.label_scheme,
        "regions": info.regions,
        "cohort": cohort,
        "scores": dict(scores or {}),
        "provenance": dict(provenance or {}),
    }
    try:
        text = json.dumps(config, indent=1) + "\n"
    except TypeError as error:
        raise ValueError(
            f"the description of the adapter for {directory} is not plain JSON: {error}"
        ) from None
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / TENSORS_FILE, lambda file: tensor_file.write(file, tensors))
    _write(directory / CARD_FILE, lambda file: file.write_text(adapter_card.card(config), encoding="utf-8"))
    _write(directory / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    return directory


def load_adapter(
    directory: str | os.PathLike, base_params: Mapping[str, Any], force: bool = False
) -> AdapterFile:
    """Read an adapter and check that it belongs to ``base_params``.

    Args:
      directory: the adapter's, or the training workdir that holds it.
      force: take an adapter that was trained on another base (its shapes must still fit).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, foreign or of another format version, or the adapter belongs to another
        base.
    """
    directory = find_adapter(directory)
    config = load_config(directory)
    file = directory / TENSORS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole adapter directory")
    try:
        tensors = load_file(file)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); copy it again") from None
    if modeldir.params_hash(tensors) != config["tensors_hash"]:
        raise ValueError(
            f"{file} does not have the hash that {CONFIG_FILE} records: "
            "one of the two files was changed; copy the adapter again"
        )
    if not force and _frozen_hash(base_params, tensors) != config["frozen_hash"]:
        raise ValueError(
            f"{directory} was trained on the base {_short(config['base_hash'])}, this one is "
            f"{_short(modeldir.params_hash(base_params))}: give the base it was trained on "
            "(its run keeps it in <workdir>/base)"
        )
    return AdapterFile(_method_of(config, directory / CONFIG_FILE), tensors, config, directory)


def merge_directories(
    model: str | os.PathLike, adapter: str | os.PathLike, output: str | os.PathLike, force: bool = False
) -> modeldir.ModelInfo:
    """Write the model directory of a base with an adapter merged into it; it is used like any other model.

    Returns: the description as written; its provenance names base, method and cohort.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: as ``load_model``, :func:`load_adapter`, ``merging.merge`` and
        ``save_model``.
    """
    info, base = modeldir.load_model(model)
    attached = load_adapter(adapter, base, force)
    check_data(attached, info, adapter)
    _, params = merging.merge(*attached.apply_to(info.network(), base))
    merged_from = {name: attached.config[name] for name in ("method", "options", "base_hash", "cohort", "scores")}
    return modeldir.save_model(output, dataclasses.replace(info, provenance={"merged": merged_from}), params)


def check_data(adapter: AdapterFile, info: modeldir.ModelInfo, where: str | os.PathLike) -> None:
    """Raise ValueError unless the adapter saw channels and intensities as the base does, and gives its output."""
    for field in ("channels", "normalization", "output", "regions"):
        theirs, ours = adapter.config[field], getattr(info, field)
        if json.dumps(theirs) != json.dumps(ours):  # a tuple is a list there, and the order of regions counts
            raise ValueError(
                f"{where} was trained with {field} {_words(theirs)}, the base has {_words(ours)}: "
                "give the base it was trained on (its run keeps it in <workdir>/base)"
            )


def find_adapter(path: str | os.PathLike) -> Path:
    """The adapter directory that ``path`` means: itself, or its ``adapter/`` when it is a training workdir."""
    inside = Path(path) / "adapter"
    return inside if (inside / CONFIG_FILE).is_file() else Path(path)


def load_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Read and check ``adapter_config.json`` alone (cheap). Errors as :func:`load_adapter`."""
    file = find_adapter(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give the directory of a saved adapter, or a training workdir that has adapter/"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{file} is not the configuration of a {FORMAT}")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {config.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}: use the program's version that wrote it"
        )
    for field, kind in {
        "method": str,
        "options": dict,
        "base_hash": str,
        "frozen_hash": str,
        "tensors_hash": str,
        "channels": list,
        "normalization": str,
        "output": str,
        "regions": dict,
        "cohort": str,
        "scores": dict,
    }.items():
        if not isinstance(config.get(field), kind):
            raise ValueError(f"{file} lacks a proper {field!r}; copy it again")
    return config


def _method_of(config: Mapping[str, Any], file: Path) -> registry.Method:
    try:
        parts = [
            registry.create(
                name,
                **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()},
            )
            for name, options in config["options"].items()
        ]
        return registry.compose(*parts) if len(parts) > 1 else parts[0]
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} does not describe a method of this program: {error}") from None


def _write(file: Path, write: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _frozen_hash(base_params: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Hash of what an adapter needs of a base: what it does not bring, deep supervision's heads aside."""
    flat = paths.flatten(base_params)
    return modeldir.params_hash(
        {path: leaf for path, leaf in flat.items() if path not in tensors and not _only_trains(path)}
    )


def _only_trains(path: str) -> bool:
    """Whether it belongs to a head of deep supervision: those are not used to predict."""
    return re.fullmatch(rules.DEEP_HEADS, path) is not None


def _words(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]
