"""The loop and the devices: what travels between them, and that reading overlaps computing."""

import re

import jax
import numpy as np
import pytest

from mednext_jax.train import devices, experiment, loop


class Told:
    """A stream that calls ``tell(number of batches read)`` before it gives the next."""

    def __init__(self, stream, tell):
        self.stream, self.tell, self.count = stream, tell, 0

    def __next__(self):
        self.count += 1
        self.tell(self.count)
        return next(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.fixture(autouse=True)
def tiny_step(monkeypatch):
    """A step whose network is one product, which compiles fast; all around it is real."""
    build = experiment.train_step.make_train_step

    def product(flat, image):
        return image[..., :3] * flat["out_0/conv_out/bias"]

    monkeypatch.setattr(experiment.train_step, "make_train_step", lambda **parts: build(**parts | {"forward": product}))


class Unread:
    """A metric on the device: it can be waited for, but only ``jax.device_get`` may look at it."""

    def __init__(self, array):
        self.array = array

    def block_until_ready(self):
        self.array.block_until_ready()

    def __getattr__(self, name):
        raise AssertionError(f"a metric was asked for its {name} while steps run")

    __float__ = __bool__ = __array__ = lambda self, *rest: self.__getattr__("value")


def test_only_batches_and_rates_go_in_and_metrics_come_out_when_they_are_logged(
    config, open_data, tmp_path, monkeypatch
):
    config.log_every, config.eval.every, config.checkpoint_every, config.optim.total_steps = 3, 0, 100, 7
    into, out, steps = [], [], []
    real_put, real_get, advance = jax.make_array_from_process_local_data, jax.device_get, loop.Run.advance
    real_compile = loop.Run.compile

    def compile(run):  # on CPU the transfer guard lets through what comes out
        compiled = real_compile(run)

        def step(*arguments):
            state, metrics = compiled(*arguments)
            return state, jax.tree.map(Unread, metrics)

        return step

    def put(sharding, array, *rest):
        if steps:
            into.append((len(steps), np.shape(array)))
        return real_put(sharding, array, *rest)

    def get(tree):
        tree = jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, Unread) else leaf, tree)
        if steps:
            out.append((len(steps), sum(np.size(leaf) for leaf in jax.tree.leaves(tree))))
        return real_get(tree)

    def counted(run, stop):
        steps.append(run.step)
        with jax.transfer_guard("disallow"):  # whatever is not asked for by name raises
            advance(run, stop)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", put)
    monkeypatch.setattr(jax, "device_get", get)
    monkeypatch.setattr(loop.Run, "compile", compile)
    monkeypatch.setattr(loop.Run, "advance", counted)
    loop.fit(config, open_data(config), tmp_path)
    assert len(steps) == 7
    image, label, rate = (4, 16, 32, 16, 4), (4, 16, 32, 16), ()
    for step in range(1, 7):  # the first batch was read before the first step, the seventh step reads none
        assert sorted(shape for at, shape in into if at == step) == sorted([rate, image, label]), step
    assert [shape for at, shape in into if at == 7] == [rate]
    scalars = 4  # loss, gradient norm, skipped or not, learning rate
    assert [(at, size) for at, size in out if at < 7] == [(3, 3 * scalars), (6, 3 * scalars)]


def test_the_next_batch_is_read_while_the_step_runs_and_few_steps_are_ahead(
    config, open_data, tmp_path, monkeypatch, capsys
):
    events, compile_step, tick = [], loop.Run.compile, loop.RunLog.tick

    def dispatched(run):
        compiled = compile_step(run)
        events.append("compiled")

        def step(*arguments):
            events.append("dispatch")
            return compiled(*arguments)

        return step

    def finished(log):
        events.append("done")
        tick(log)

    monkeypatch.setattr(loop.Run, "compile", dispatched)
    monkeypatch.setattr(loop.RunLog, "tick", finished)
    config.log_every, config.eval.every, config.optim.total_steps = 100, 0, 5
    config.checkpoint_every = 100
    data = open_data(config, wrap=lambda stream: Told(stream, lambda count: events.append(f"read {count}")))
    loop.fit(config, data, tmp_path)
    assert events == [
        "read 1", "compiled", "dispatch", "read 2", "dispatch", "read 3", "dispatch", "read 4", "done", "dispatch",
        "read 5", "done", "dispatch", "done", "done", "done",
    ]  # fmt: skip
    assert re.search(r"^compiled in [\d.]+ s for \d+ cpu device", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("n_devices", [1, 4])
def test_a_batch_is_split_over_the_devices(n_devices):
    mesh = devices.make_mesh(n_devices)
    batch = {"image": np.arange(4 * 6, dtype=np.float32).reshape(4, 6)}
    array = devices.shard_batch(mesh, batch)["image"]
    assert {shard.data.shape for shard in array.addressable_shards} == {(4 // n_devices, 6)}
    np.testing.assert_array_equal(array, batch["image"])
