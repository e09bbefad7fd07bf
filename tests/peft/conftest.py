"""The smallest networks on which every method acts, with parameters that are nowhere zero or one."""

import numpy as np
import pytest

from mednext_jax.nn.mednext import MedNeXt, parameter_shapes


def tiny(**changes) -> MedNeXt:
    """A flat MedNeXt with one block at both ends and one at the bottom: all nine stages, little to compile."""
    fields = {"n_channels": 4, "n_classes": 3, "block_counts": (1, 0, 0, 0, 1, 0, 0, 0, 1), "dim": "2d",
              "remat": "none", "do_res_up_down": False} | changes  # fmt: skip
    return MedNeXt(**fields)


def random_params(model: MedNeXt, seed: int = 0) -> dict[str, np.ndarray]:
    """Flat parameters, all random."""
    random = np.random.default_rng(seed)
    return {path: (0.3 * random.standard_normal(leaf.shape)).astype(np.float32)
            for path, leaf in sorted(parameter_shapes(model).items())}  # fmt: skip


@pytest.fixture(scope="session")
def network() -> MedNeXt:
    return tiny()


@pytest.fixture(scope="session")
def base(network) -> dict[str, np.ndarray]:
    return random_params(network)


@pytest.fixture(scope="session")
def network_in_space() -> MedNeXt:
    """The smallest with three axes and shortcuts in the blocks that change resolution."""
    return tiny(n_channels=2, block_counts=(0,) * 9, dim="3d", do_res_up_down=True)


@pytest.fixture(scope="session")
def base_in_space(network_in_space) -> dict[str, np.ndarray]:
    return random_params(network_in_space)


@pytest.fixture(scope="session")
def image() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, 32, 16, 4)).astype(np.float32)
