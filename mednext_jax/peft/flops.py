"""Arithmetic that a JAX function does, counted on its trace: nothing is compiled or run.

XLA's own figure counts the body of a loop once, and the network runs its blocks slab by slab in such loops on
a CPU. Here a loop's body counts as often as it runs. Dead code (the kernel gradient of a frozen depthwise
convolution) is left out, as the compiler leaves it out.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

# One operation per element of the result, as XLA counts them; everything not named moves data and counts
# nothing.
_ELEMENTWISE = {
    "abs", "add", "add_any", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "integer_pow", "log",
    "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt", "select_n", "sign", "sqrt", "square",
    "sub", "tanh",
}  # fmt: skip
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}


def flops(function: Callable, *args: Any) -> int:
    """Floating-point operations of ``function(*args)``; a multiply-add is two.

    Args: arrays or ``jax.ShapeDtypeStruct`` trees.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _count(closed.jaxpr, [True] * len(closed.jaxpr.outvars))


def _count(jaxpr: core.Jaxpr, wanted: Iterable[bool]) -> int:
    """Operations of those equations that some wanted output depends on."""
    live = {id(var) for var, want in zip(jaxpr.outvars, wanted, strict=True) if want}
    total = 0
    for equation in reversed(jaxpr.eqns):
        outputs = [id(var) in live for var in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        live.update(id(var) for var in equation.invars)
        total += _equation(equation, outputs)
    return total


def _equation(equation: core.JaxprEqn, outputs: list[bool]) -> int:
    name, params = equation.primitive.name, equation.params
    size = sum(math.prod(var.aval.shape) for var in equation.outvars)
    if name in _ELEMENTWISE:
        return size
    if name in _REDUCTIONS:
        return math.prod(equation.invars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = params["dimension_numbers"].rhs_spec[0]
        return 2 * size * math.prod(kernel) // kernel[features]
    if name == "scan":
        body = params["jaxpr"].jaxpr
        # What the loop carries keeps its shape; what it stacks gains an axis. (Parameter names differ by JAX version.)
        pairs = zip(equation.outvars, body.outvars, outputs, strict=True)
        wanted = [want or outer.aval.ndim == inner.aval.ndim for outer, inner, want in pairs]
        return params["length"] * _count(body, wanted)
    if name == "pallas_call":  # says itself what it does
        return params["cost_estimate"].flops
    if name == "cond":
        return max(_count(branch.jaxpr, outputs) for branch in params["branches"])
    return sum(
        _count(inner, outputs if len(inner.outvars) == len(outputs) else [True] * len(inner.outvars))
        for inner in _inner(params)
    )


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The traces that an equation calls (jit, checkpoint, custom derivatives, while)."""
    # JAX 0.12 has one type for both, with a property that leads from either to the open form.
    found = [value for value in params.values() if isinstance(value, core.ClosedJaxpr | core.Jaxpr)]
    return [getattr(value, "jaxpr", value) for value in found]
