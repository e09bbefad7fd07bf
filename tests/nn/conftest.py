"""Tracing as for a GPU, which needs none: without one the program runs on a CPU, and its kernels are interpreted."""

import jax
import pytest

from mednext_jax.nn.gpu import triton


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Call it to have all that is traced from then on traced as for a GPU."""

    interpreted = jax.default_backend() != "gpu"

    def switch():
        jax.clear_caches()  # functions of blocks are traced once per shape
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(triton, "interpreted", interpreted)

    yield switch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture(params=["cpu", "gpu"])
def either_formulation(request):
    """The test runs twice: with what is traced for a CPU, and with what is traced for a GPU."""
    if request.param == "gpu":
        request.getfixturevalue("as_on_a_gpu")()
