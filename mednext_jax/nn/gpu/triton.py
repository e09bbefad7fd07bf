"""Launching our own kernels on an NVIDIA GPU: written in Pallas, compiled by Triton, for bfloat16.

They are there where XLA takes a multiple of the time that a kernel does (docs/performance.md). Other devices, other
types, sizes that a kernel was not written for and ``MEDNEXT_JAX_KERNELS=off`` run what stands in mednext_jax/nn beside
the call; under vmap, and when a kernel is differentiated, its ``reference`` does the same by XLA.

Kernels see arrays as flat and compute offsets themselves; blocks have sizes that are powers of two.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

try:
    from jax.experimental.pallas import triton
except ImportError:  # a later JAX may be without
    triton = None

SWITCH = "MEDNEXT_JAX_KERNELS"  # read when a function is traced: a process that has begun keeps what it has traced
MOST_ELEMENTS = 2**31 - 1  # offsets are 32-bit
interpreted = False  # tests run the kernels on a CPU

load = triton and triton.load
store = triton and triton.store
place = pl.program_id


def load_wide(reference: Any, mask: Array) -> Array:
    """A bfloat16 block as float32, zeros where ``mask`` is not."""
    block = load(reference, mask=mask, other=0.0)
    if interpreted:
        return block.astype(jnp.float32)
    # Two numbers lie in a register: an instruction for each, where Triton's compiler takes three for both.
    halves = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return _instruction(halves, block, constraints="=r,=r,r", pack=2)


def multiply_add(a: Array, b: Array, c: Array | float) -> Array:
    """``a * b + c`` of float32 blocks in one instruction, which Triton's compiler does not make of two."""
    b, c = (jnp.broadcast_to(jnp.asarray(other, jnp.float32), a.shape) for other in (b, c))
    return a * b + c if interpreted else _instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def power_of_two(x: Array) -> Array:
    """2^x of a float32 block, to 22 bits."""
    return jnp.exp2(x) if interpreted else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


def _instruction(text: str, *blocks: Array, constraints: str = "", pack: int = 1) -> Array:
    """A float32 block of what ``text`` makes of ``pack`` numbers of each block; constraints: all in float registers."""
    shape = jax.ShapeDtypeStruct(blocks[0].shape, jnp.float32)
    constraints = constraints or ",".join(["=f", *("f" for _ in blocks)])
    (result,) = triton.elementwise_inline_asm(
        text, args=blocks, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return result


def divided(number: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of an index, which is not negative."""
    by = jnp.asarray(by, number.dtype)
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def within(index: Array, size: int) -> Array:
    """Whether ``0 <= index < size``, by one comparison: as an unsigned number a negative one is large."""
    return jax.lax.bitcast_convert_type(index, jnp.uint32) < jnp.uint32(size)


def usable(*arrays: Array) -> bool:
    """Whether kernels for arrays like these can be run on what is traced for."""
    if triton is None or jax.default_backend() != "gpu" or os.environ.get(SWITCH) == "off" or not _capable():
        return False
    return all(array.dtype == jnp.bfloat16 and array.size <= MOST_ELEMENTS for array in arrays)


def _capable() -> bool:
    """Whether the card multiplies bfloat16: NVIDIA's from compute capability 8.0 on."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "8.0"))  # without one it is not run but compiled
    return capability.split(".")[0].isdecimal() and int(capability.split(".")[0]) >= 8


def block(size: int, most: int) -> int:
    """The size of a block over an axis of ``size``: a power of two that divides it, of at most ``most``.

    Where those are below 16 and the axis is longer, the smallest power of two that covers it, of at most ``most``: what
    lies outside is masked.
    """
    divisor = min(size & -size, most)
    return divisor if divisor >= min(16, size) else min(1 << (size - 1).bit_length(), most)


def warps(elements: int, each: int) -> int:
    """Warps that give every thread of a block so many elements; eight of bfloat16 are one load."""
    return min(max(elements // (32 * each), 1), 8)


def launch(
    kernel: Callable, grid: Sequence[int], results: Sequence[jax.ShapeDtypeStruct], arguments: Sequence[Array],
    flops: int, warps: int, stages: int = 1,
) -> list[Array]:  # fmt: skip
    """Runs ``kernel(*argument refs, *result refs)``, all of them flat, for every place of the grid.

    Args:
      flops: operations that it does in all, for those who count them (mednext_jax/peft/flops.py).
      stages: loads of a loop that the kernel issues ahead, plus one.
    """
    flat = [jax.ShapeDtypeStruct((math.prod(result.shape),), result.dtype) for result in results]
    options = {} if interpreted else {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}
    moved = sum(array.size * array.dtype.itemsize for array in (*arguments, *flat))
    cost = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
    call = pl.pallas_call(kernel, flat, grid=tuple(grid), interpret=interpreted, cost_estimate=cost, **options)
    found = call(*(argument.reshape(-1) for argument in arguments))
    return [array.reshape(result.shape) for array, result in zip(found, results, strict=True)]


def with_reference(fast: Callable, reference: Callable, split: Sequence[bool], n_results: int) -> Callable:
    """``fast(*arrays)``, several arrays; under vmap, and when it is differentiated, ``reference(*arrays)`` instead.

    Over several devices each runs ``fast`` on its own samples, by the one axis of the mesh in whose context this is
    traced, as ``mednext_jax/train/step.py`` does.

    Args:
      split: of every argument whether its first axis is the batch; the first axis of every result is.
    """

    def once(*arguments: Array) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        within_map = not mesh.empty and set(mesh.axis_types) == {AxisType.Manual}  # shard_map, pmap: divided already
        if jax.device_count() == 1 or (not mesh.empty and mesh.size == 1) or within_map:
            return tuple(fast(*arguments))
        if not mesh.empty and len(mesh.axis_names) == 1:
            (axis,) = mesh.axis_names
            places = tuple(PartitionSpec(axis) if is_split else PartitionSpec() for is_split in split)
            run = jax.shard_map(
                lambda *parts: tuple(fast(*parts)), mesh=mesh, in_specs=places,
                out_specs=(PartitionSpec(axis),) * n_results, check_vma=False,
            )  # fmt: skip
            return run(*arguments)
        return _on_every_device(fast, tuple(split))(*arguments)

    batched = jax.custom_batching.custom_vmap(once)

    @batched.def_vmap
    def _(axis_size: int, mapped: list[bool], *arguments: Array) -> tuple:
        axes = [0 if is_mapped else None for is_mapped in mapped]
        return jax.vmap(reference, axes, axis_size=axis_size)(*arguments), (True,) * n_results

    whole = jax.custom_jvp(batched)
    whole.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
    return whole


def _on_every_device(fast: Callable, split: tuple[bool, ...]) -> Callable:
    """Without a mesh to go by. XLA cannot divide a kernel by itself: it would gather the batch on every device.

    JAX finds no program with this in its persistent cache: it names a function by its place in memory.
    """
    from jax.experimental.custom_partitioning import custom_partitioning

    divided = custom_partitioning(lambda *arguments: tuple(fast(*arguments)))

    def sharding(mesh: Any, shape: Any, axis: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(axis, *(None,) * (len(shape.shape) - 1)))

    def axis_of(arguments: Sequence[Any]) -> Any:
        for argument, is_split in zip(arguments, split, strict=True):
            if is_split and argument.sharding is not None and len(spec := argument.sharding.spec):
                return spec[0]
        return None

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]):
        axis = axis_of(arguments)
        given = tuple(sharding(mesh, a, axis if s else None) for a, s in zip(arguments, split, strict=True))
        return mesh, lambda *parts: tuple(fast(*parts)), tuple(sharding(mesh, r, axis) for r in results), given

    def infer(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]):
        return tuple(sharding(mesh, result, axis_of(arguments)) for result in results)

    # Of every array the first axis, "b", and the others, each a factor of its own.
    def rule(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> str:
        names = (f"x{i}" for i in range(10_000))

        def one(shape: Sequence[int], is_split: bool) -> str:
            axes = [next(names) for _ in shape]
            return " ".join(["b", *axes[1:]] if is_split else axes)

        left = ", ".join(one(a.shape, s) for a, s in zip(arguments, split, strict=True))
        return f"{left} -> {', '.join(one(r.shape, True) for r in results)}"

    divided.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return divided


kept = functools.cache  # kernels with the same sizes are one function, so that JAX traces them once
