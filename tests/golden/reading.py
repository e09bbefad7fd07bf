"""Opens the golden files of this folder; README.md says what they hold and where they come from."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parent
# Compiling dominates these tests; without LLVM's optimisation the same arithmetic compiles in half the time.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Golden:
    """One golden file. Arrays are as PyTorch has them, channels first, unless said otherwise."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
            self.meta = json.loads(str(file["meta"]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under ``prefix/``, by the rest of their name."""
        return {key[len(prefix) + 1:]: a for key, a in self.arrays.items() if key.startswith(f"{prefix}/")}

    @property
    def state_dict(self) -> dict[str, np.ndarray]:
        return self.group("param")

    @property
    def input(self) -> jax.Array:
        """Channels last."""
        return channels_last(self.arrays["input"])

    @property
    def outputs(self) -> list[np.ndarray]:
        """Full resolution first."""
        return [self.arrays[key] for key in ("output", *(f"output_ds{i}" for i in (1, 2, 3, 4))) if key in self.arrays]

    def assert_outputs(self, found: jax.Array | list[jax.Array]) -> None:
        """Every output (channels last) within the file's own tolerance."""
        found = found if isinstance(found, list) else [found]
        assert len(found) == len(self.outputs)
        for ours, theirs, gap in zip(found, self.outputs, self.meta["max_abs_f32_vs_f64"], strict=True):
            assert_within(channels_first(ours), theirs, gap)


def assert_within(found: np.ndarray, wanted: np.ndarray, gap: float, scale: float = 0.0, what: str = ""):
    """``max|found - wanted| <= max(20 gap, 1e-5 scale)``: gap is PyTorch's own float32 error, scale its maximum."""
    assert found.shape == wanted.shape, what
    limit = max(20 * gap, 1e-5 * (scale or np.abs(wanted).max()))
    assert np.abs(found - wanted).max() <= limit, what


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def channels_first(array: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)


def run(function, *arguments, optimised: bool = False):
    """``function(*arguments)`` compiled in full float32 precision, without TF32 where there is a GPU."""
    options = FAST_COMPILE if jax.default_backend() == "cpu" and not optimised else None
    with jax.default_matmul_precision("highest"):
        return jax.jit(function, compiler_options=options)(*arguments)


def names(*prefixes: str) -> list[str]:
    """The golden files whose names begin so, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem.startswith(prefixes))
