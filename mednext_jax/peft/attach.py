"""Putting a method's additions into a network that has already been trained."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mednext_jax.nn import paths
from mednext_jax.nn.mednext import DIVISOR, parameter_shapes
from mednext_jax.peft import rules


def attach(
    model: Any,
    base_params: Mapping[str, Any],
    adapters: tuple,
    rule: rules.Rule,
    fresh: rules.Rule | None,
    key: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model with ``adapters``, and its nested parameters: the base's, and drawn ones where it has none.

    Raises:
      ValueError: the model has adapters already, the parameters are not its own, or the adapters or a rule do
        not fit.
    """
    adapted, wanted = fit(model, adapters, rule)
    base = paths.flatten(base_params)
    check_params(base, parameter_shapes(model), "the network")
    check_params(base, {path: leaf for path, leaf in wanted.items() if path in base}, "the adapted network")
    new = wanted.keys() - base.keys()
    if fresh is not None:
        new |= rules.split(wanted, fresh)[0].keys()
    return adapted, paths.unflatten({**base, **draw(adapted, key, new)})


def fit(model: Any, adapters: tuple, rule: rules.Rule) -> tuple[Any, dict[str, Any]]:
    """The model with ``adapters`` and the shapes of its flat parameters; nothing is computed.

    Raises:
      ValueError: the model has adapters already, or the adapters or a clause of the rule do not fit.
    """
    if model.adapters:
        raise ValueError(
            "the network has adapters already; start from its base (its run keeps it in <workdir>/base), "
            "or merge them first"
        )
    adapted = model.clone(adapters=tuple(adapters))
    shapes = parameter_shapes(adapted)
    rules.split(shapes, rule)  # every clause must match something
    return adapted, shapes


def draw(model: Any, key: Any, wanted: set[str] | None = None) -> dict[str, Any]:
    """The initial values of the ``wanted`` paths, or of all: arrays of NumPy or JAX.

    The network itself is only traced; what depends on the key alone is computed on the way, so nothing is compiled
    for it (a program that draws MedNeXt-S takes longer to compile than most of what it is then trained with).
    """
    drawn = {}
    model = model.clone(dtype=jnp.float32)  # values do not depend on it, and GPU kernels cannot be computed on the way
    if wanted is not None and not wanted:
        return drawn

    def network(x):
        with jax.ensure_compile_time_eval():
            drawn.update(paths.flatten(model.init(key, x)["params"]))

    x = jax.ShapeDtypeStruct((1, *(DIVISOR,) * int(model.dim[0]), model.in_channels), jnp.float32)
    jax.eval_shape(network, x)
    return {path: drawn[path] for path in sorted(drawn if wanted is None else wanted)}


@functools.cache
def compiled(model: Any) -> Any:
    """``(variables, x) -> logits`` of a network, one program per architecture and shape."""
    return jax.jit(model.apply)


def check_params(flat: Mapping[str, Any], expected: Mapping[str, Any], owner: str) -> None:
    """Raise one line unless ``flat`` has exactly the paths and shapes of ``expected``."""
    for verb, leaves in (
        ("lack", expected.keys() - flat.keys()),
        ("have the unexpected", flat.keys() - expected.keys()),
    ):
        if leaves:
            raise ValueError(
                f"the parameters {verb} {min(leaves)} ({len(leaves)} such): they are not those of {owner}"
            )
    for path, leaf in expected.items():
        if tuple(flat[path].shape) != tuple(leaf.shape):
            raise ValueError(
                f"{path} has shape {tuple(flat[path].shape)}, but {owner} needs {tuple(leaf.shape)}"
            )
