"""A model as one portable program: a batch of normalised windows in, probabilities out.

    <directory>/window.jaxexport         StableHLO for any batch size, on CPU and CUDA
    <directory>/parameters.safetensors   its first argument, one tensor per flat path
    <directory>/export.json              window size, the model's description, versions

``jax.export.deserialize(window.jaxexport).call(parameters, windows)`` needs neither Flax nor this package. The network
is written as for the machine that exports it: what a CPU exported is a CPU's formulation on a card, too.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mednext_jax import directories, modeldir, tensor_file
from mednext_jax.infer import ensemble
from mednext_jax.infer.sliding_window import ACTIVATIONS
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes

FORMAT = "mednext_jax.export"
FORMAT_VERSION = 1
PROGRAM_FILE = "window.jaxexport"
PARAMETERS_FILE = "parameters.safetensors"
DESCRIPTION_FILE = "export.json"
PLATFORMS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A loaded export; fits ``SlidingWindow(exported.apply, exported.patch_voxels, exported.n_outputs)``.

    Attributes:
      program: the deserialised program.
      params: its parameters, flat.
      patch_voxels: (d, h, w) of a window.
      description: the content of ``export.json``.
    """

    program: export.Exported
    params: dict[str, np.ndarray]
    patch_voxels: tuple[int, ...]
    description: dict[str, Any]

    @property
    def n_outputs(self) -> int:
        return self.program.out_avals[0].shape[-1]

    def apply(self, params: Any, windows: jax.Array) -> jax.Array:
        """(parameters, windows (B, d, h, w, C) float32) -> probabilities (B, d, h, w, K) float32."""
        return self.program.call(params, windows)


def export_model(
    model: str | os.PathLike,
    output: str | os.PathLike,
    patch_voxels: Sequence[int] | None = None,
    adapter: str | os.PathLike | None = None,
    platforms: Sequence[str] = PLATFORMS,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the window function of a model, and its parameters, to ``output``.

    Args:
      model: model directory or training workdir.
      output: directory; an earlier export there is replaced, anything else is left alone.
      patch_voxels: window size; None takes the model's training patch.
      adapter: adapter directory; its parameters become part of the export.
      platforms: what the program can run on.
      dtype: compute type; parameters and probabilities are float32 in any case.

    Returns: the content of ``export.json``.

    Raises:
      FileExistsError: ``output`` holds something else.
      FileNotFoundError, ValueError: as ``ensemble.load_member``, or the window does not fit the network.
    """
    names = (PROGRAM_FILE, PARAMETERS_FILE, DESCRIPTION_FILE)
    directories.refuse_foreign(Path(output), names, "an export")
    member = ensemble.load_member(model, adapter, dtype)
    patch = tuple(int(n) for n in patch_voxels or member.info.patch_voxels)
    wanted = parameter_shapes(member.network)  # without the heads of deep supervision
    flat = {path: np.asarray(leaf) for path, leaf in paths.flatten(member.params).items() if path in wanted}
    program = window_program(member, patch, flat, platforms)
    serialized = bytes(program.serialize())
    description = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "patch_voxels": patch, "dtype": dtype,
        "activation": ensemble.ACTIVATION_OF[member.info.output], "platforms": list(program.platforms),
        "program_hash": _hash(serialized), "params_hash": modeldir.params_hash(flat),
        "source": member.source, "model": dataclasses.asdict(member.info),
        "versions": {"jax": jax.__version__, "calling_convention": program.calling_convention_version},
    }  # fmt: skip
    with directories.replacing(output, names, "an export") as staging:
        (staging / PROGRAM_FILE).write_bytes(serialized)
        tensor_file.write(staging / PARAMETERS_FILE, flat)
        (staging / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def window_program(
    member: ensemble.Member, patch_voxels: Sequence[int], flat: dict[str, Any], platforms: Sequence[str]
) -> export.Exported:
    """``(flat parameters, windows (B, d, h, w, C)) -> probabilities (B, d, h, w, K)`` for a symbolic B."""
    activation = ACTIVATIONS[ensemble.ACTIVATION_OF[member.info.output]]

    def probabilities(params: dict[str, jax.Array], windows: jax.Array) -> jax.Array:
        # One window at a time under vmap: the network plans its memory by the batch size, which is not known here.
        def one(window: jax.Array) -> jax.Array:
            return activation(member.network.apply({"params": paths.unflatten(params)}, window[None])[0])

        return jax.vmap(one)(windows)

    (batch,) = export.symbolic_shape("b")
    windows = jax.ShapeDtypeStruct((batch, *patch_voxels, len(member.info.channels)), jnp.float32)
    params = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in flat.items()}
    return export.export(jax.jit(probabilities), platforms=tuple(platforms))(params, windows)


def load_export(path: str | os.PathLike) -> Exported:
    """Read an export directory.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, of another format version, or changed since it was written.
    """
    path = Path(path)
    for name in (DESCRIPTION_FILE, PROGRAM_FILE, PARAMETERS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist: give the directory that launch/export.py wrote")
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        if (description["format"], description["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError("another format or format version")
        serialized = (path / PROGRAM_FILE).read_bytes()
        params = load_file(path / PARAMETERS_FILE)
        patch = tuple(description["patch_voxels"])
        hashes = (description["program_hash"], description["params_hash"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not an export of this format ({error}); export again") from None
    if (_hash(serialized), modeldir.params_hash(params)) != hashes:
        raise ValueError(f"{path} was changed since it was written; export again")
    return Exported(export.deserialize(bytearray(serialized)), params, patch, description)


def _hash(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
