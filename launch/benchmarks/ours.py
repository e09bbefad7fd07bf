"""Our network's steps, depthwise operations and fine-tuning methods, as things to time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import apart, timing
from benchmarks.timing import OURS, SEPARATOR, Facts, Work, compiled
from mednext_jax import peft
from mednext_jax.nn.depthwise import depthwise_conv, depthwise_conv_transpose
from mednext_jax.nn.mednext import MedNeXt, create_mednext
from mednext_jax.peft import cost

Network = dict[str, Any]  # variant, kernel_size, deep_supervision, dtype, remat
N_CLASSES = 4
KERNEL_SIZE = 3  # of the depthwise operations
OPERATIONS = {
    "stride 1": depthwise_conv,
    "stride 2": lambda x, w: depthwise_conv(x, w, 2),
    "transpose": depthwise_conv_transpose,
}
PASSES = ("forward", "input gradient", "kernel gradient")
STEPS = ("forward", "forward+backward")


def model_of(network: Network) -> MedNeXt:
    """The network that the command line describes, four channels to four classes."""
    return create_mednext(
        network["variant"], N_CLASSES, network["kernel_size"], network["deep_supervision"],
        dtype=jnp.dtype(network["dtype"]), remat=network["remat"],
    )  # fmt: skip


def step_works(network: Network, batch: int, size: int) -> list[Work]:
    """Forward, and forward + backward with respect to every parameter, of a mean-square loss."""
    arguments = (network, batch, size)
    return [Work(f"{name}{SEPARATOR}{OURS}", _step, (*arguments, name)) for name in STEPS]


def _step(network: Network, batch: int, size: int, what: str) -> tuple[Callable[[], Any], Facts]:
    model = model_of(network)
    x = jax.random.normal(jax.random.key(0), (batch, size, size, size, 4))
    params = jax.jit(model.init)(jax.random.key(1), x[:1, :16, :16, :16])["params"]

    def forward(params, x):
        return model.apply({"params": params}, x)

    def loss(params, x):
        return sum(jnp.mean(jnp.square(y)) for y in jax.tree.leaves(forward(params, x)))

    return compiled(forward if what == STEPS[0] else jax.value_and_grad(loss), params, x)


def depthwise_works(batch: int, size: int, channels: int, dtype: str) -> list[Work]:
    """Each depthwise operation and its gradients; the copy of an array is the floor of one pass."""
    shape = (batch, size, channels, dtype)
    works = [Work("copy", _copy, shape)]
    for operation in OPERATIONS:
        works += [Work(f"{operation} {p}{SEPARATOR}{OURS}", _depthwise, (*shape, operation, p)) for p in PASSES]
    return works


def _copy(batch: int, size: int, channels: int, dtype: str) -> tuple[Callable[[], Any], Facts]:
    return compiled(lambda x: x + 1, jnp.ones((batch, size, size, size, channels), dtype))


def _depthwise(
    batch: int, size: int, channels: int, dtype: str, name: str, which: str
) -> tuple[Callable[[], Any], Facts]:
    operation = OPERATIONS[name]
    edge = size // 2 if name == "transpose" else size
    x = jax.random.normal(jax.random.key(0), (batch, edge, edge, edge, channels), jnp.dtype(dtype))
    w = jax.random.normal(jax.random.key(1), (*(KERNEL_SIZE,) * 3, 1, channels), jnp.dtype(dtype))
    if which == "forward":
        return compiled(operation, x, w)
    shape = jax.eval_shape(operation, x, w)
    g = jax.random.normal(jax.random.key(2), shape.shape, shape.dtype)
    position = PASSES.index(which) - 1
    return compiled(lambda x, w, g: jax.vjp(operation, x, w)[1](g)[position], x, w, g)


def method_of(text: str) -> peft.Method:
    """A method from ``name`` or ``name:option=value:option=value``.

    Raises:
      ValueError: no such method or option.
    """
    name, *given = text.split(":")
    options: dict[str, Any] = {}
    for setting in given:
        option, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--methods: {setting!r} of {text!r} is no option=value, like targets=decoder")
        options[option] = _value(value)
    return peft.create(name, **options)


def _value(text: str) -> Any:
    """A number, true or false as JSON writes them; anything else is the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def peft_rows(
    network: Network, size: int, batch: int, repeats: int, names: list[str], peers: Sequence[Work] = (),
    memory: bool = False,
) -> tuple[str, list[dict[str, Any]]]:
    """Parameters, file, FLOPs, memory and time of each method's compiled step: as Markdown, and as rows.

    Each row says its share of the first's, ``full``'s; its seconds are medians of steps that the methods do in turn.

    Args:
      peers: other libraries' training steps, whose rows come last; then each method has a process of its own, too.
      memory: with peers, also the peak memory of each.
    """
    texts = list(dict.fromkeys(["full", *(names or peft.METHODS)]))
    methods = [method_of(text) for text in texts]
    model = model_of(network)
    for method in methods:
        method.shapes_on(model)  # refuses one that does not fit before others are compiled
    known = peft.costs(methods, model, (size,) * 3, batch)
    works = [Work(known_cost.method.replace("`", ""), _method, (network, batch, size, text))
             for known_cost, text in zip(known, texts, strict=True)]  # fmt: skip
    timed = apart.beside(works, peers, repeats, memory)
    timed, others = timed[: len(works)], timed[len(works) :]
    costs = [replace(known_cost, temporary_bytes=round(1e9 * row["temporaries_gb"]), step_seconds=row["seconds"])
             for known_cost, row in zip(known, timed, strict=True)]  # fmt: skip
    rows = [asdict(cost) | row for cost, row in zip(costs, timed, strict=True)]
    for row in rows:
        shares = ("step_flops", "predict_flops", "temporary_bytes", "step_seconds", "gbytes")
        row["ratio_to_full"] = {name: row[name] / rows[0][name] for name in shares}
    return peft.markdown(costs), rows + others


def _method(network: Network, batch: int, size: int, text: str) -> tuple[Callable[[], Any], Facts]:
    model = model_of(network)
    x = jax.ShapeDtypeStruct((batch, *(size,) * 3, model.in_channels), jnp.float32)
    step, arguments = cost.step_of(method_of(text), model, x)
    program = cost.compile_step(step, arguments)
    return cost.runner(program, arguments), timing.costs(program, step, arguments)
