"""A small labelled store, and a config whose network compiles fast: 1x1x1 kernels and no inner blocks."""

import jax
import numpy as np
import pytest

from configs import default
from data_pipeline import store
from data_pipeline.labels import REGIONS
from data_pipeline.stream import make_stream
from mednext_jax.train.experiment import Data
from mednext_jax.train.network import DataContract

PATCH = (16, 32, 16)


@pytest.fixture(scope="session", autouse=True)
def shared_compilations(tmp_path_factory):
    """Programs that several tests need are compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Store of six cases (four to train on), each a ball of ET in TC in WT, visible in every channel."""
    path = tmp_path_factory.mktemp("data") / "store"
    rng, shape, written = np.random.default_rng(0), (19, 34, 17), []
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    for i in range(6):
        radius = np.linalg.norm(grid - rng.uniform(7, 10, 3), axis=-1)
        label = np.select([radius < 2, radius < 4, radius < 6], [1, 3, 2]).astype(np.uint8)
        image = label[..., None] + rng.normal(0, 0.1, (*shape, 4))
        written.append(store.write_case(path, f"case-{i}", image.astype(np.float16), label, {}))
    cases = [f"case-{i}" for i in range(6)]
    return store.write_dataset(path, written, {"train": cases[:4], "val": cases[4:], "test": []})


def plain_config():
    c = default.get_config("demo")
    c.model.update(n_channels=2, exp_r=1, kernel_size=1, block_counts=(0,) * 9, deep_supervision=False)
    c.data.update(patch_voxels=PATCH, batch_size=4)
    c.optim.update(total_steps=6, warmup_steps=1, peak_lr=1e-2)
    c.eval.update(every=3)
    c.augment.enabled = False
    c.log_every, c.checkpoint_every, c.n_devices = 2, 2, 0
    return c


@pytest.fixture
def config():
    return plain_config()


@pytest.fixture
def open_data(cohort):
    """Opens the cohort for a config; closes all streams in the end."""
    streams = []

    def open_for(config, wrap=lambda stream: stream, channels=tuple(cohort.channels), train="train"):
        stream = wrap(make_stream(cohort, train, PATCH, config.data.batch_size, 0.67, config.seed))
        streams.append(stream)
        contract = DataContract(
            channels, cohort.normalization, cohort.label_scheme, {k: list(v) for k, v in REGIONS.items()}
        )
        return Data(stream, contract, cohort.split("val"), lambda case: cohort.load(case)[:2], name="balls")

    yield open_for
    for stream in streams:
        stream.close()
