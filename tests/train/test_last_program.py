"""The program of the last run is used if it is the one that this run wants, and never otherwise."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from mednext_jax.train import last_program

SHAPES = (jax.ShapeDtypeStruct((4, 5), jnp.float32), {"w": jax.ShapeDtypeStruct((3,), jnp.int32)})
ARGUMENTS = np.arange(20, dtype=np.float32).reshape(4, 5), {"w": np.array([1, 2, 3], np.int32)}


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """An empty compilation cache that keeps programs however fast they compile."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    use_cache(str(tmp_path / "cache"), 0.0)
    yield tmp_path / "cache" / last_program.FOLDER
    use_cache(*before)


def use_cache(folder: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()  # JAX looks for its folder once


@pytest.fixture
def compilations(monkeypatch):
    """Every compilation that was asked of JAX."""
    asked, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: asked.append(1) or compile_(lowered))
    return asked


def compiled(factor: float = 2.0, devices: int = 1, first: int = 0):
    """``x * factor + sum(w)`` with x split over the devices and donated, as a new process would ask for it."""
    chosen = jax.devices()[first : first + devices]
    mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=chosen)
    split, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    jitted = jax.jit(lambda x, tree: x * factor + tree["w"].sum(), in_shardings=(split, same), out_shardings=split,
                     donate_argnums=0)  # fmt: skip
    program = last_program.compiled(jitted, SHAPES, list(mesh.devices.flat))
    for thread in threading.enumerate():
        if thread.name == last_program.KEEPER:
            thread.join()
    x, tree = jax.device_put(ARGUMENTS[0], split), jax.device_put(ARGUMENTS[1], same)
    assert np.asarray(program(x, tree)) == pytest.approx(ARGUMENTS[0] * factor + 6)
    assert x.is_deleted()
    return program


@pytest.mark.parametrize("devices", [1, 2])
def test_the_same_program_is_compiled_once(compilations, devices):
    first, second = compiled(devices=devices), compiled(devices=devices)
    assert len(compilations) == 1
    assert second.memory_analysis().output_size_in_bytes == first.memory_analysis().output_size_in_bytes > 0
    assert second.cost_analysis() == first.cost_analysis()


def test_another_program_for_the_same_shapes_is_compiled_and_takes_its_place(compilations, cache):
    for factor in (2.0, 3.0, 3.0):
        compiled(factor)
    assert len(compilations) == 2
    assert len(list(cache.iterdir())) == 1


def test_a_program_made_for_another_processor_version_flags_or_device_is_not_used(compilations, monkeypatch):
    compiled()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(last_program, "_processor", lambda: "another")
        compiled()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jax, "__version__", "0.0.0")
        compiled()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        compiled()
    compiled(first=1)
    assert len(compilations) == 5


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda _: None])
def test_a_damaged_or_missing_file_costs_a_compilation(compilations, cache, damage):
    compiled()
    (file,) = cache.iterdir()
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    compiled()
    assert len(compilations) == 2


def test_a_program_that_jax_had_in_its_cache_is_not_written_down(compilations, cache):
    """Read again, it would fail when it runs."""
    compiled()
    (file,) = cache.iterdir()
    file.unlink()
    compiled()
    assert not list(cache.iterdir())
    compiled()
    assert len(compilations) == 3


def test_a_cache_that_cannot_be_written_costs_no_run(compilations, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    compiled()
    assert cache.is_file() and len(compilations) == 1


def test_nothing_is_kept_where_flags_lie_in_a_file_whose_content_may_change(compilations, cache, tmp_path, monkeypatch):
    flags = tmp_path / "flags.txt"
    flags.write_text("--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("XLA_FLAGS", str(flags))
    compiled(), compiled()
    assert not cache.exists() and len(compilations) == 2


def test_what_a_killed_run_left_goes_with_the_next_program(cache):
    compiled()
    (file,) = cache.iterdir()
    file.with_name(f".{file.name}.123").write_bytes(b"half of it")
    compiled(3.0)
    assert list(cache.iterdir()) == [file]


def test_nothing_is_kept_without_a_cache(compilations, cache):
    use_cache(None, 0.0)
    compiled(), compiled()
    assert not cache.exists() and len(compilations) == 2


def test_the_garbage_collector_runs_again_afterwards(monkeypatch):
    seen = []
    monkeypatch.setattr(last_program, "_identity", lambda text, devices: seen.append(gc.isenabled()) or "same")
    compiled()
    assert seen == [False] and gc.isenabled()
