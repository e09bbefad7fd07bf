"""Every method in the real training step: state, clip, average and checkpoint know the trained leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mednext_jax import peft
from mednext_jax.nn.mednext import MedNeXt, parameter_shapes
from mednext_jax.train import checkpoints, devices, optimizer, step

OPTIM = {
    "name": "adamw", "b1": 0.9, "b2": 0.99, "eps": 1e-8, "momentum": 0.0, "nesterov": False, "weight_decay": 0.1,
    "clip_norm": 1e-3, "groups": (), "layer_decay": 1.0, "new_warmup_steps": 2,
}  # fmt: skip
OPTIONS = {"lora": {"rank": 2}, "conv_adapter": {"gamma": 2}}
NAMES = [*peft.METHODS, "lora+norm", "conv_adapter+linear_adapter+head"]


def every_leaf(flat, image):
    """In the network's place, for it compiles fast: a product that depends on all parameters."""
    total = sum(jnp.mean(jnp.square(leaf)) for leaf in flat.values())
    return image * total


def leaves_named(flat_state, part):
    """The paths of the parameters that one part of the state holds an array for."""
    return {path.split("/", 1)[1] for path in flat_state if path.startswith(f"{part}/")}


@pytest.mark.parametrize("name", NAMES)
def test_step_moves_clips_averages_and_saves_the_trained_leaves_alone(name, tmp_path):
    method = peft.create(name, **OPTIONS.get(name.split("+")[0], {}))
    model = MedNeXt(n_channels=4, n_classes=3, block_counts=(1, 0, 0, 0, 1, 0, 0, 0, 1), dim="2d",
                    do_res_up_down=False, adapters=method.adapters)  # fmt: skip
    random = np.random.default_rng(0)
    flat = {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in parameter_shapes(model).items()}
    trainable, frozen = peft.split(flat, method.rule)
    new = {path for path in trainable if "adapter" in path or "lora" in path}
    tx = optimizer.make_optimizer(OPTIM, trainable, new)
    pure = step.make_train_step(every_leaf, lambda y, label: jnp.mean(y), tx, ema_decay=0.5)
    mesh = devices.make_mesh(1)
    batch = {"image": np.ones((1, 2, 2, 2, 1), np.float32), "label": np.zeros((1, 2, 2, 2), np.int32)}
    before = step.init_state(trainable, tx, seed=0, use_ema=True)
    compiled = step.compile_step(pure, mesh, before, frozen, batch)
    state, kept = devices.replicate(mesh, (before, frozen))
    state, metrics = compiled(state, kept, devices.shard_batch(mesh, batch), devices.replicate(mesh, np.float32(0.1)))
    state, metrics = devices.to_host(state), jax.device_get(metrics)

    assert state.trainable.keys() == trainable.keys()
    assert all(not np.array_equal(state.trainable[path], leaf) for path, leaf in trainable.items())
    assert all(not np.array_equal(state.ema[path], leaf) for path, leaf in trainable.items())
    # d/dw of mean(w^2) is 2 w / n: the norm that is clipped is that of the trained leaves
    norm = np.sqrt(sum(np.sum(np.square(2 * leaf / leaf.size)) for leaf in trainable.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if np.ndim(leaf)]
    assert sum(np.count_nonzero(leaf) for leaf in moments) == 2 * sum(leaf.size for leaf in trainable.values())

    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(1, state, {"data": {}, "progress": {}, "config": {}}, None)
    saved.wait()
    restored = checkpoints.flatten_state(saved.restore(before, 1))
    saved.close()
    assert leaves_named(restored, "trainable") == leaves_named(restored, "ema") == trainable.keys()
    arrays = [leaf for path, leaf in restored.items() if np.ndim(leaf) and path != "key"]
    assert sum(np.count_nonzero(leaf) for leaf in arrays) == 4 * sum(leaf.size for leaf in trainable.values())
