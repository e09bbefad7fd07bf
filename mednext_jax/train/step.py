"""The training state and the one jitted step, for any number of devices.

``step(state, frozen, batch, learning_rate) -> (state, metrics)`` does no I/O and reads no clock. The gradient
is taken with respect to the trainable leaves alone: the frozen ones are another argument, so the compiler
never makes their gradients (measured on a toy: 882 instead of 1479 MFLOP), and the donated state holds what
is trained and no more.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mednext_jax.train import devices, last_program
from mednext_jax.train.optimizer import Optimizer

Flat = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes during training, beside the data position.

    Attributes:
      step: int32, number of steps taken, skipped ones included.
      trainable: flat dict of parameters.
      optimizer: state of the Optax transform, over ``trainable`` only, packed as :class:`Optimizer` has it.
      ema: flat dict like ``trainable``, or an empty one without averaging.
      bad_steps: int32, number of steps skipped for a loss or gradient that was not finite.
      key: uint32 data of the run's random key; step ``k`` uses ``fold_in(key, k)``.
    """

    step: jax.Array
    trainable: Flat
    optimizer: Any
    ema: Flat
    bad_steps: jax.Array
    key: jax.Array


def init_state(trainable: Flat, tx: Optimizer, seed: int, use_ema: bool) -> TrainState:
    """The state before the first step, on the host; the average starts at the initial parameters."""
    own = devices.to_host(dict(trainable))
    # Every transform of ``optimizer.py`` starts at zero; made on a device, each shape would be a program to compile.
    optimizer = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(tx.init, own))
    return TrainState(
        step=np.zeros((), np.int32),
        trainable=own,
        optimizer=optimizer,
        ema=devices.to_host(own) if use_ema else {},
        bad_steps=np.zeros((), np.int32),
        key=np.array(jax.random.key_data(jax.random.key(seed))),
    )


def evaluated(state: TrainState) -> Flat:
    """The trainable leaves that are validated and exported: the average where there is one."""
    return state.ema or state.trainable


def _split_batch(array: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...), every part with samples of every device.

    Sample ``i`` goes to part ``i % parts``: the split leaves each device's samples where they are.
    """
    return jnp.swapaxes(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 0, 1)


def _loss_and_grads(objective: Callable, trainable: Flat, image: jax.Array, label: jax.Array, parts: int):
    """Loss and gradient of the batch, or their means over micro-batches taken one after the other.

    The scan keeps one micro-batch's activations. Means are exact for losses that average over samples; a
    batch Dice becomes one per micro-batch.
    """
    if parts == 1:
        return jax.value_and_grad(objective)(trainable, image, label)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(objective)(trainable, *micro_batch)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    total, _ = jax.lax.scan(add, zero, (_split_batch(image, parts), _split_batch(label, parts)))
    return jax.tree.map(lambda t: t / parts, total)


def _average(ema: Flat, trainable: Flat, decay: float, step: jax.Array) -> Flat:
    """Exponential average; its decay rises to ``decay`` so that the first steps do not linger."""
    if not ema:
        return ema
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trainable)


def _if(wanted: jax.Array, new: Callable[[], Any], old: Any) -> Any:
    """``new()`` or ``old``.

    On CPU by a branch, whose results XLA does not compute again in every slice that is taken of them. On a GPU by a
    selection: a branch there makes the host wait for the gradient before it can send the next batch.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(wanted, new, lambda: old)
    return jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new(), old)


def make_train_step(
    forward: Callable[[Flat, jax.Array], Any],
    loss: Callable[[Any, jax.Array], jax.Array],
    tx: Optimizer,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Flat, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """Builds the step; nothing in it is read from outside later.

    Args:
      forward: ``(all parameters as a flat dict, image (B, D, H, W, C)) -> outputs``.
      loss: ``(outputs, label (B, D, H, W)) -> scalar``.
      tx: transform over the trainable leaves.
      augment: ``(key, image, label) -> (image, label)`` on the device, or None.
      accumulate: micro-batches that each batch is cut into; it must divide the batch.
      ema_decay: used if the state holds an average.

    Returns: the step, to be jitted by :func:`compile_step`. Its metrics are scalars: ``loss``, ``grad_norm``
    (before clipping) and ``bad`` (1 if the step was skipped). A loss or gradient that is not finite leaves
    parameters, optimizer and average as they were; the step count and with it the random key move on.
    """

    def step(
        state: TrainState, frozen: Flat, batch: Mapping[str, jax.Array], learning_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        image, label = batch["image"], batch["label"]
        if augment is not None:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            image, label = augment(key, image, label)

        def objective(trainable: Flat, image: jax.Array, label: jax.Array) -> jax.Array:
            return loss(forward({**frozen, **trainable}, image), label)

        value, grads = _loss_and_grads(objective, state.trainable, image, label, accumulate)
        grads, own, ema = tx.pack(grads), tx.pack(state.trainable), tx.pack(state.ema)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm)

        def taken() -> tuple:
            updates, optimizer = tx.packed.update(grads, state.optimizer, own, learning_rate=learning_rate)
            moved = optax.apply_updates(own, updates)
            return moved, optimizer, _average(ema, moved, ema_decay, state.step)

        own, optimizer, ema = _if(good, taken, (own, state.optimizer, ema))
        bad = 1 - good.astype(jnp.int32)
        new_state = TrainState(
            state.step + 1, tx.unpack(own), optimizer, tx.unpack(ema), state.bad_steps + bad, state.key
        )
        return new_state, {"loss": value, "grad_norm": grad_norm, "bad": bad}

    return step


def state_shardings(mesh: jax.sharding.Mesh, state: TrainState, shard_optimizer: bool) -> TrainState:
    """Where the leaves of a state lie: on every device, or the optimizer's one slice on each.

    Split moments save memory (AdamW holds two arrays per parameter) and cost a gather of the updates. What is
    computed is the same.
    """
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: same, state)
    if not shard_optimizer:
        return shardings
    return shardings._replace(optimizer=devices.split_shardings(mesh, state.optimizer))


def compile_step(
    step: Callable,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    frozen: Flat,
    batch: Mapping,
    shard_optimizer: bool = False,
):
    """Compiles the step for these shapes, before any batch is there.

    Args:
      mesh: one axis ``data``; the batch is split over it, parameters are the same on every device.
      state, frozen, batch: arrays or ``ShapeDtypeStruct``; the batch with its global shapes.
      shard_optimizer: see :func:`state_shardings`.

    Returns: the compiled step. It donates ``state``: the old one is gone after the call.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, frozen, dict(batch), np.float32(0))
    )
    leaves, structure = jax.tree.flatten(shapes)
    return _compiled(step, mesh, structure, tuple(leaves), shard_optimizer)


@functools.lru_cache(maxsize=16)
def _compiled(step: Callable, mesh: jax.sharding.Mesh, structure: Any, leaves: tuple, shard_optimizer: bool):
    """Kept for the next run of this process with the same step: compiling may take longer than a small run."""
    shapes = jax.tree.unflatten(structure, leaves)
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    held = state_shardings(mesh, shapes[0], shard_optimizer)
    jitted = jax.jit(
        step, in_shardings=(held, same, split, same), out_shardings=(held, same), donate_argnums=0
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which the kernels for GPUs ask for
        return last_program.compiled(jitted, shapes, list(mesh.devices.flat))
