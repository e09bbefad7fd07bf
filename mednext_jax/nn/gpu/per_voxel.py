"""What mednext_jax/nn/voxelwise.py hands to the kernels of mednext_jax/nn/gpu/mlp.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from mednext_jax.nn.gpu import mlp, triton


@dataclass(frozen=True)
class PerVoxel:
    """A function of voxels and weights that is two matrix products with a GELU between them.

    Attributes:
      run: ``(x, weights) -> result``.
      matrices: ``weights -> Matrices`` that say the same, for the kernels.
    """

    run: Callable[[Array, Any], Array]
    matrices: Callable[[Any], mlp.Matrices]

    def __call__(self, x: Array, weights: Any) -> Array:
        return self.run(x, weights)


def taken(f: Callable, y: Array, weights: Any) -> mlp.Matrices | None:
    """What the kernels need of the weights, or None if they cannot do ``f`` of y (B, *spatial, C)."""
    if not isinstance(f, PerVoxel) or not triton.usable(y):
        return None
    matrices = f.matrices(weights)
    return matrices if mlp.usable(y, matrices) else None


def norm_of(statistics: tuple[Array, Array] | None, norm: Any) -> mlp.Norm | None:
    """The norm as the kernels take it: from its statistics (B, 1, ..., 1, C), scale and bias."""
    if norm is None:
        return None
    mean, rstd = (a.reshape(-1, a.shape[-1]) for a in statistics)
    return mlp.Norm(mean, rstd, norm.scale, norm.bias)


def gradients(
    matrices_of: Callable[[Any], mlp.Matrices], learnt: Any, norm: mlp.Norm | None, y: Array, g: Array, d_n: bool
) -> tuple[Array | None, tuple[Array, Array] | None, Any]:
    """The gradient of the norm's result; its sums and those with x_hat, (B, 1, ..., 1, C); that of the learnt weights.

    Args:
      matrices_of: makes the matrices of the learnt weights, which ``learnt`` is a tree of, None where one is frozen.
      y, g: what the norm takes (B, *spatial, C), and the gradient of the result (B, *spatial, O).
      d_n: whether the norm's gradients are wanted. If any weight learns, all four of the matrices' are made.
    """
    needs_weights = bool(jax.tree.leaves(learnt))
    matrices, to_weights = jax.vjp(matrices_of, learnt)
    found = mlp.gradients(y, g.astype(y.dtype), norm, matrices, d_n, needs_weights)
    sums = None
    if norm is not None and d_n:
        sums = tuple(a.reshape(a.shape[0], *(1,) * (y.ndim - 2), -1) for a in (found.total, found.moment))
    return found.d_n, sums, to_weights(found.matrices)[0] if needs_weights else learnt
