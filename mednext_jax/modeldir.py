"""The model directory: what a trained network is on disk, and all that is needed to use it.

    <directory>/model.json          network arguments, channels, normalisation, output, regions, provenance
    <directory>/model.safetensors   parameters: a float32 tensor per path (``enc_block_0/0/conv1/kernel``)

Only JSON and safetensors are read, so opening a stranger's model runs no code of theirs. A directory appears
whole or not at all, and its parameters are checked against the network and their recorded hash when read.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mednext_jax import directories, tensor_file
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes

FORMAT = "mednext_jax.model"
FORMAT_VERSION = 1
DESCRIPTION_FILE = "model.json"
PARAMETERS_FILE = "model.safetensors"
OUTPUTS = ("regions", "labels")
OBJECTS, TEXTS = ("kwargs", "regions", "provenance"), ("normalization", "output", "label_scheme", "params_hash")
# Far above any network there is: a forged description must not keep the machine busy building one.
MOST = {"n_channels": 2**12, "in_channels": 2**10, "n_classes": 2**10, "kernel_size": 99, "exp_r": 2**10,
        "block_counts": 2**10}  # fmt: skip
MOST_PATCH = 2**10


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What must be known about a network beside its parameters.

    Attributes:
      kwargs: arguments of ``MedNeXt``, plain JSON values (no dtype or remat: the machine's choice).
      channels: names of the input channels, in order.
      normalization: how intensities were normalised, e.g. ``"zscore_brain"``.
      output: ``"regions"`` (one sigmoid per entry of ``regions``, in that order) or ``"labels"``
        (softmax over the labels 0, 1, ...).
      label_scheme: the scheme that the label values of ``regions`` belong to.
      regions: region name -> label values, outermost region first.
      patch_voxels: (depth, height, width) of the patches the network was trained on.
      provenance: free JSON: config, dataset, scores, versions.
      params_hash: set by ``save_model`` and ``load_model``; see :func:`params_hash`.
    """

    kwargs: dict[str, Any]
    channels: tuple[str, ...]
    normalization: str
    output: str
    label_scheme: str
    regions: dict[str, list[int]]
    patch_voxels: tuple[int, ...]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    params_hash: str = ""

    def __post_init__(self) -> None:
        for names, kind, told in ((OBJECTS, Mapping, "names with values"), (TEXTS, str, "a text")):
            for name in names:
                if not isinstance(value := getattr(self, name), kind):
                    raise ValueError(f"{name} is {value!r}; it must be {told}")
        channels, patch = (tuple(v) if isinstance(v, list | tuple) else () for v in (self.channels, self.patch_voxels))
        if not channels or not all(isinstance(channel, str) for channel in channels):
            raise ValueError(f"channels is {self.channels!r}; give their names")
        if len(patch) not in (2, 3) or not all(isinstance(n, int) and 1 <= n <= MOST_PATCH for n in patch):
            raise ValueError(f"patch_voxels is {self.patch_voxels!r}; give 2 or 3 sizes from 1 to {MOST_PATCH}")
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "patch_voxels", patch)
        regions = {name: [int(value) for value in values] for name, values in self.regions.items()}
        object.__setattr__(self, "regions", regions)
        if self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}; it must be one of {', '.join(OUTPUTS)}")
        if not self.regions or not all(self.regions.values()):
            raise ValueError(f"regions is {self.regions!r}; give each region at least one label value")

    def network(self, **changes: Any) -> MedNeXt:
        """The Linen module; ``changes`` replace arguments (``dtype``, ``remat``, ...)."""
        arguments = {key: tuple(value) if isinstance(value, list) else value
                     for key, value in {**self.kwargs, **changes}.items()}
        _check_arguments(arguments)
        try:
            return MedNeXt(**arguments)
        except TypeError as error:
            raise ValueError(f"the network arguments do not fit MedNeXt: {error}") from None

    @property
    def n_outputs(self) -> int:
        """Number of output channels that ``output`` and ``regions`` call for."""
        if self.output == "regions":
            return len(self.regions)
        return 1 + max(max(values) for values in self.regions.values())


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that name no property of a network, or a size that none can have."""
    if hidden := sorted({"name", "parent"} & arguments.keys()):
        raise ValueError(f"the network arguments do not fit MedNeXt: {hidden[0]} is none of them")
    for name, most in MOST.items():
        least = 0 if name == "block_counts" else 1
        value = arguments.get(name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not least <= number <= most:
                raise ValueError(f"the network's {name} is {value}: from {least} to {most} is possible")


def params_hash(params: Mapping[str, Any]) -> str:
    """``"sha256:..."`` over sorted path, dtype, shape and bytes of every leaf, in float32 as a file holds it.

    Equal for nested and flat dicts of the same parameters, and equal before saving and after loading.
    """
    digest = hashlib.sha256()
    for path, array in _float32(params).items():
        digest.update(f"{path}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return "sha256:" + digest.hexdigest()


def save_model(path: str | os.PathLike, info: ModelInfo, params: Mapping[str, Any]) -> ModelInfo:
    """Write a model directory, replacing one that is there already.

    Args:
      path: the directory; its parents are created. Anything there that is not a model is left alone.
      info: the description; its ``params_hash`` is computed here.
      params: nested or flat dict of arrays.

    Returns: ``info`` with its hash, as written.

    Raises:
      FileExistsError: ``path`` holds something that is not a model.
      ValueError: the parameters or the description do not fit the network, or the description is not JSON.
    """
    flat = _float32(params)
    _check_network(info, flat, f"model for {path}")
    info = dataclasses.replace(info, params_hash=params_hash(flat))
    head = {"format": FORMAT, "format_version": FORMAT_VERSION}
    try:
        text = json.dumps({**head, **dataclasses.asdict(info)}, indent=1)
    except TypeError as error:
        raise ValueError(f"the description of the model for {path} is not plain JSON: {error}") from None
    with directories.replacing(path, (DESCRIPTION_FILE, PARAMETERS_FILE), "a model") as staging:
        tensor_file.write(staging / PARAMETERS_FILE, flat)
        (staging / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
    return info


def find_model(path: str | os.PathLike) -> Path:
    """The model directory that ``path`` means: itself, or its ``model/`` when it is a training workdir."""
    path = Path(path)
    for directory in (path, path / "model"):
        if (directory / DESCRIPTION_FILE).is_file():
            return directory
    if (path / "best" / DESCRIPTION_FILE).is_file():
        raise FileNotFoundError(f"{path} has no model/, its training is not finished; best so far: {path / 'best'}")
    reason = f"holds no {DESCRIPTION_FILE}" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise FileNotFoundError(f"{path} {reason}: give a model directory, or a training workdir that has model/")


def load_info(path: str | os.PathLike) -> ModelInfo:
    """Read and check the description alone (cheap). Errors as :func:`load_model`."""
    file = find_model(path) / DESCRIPTION_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); write the model again") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError(f"{file} is not the description of a {FORMAT}")
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}: "
                         "use the program's version that wrote it, or write the model again")
    try:
        info = ModelInfo(**fields)
        parameter_shapes(info.network())  # arguments of no network are told here, where the file is known
        return info
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a model: {error}") from None


def load_model(path: str | os.PathLike) -> tuple[ModelInfo, dict[str, Any]]:
    """Read a model directory (or the ``model/`` of a training workdir).

    Returns: the description and the parameters as a nested dict of float32 numpy arrays, ready for ``apply``.

    Raises:
      FileNotFoundError: no such model, or one of its two files is missing.
      ValueError: a file is damaged, of another format version, or does not fit the network it describes.
    """
    directory = find_model(path)
    info = load_info(directory)
    file = directory / PARAMETERS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole model directory")
    try:
        flat = load_file(file)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); copy it again") from None
    _check_network(info, flat, str(file))
    if params_hash(flat) != info.params_hash:
        raise ValueError(f"{file} does not have the hash that {DESCRIPTION_FILE} records: "
                         "one of the two files was changed; copy the model again")
    return info, paths.unflatten(flat)


def check_channels(info: ModelInfo, channels: Iterable[str], normalization: str | None = None) -> None:
    """Refuse data whose channels (names and order) or normalisation the model was not trained on."""
    channels = tuple(channels)
    if channels != info.channels:
        kind = "in another order" if sorted(channels) == sorted(info.channels) else "others"
        raise ValueError(f"the model expects the channels ({', '.join(info.channels)}), the data has {kind}: "
                         f"({', '.join(channels)}); use a model of the data's channels, or convert the weights again "
                         "with launch/convert.py --channels")
    if normalization is not None and normalization != info.normalization:
        raise ValueError(f"the model expects intensities normalised by {info.normalization!r}, "
                         f"the data has {normalization!r}; preprocess the data again")


def _float32(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flat path -> contiguous float32 array on the host, sorted by path."""
    flat = paths.flatten(params)
    return {path: np.ascontiguousarray(np.asarray(flat[path], np.float32)) for path in sorted(flat)}


def _check_network(info: ModelInfo, flat: Mapping[str, np.ndarray], where: str) -> None:
    """Compare the leaves' paths, shapes and dtypes with the network's, and its ends with the description."""
    network = info.network()
    expected = parameter_shapes(network)
    if network.in_channels != len(info.channels):
        raise ValueError(f"{where}: the network takes {network.in_channels} channels, "
                         f"but {len(info.channels)} are named")
    if network.n_classes != info.n_outputs:
        raise ValueError(f"{where}: the network has {network.n_classes} outputs, but output={info.output!r} "
                         f"with regions {info.regions} needs {info.n_outputs}")
    absent, foreign = expected.keys() - flat.keys(), flat.keys() - expected.keys()
    for kind, leaves in (("lacks", absent), ("has the unexpected", foreign)):
        if leaves:
            more = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
            raise ValueError(f"{where} {kind} parameter {min(leaves)}{more}: it belongs to another network")
    for path, leaf in expected.items():
        if tuple(flat[path].shape) != tuple(leaf.shape):
            raise ValueError(f"{where}: parameter {path} has shape {tuple(flat[path].shape)}, "
                             f"the network needs {tuple(leaf.shape)}")
        if flat[path].dtype != np.float32:
            raise ValueError(f"{where}: parameter {path} is {flat[path].dtype}, the format holds float32")
