"""The optimizer: one Optax transform over the trainable leaves, partitioned by label.

It only ever sees the flat dictionary of trainable parameters. Frozen ones are no part of it, so they can not
be moved, decayed, counted in the clip or given state: with frozen leaves inside, a clip or a gradient norm
outside the partition silently brings their gradients back.

What it computes, it computes on one vector per group: leaf by leaf, AdamW is some eight small kernels for each of
a network's 228 arrays, and a third of the time that the training step took to compile.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mednext_jax.peft import rules

NAMES = ("adamw", "sgd")
SHARES = 48  # a vector's length is a multiple, so that 2, 3, 4, 6, 8, 12, 16 or 24 devices can share its state


class Group(NamedTuple):
    """Leaves that share their treatment: multiplier of the learning rate, weight decay, warm-up steps."""

    lr_multiplier: float
    weight_decay: float
    warmup_steps: int


def is_decayed(path: str, leaf: Any) -> bool:
    """Whether weight decay suits a leaf: kernels yes; norms, biases, scales, shifts of any rank no."""
    name = path.rsplit("/", 1)[-1]
    return leaf.ndim > 1 and name not in ("bias", "scale") and not name.startswith(("grn_", "ssf_"))


def check_groups(groups: Iterable[Any]) -> None:
    """Raises ValueError unless every entry of ``config.optim.groups`` is a regex on paths and two factors."""
    for entry in groups:
        factors = entry[1:] if isinstance(entry, list | tuple) and len(entry) == 3 else ()
        if not factors or not isinstance(entry[0], str) or not all(_is_amount(factor) for factor in factors):
            raise ValueError(
                f"config.optim.groups: {entry!r} is not (regex, learning-rate factor, weight-decay factor), such as "
                "('adapter/', 3.0, 1.0)"
            )
        rules.compiled(entry[0], "config.optim.groups:")


def _is_amount(number: Any) -> bool:
    """Whether it is a number of at least 0."""
    return isinstance(number, int | float) and 0 <= number < math.inf


def assign_groups(
    trainable: Mapping[str, Any], config: Mapping[str, Any], new: Collection[str] = ()
) -> dict[str, Group]:
    """The group of every trainable path. Weight decay is for kernels: not for biases, norms and scales.

    Args:
      trainable: flat dict of arrays or shapes.
      config: ``weight_decay``; ``groups``: ``((regex, lr multiplier, decay multiplier), ...)``, the first
        whose regex is found in the path wins; ``layer_decay``: factor per stage of distance from the last
        head; ``new_warmup_steps``: extra linear warm-up of the parameters in ``new``.
      new: paths that did not come with the loaded weights (adapters, a re-initialised head).

    Raises: ValueError if a group is malformed or its regex matches no trainable path.
    """
    check_groups(config["groups"])
    unused = {pattern for pattern, _, _ in config["groups"]}
    last = rules.depth_of("out_0")
    groups = {}
    for path, leaf in trainable.items():
        lr, decay = 1.0, config["weight_decay"] if is_decayed(path, leaf) else 0.0
        for pattern, lr_multiplier, decay_multiplier in config["groups"]:
            if re.search(pattern, path):
                lr, decay = lr_multiplier, decay * decay_multiplier
                unused.discard(pattern)
                break
        if config["layer_decay"] != 1.0:
            lr *= config["layer_decay"] ** (last - rules.depth_of(path))
        groups[path] = Group(float(lr), float(decay), config["new_warmup_steps"] if path in new else 0)
    if unused:
        raise ValueError(f"config.optim.groups: {min(unused)!r} matches no trainable parameter")
    return groups


def _group_transform(group: Group, config: Mapping[str, Any]) -> optax.GradientTransformation:
    """From clipped gradients to a step for learning rate 1."""
    if config["name"] == "adamw":
        links = [optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"])]
    else:
        links = [optax.trace(decay=config["momentum"], nesterov=config["nesterov"])]
    if group.weight_decay:
        links.append(optax.add_decayed_weights(group.weight_decay))
    if group.warmup_steps:
        multiplier, steps = group.lr_multiplier, group.warmup_steps
        links.append(
            optax.scale_by_schedule(lambda count: multiplier * jnp.minimum(1.0, (count + 1) / steps))
        )
    elif group.lr_multiplier != 1.0:
        links.append(optax.scale(group.lr_multiplier))
    return optax.chain(*links)


def _scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Last link: multiplies by ``-learning_rate``, given at each update since validation may lower it."""

    def update(updates, state, params=None, *, learning_rate, **_):
        del params
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class Optimizer(NamedTuple):
    """An Optax transform over a flat dict of leaves, and the parts that it is made of.

    ``init(leaves)`` and ``update(gradients, state, leaves, learning_rate=...)`` are Optax's. A step that is to compile
    fast packs once and works on what it packed.

    Attributes:
      packed: the transform over ``{group: vector}``.
      layout: of every group its leaves in order, path and shape.
    """

    packed: optax.GradientTransformationExtraArgs
    layout: dict[str, list[tuple[str, tuple[int, ...]]]]

    def init(self, leaves: Mapping[str, Any]) -> Any:
        return self.packed.init(self.pack(leaves))

    def update(self, gradients: Mapping[str, Any], state: Any, leaves: Mapping[str, Any], *, learning_rate: Any):
        updates, state = self.packed.update(
            self.pack(gradients), state, self.pack(leaves), learning_rate=learning_rate
        )
        return self.unpack(updates), state

    def pack(self, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """``{group: vector}`` of a flat dict like the trainable one, each with zeros at its end; {} of {}.

        A zero whose gradient is zero stays zero under every transform that there is.
        """
        if not leaves:
            return {}
        return {group: _vector([leaves[path] for path, _ in members]) for group, members in self.layout.items()}

    def unpack(self, vectors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The flat dict that was packed."""
        leaves = {}
        for group, vector in vectors.items():
            start = 0
            for path, shape in self.layout[group]:
                end = start + math.prod(shape)
                leaves[path] = jax.lax.reshape(jax.lax.slice(vector, (start,), (end,)), shape)
                start = end
        return leaves


def _vector(leaves: list[Any]) -> jax.Array:
    rest = -sum(leaf.size for leaf in leaves) % SHARES
    return jnp.concatenate([*(jax.lax.reshape(leaf, (leaf.size,)) for leaf in leaves), jnp.zeros(rest, jnp.float32)])


def make_optimizer(config: Mapping[str, Any], trainable: Mapping[str, Any], new: Collection[str] = ()) -> Optimizer:
    """The transform for these trainable leaves: clip by global norm, then each group's own chain.

    Use: ``updates, state = tx.update(grads, state, params, learning_rate=rate)``.

    Args:
      config: ``name`` (``adamw``: b1, b2, eps; ``sgd``: momentum, nesterov), ``clip_norm`` (0: none) and what
        :func:`assign_groups` reads.
      trainable: flat dict of arrays or shapes.
      new: see :func:`assign_groups`.
    """
    if config["name"] not in NAMES:
        raise ValueError(f"config.optim.name is {config['name']!r}; it must be one of {', '.join(NAMES)}")
    for name in ("weight_decay", "clip_norm", "new_warmup_steps"):
        if not _is_amount(config[name]):
            raise ValueError(f"config.optim.{name} is {config[name]}: 0 or more is needed")
    if not trainable:
        raise ValueError("no parameter is trainable: the method's rule froze all of them")
    groups = assign_groups(trainable, config, new)
    names = {group: f"group_{i}" for i, group in enumerate(sorted(set(groups.values())))}
    layout = {name: [] for name in names.values()}
    for path, leaf in sorted(trainable.items()):
        layout[names[groups[path]]].append((path, leaf.shape))
    transforms = {name: _group_transform(group, config) for group, name in names.items()}
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    each_its_own = {name: name for name in layout}
    packed = optax.chain(*clip, optax.partition(transforms, each_its_own), _scale_by_given_rate())
    return Optimizer(packed, layout)
