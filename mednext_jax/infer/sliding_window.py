"""Whole volumes through a network that sees patches: overlapping windows, weighted and averaged.

The network is compiled once, for one batch of windows, whatever the volumes' shapes. Cutting windows out of
a volume and adding them to the sums are small programs of their own, and volumes are padded at their end to
multiples of ``BUCKET_VOXELS`` so that even these meet few shapes. Positions and weights follow the true
shape: the padding never shows in the result.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mednext_jax.infer import windows

BUCKET_VOXELS = 32
BATCHES_IN_FLIGHT = 2  # dispatched ahead: the device never waits, and memory stays bounded
UNKNOWN_DEVICE_BYTES = 8 << 30  # for a device that does not report its memory, such as a CPU
ACTIVATIONS = {None: lambda logits: logits, "sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}


class Programs(NamedTuple):
    """The compiled programs of a :class:`SlidingWindow` and where their arrays lie."""

    window: Callable  # (params, weights, windows, mirrors, valid) -> weighted outputs
    cut: Callable  # (volume, starts) -> windows
    add: Callable  # (sums, weighted outputs, starts) -> sums, in place
    average: Callable  # sums -> outputs
    zeros: Callable  # shape -> sums
    weights: jax.Array
    everywhere: NamedSharding  # one copy on each device
    dealt: NamedSharding  # the batch dealt out to the devices


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Predicts whole volumes with a network that was trained on patches; keep it, it holds compiled programs.

    Attributes:
      apply: ``(params, x (B, d, h, w, C)) -> logits (B, d, h, w, K)``, or a list whose first is taken.
      patch_voxels: (d, h, w) of a window. A smaller volume is padded with zeros on both sides (the odd voxel
        at the end) and cropped again.
      n_outputs: K.
      overlap: share of a window that its neighbour covers, in [0, 1).
      mode: weights inside a window, ``"gaussian"`` or ``"constant"``.
      sigma_scale: standard deviation of the Gaussian, in window sizes.
      windows_per_batch: windows in one call of ``apply``, dealt out to the local devices if these divide
        their number; if not, one device works alone.
      flips: average over the eight mirror images too; a batch mixes windows and mirror images freely.
      activation: ``"sigmoid"``, ``"softmax"`` or None, applied to each window before averaging, so that
        probabilities are averaged (None: logits).
      accumulate: where the volume and the sums lie: ``"device"``, ``"host"`` (only windows travel to the
        device), or ``"auto"``: on the device if they take at most ``device_bytes``.
      device_bytes: see ``accumulate``; None means half of the device's memory.
    """

    apply: Callable[[Any, jax.Array], Any]
    patch_voxels: tuple[int, int, int]
    n_outputs: int
    overlap: float = 0.5
    mode: str = "gaussian"
    sigma_scale: float = 0.125
    windows_per_batch: int = 1
    flips: bool = False
    activation: str | None = None
    accumulate: str = "auto"
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_voxels", tuple(int(n) for n in self.patch_voxels))
        if len(self.patch_voxels) != 3 or min(self.patch_voxels) < 1:
            raise ValueError(f"patch_voxels is {self.patch_voxels}; it needs three sizes of at least 1")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and less than 1")
        if self.windows_per_batch < 1:
            raise ValueError(f"windows_per_batch is {self.windows_per_batch}; it must be at least 1")
        if self.mode not in ("gaussian", "constant"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'gaussian' or 'constant'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; it must be 'sigmoid', 'softmax' or None")
        if self.accumulate not in ("auto", "device", "host"):
            raise ValueError(f"accumulate is {self.accumulate!r}; it must be 'auto', 'device' or 'host'")

    def predict(
        self, params: Any, image: np.ndarray, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """The averaged output of the network for one volume.

        Args:
          params: what ``apply`` takes, on the host or on local devices.
          image: (D, H, W, C) of any real dtype; computed in float32.
          progress: called with (windows done, windows in all); mirror images count as windows.

        Returns: (D, H, W, K) float32 on the host.
        """
        if np.ndim(image) != 4 or 0 in np.shape(image):
            raise ValueError(f"the image has shape {np.shape(image)}, not (depth, height, width, channels)")
        sizes = list(zip(image.shape[:3], self.patch_voxels, strict=True))
        shape = tuple(max(size, patch) for size, patch in sizes)
        inner = tuple(slice(max(p - n, 0) // 2, max(p - n, 0) // 2 + n) for n, p in sizes)
        on_device = self._fits_device(shape, image.shape[3])
        volume = np.zeros((*(_bucket(shape) if on_device else shape), image.shape[3]), np.float32)
        volume[inner] = image
        starts = windows.window_starts(shape, self.patch_voxels, self.overlap)
        batches = list(windows.batches(starts, self.flips, self.windows_per_batch))
        counts = [int(batch.valid.sum()) for batch in batches]

        def finished(n_batches: int) -> None:
            if progress is not None:
                progress(sum(counts[:n_batches]), sum(counts))

        params = jax.device_put(jax.tree.map(_addressable, params), self._programs.everywhere)
        average = self._average_on_device if on_device else self._average_on_host
        with jax.sharding.use_abstract_mesh(self._programs.everywhere.mesh.abstract_mesh):  # the kernels for GPUs ask
            return np.ascontiguousarray(average(params, volume, batches, finished)[inner])

    def _average_on_device(
        self, params: Any, volume: np.ndarray, batches: list[windows.Batch], finished: Callable[[int], None]
    ) -> np.ndarray:
        """Volume and sums stay on the device; only window positions go in, and the result comes out."""
        programs, in_flight = self._programs, deque()
        sums = programs.zeros((*volume.shape[:3], self.n_outputs + 1))
        volume = jax.device_put(volume, programs.everywhere)
        for i, batch in enumerate(batches):
            batch = jax.device_put(batch, programs.everywhere)
            cut = programs.cut(volume, batch.starts)
            in_flight.append(programs.window(params, programs.weights, cut, batch.mirrors, batch.valid))
            sums = programs.add(sums, in_flight[-1], batch.starts)
            if len(in_flight) > BATCHES_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
                finished(i + 1 - BATCHES_IN_FLIGHT)
        result = jax.device_get(programs.average(sums))
        finished(len(batches))
        return result

    def _average_on_host(
        self, params: Any, volume: np.ndarray, batches: list[windows.Batch], finished: Callable[[int], None]
    ) -> np.ndarray:
        """Volume and sums stay on the host, which adds up one batch while the device computes the next."""
        programs, in_flight = self._programs, deque()
        sums = np.zeros((*volume.shape[:3], self.n_outputs + 1), np.float32)

        def places(batch: windows.Batch) -> list[tuple[slice, ...]]:
            return [tuple(map(slice, start, start + self.patch_voxels)) for start in batch.starts]

        for i, batch in enumerate([*batches, None]):
            if batch is not None:
                cut = jax.device_put(np.stack([volume[place] for place in places(batch)]), programs.dealt)
                mirrors, valid = jax.device_put((batch.mirrors, batch.valid), programs.everywhere)
                in_flight.append((batch, programs.window(params, programs.weights, cut, mirrors, valid)))
            if i > 0:
                earlier, weighted = in_flight.popleft()
                for place, values in zip(places(earlier), jax.device_get(weighted), strict=True):
                    sums[place] += values
                finished(i)
        return sums[..., :-1] / sums[..., -1:]

    def _fits_device(self, shape: tuple[int, ...], channels: int) -> bool:
        """Whether volume, sums and result may lie on the device."""
        if self.accumulate != "auto":
            return self.accumulate == "device"
        needed = 4 * int(np.prod(_bucket(shape))) * (channels + 2 * self.n_outputs + 1)
        if self.device_bytes is not None:
            return needed <= self.device_bytes
        statistics = jax.local_devices()[0].memory_stats() or {}
        return needed <= statistics.get("bytes_limit", UNKNOWN_DEVICE_BYTES) // 2

    @functools.cached_property
    def _programs(self) -> Programs:
        devices = jax.local_devices()
        if self.windows_per_batch % len(devices):
            devices = devices[:1]
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        everywhere, dealt = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        weights = windows.importance_map(self.patch_voxels, self.mode, self.sigma_scale)
        return Programs(
            window=jax.jit(self._weighted_outputs, out_shardings=everywhere),
            cut=jax.jit(functools.partial(_cut, patch_voxels=self.patch_voxels), out_shardings=dealt),
            add=jax.jit(_add, donate_argnums=0, out_shardings=everywhere),
            average=jax.jit(_average),
            zeros=jax.jit(jnp.zeros, static_argnums=0, out_shardings=everywhere),
            weights=jax.device_put(weights, everywhere),
            everywhere=everywhere,
            dealt=dealt,
        )

    def _weighted_outputs(
        self, params: Any, weights: jax.Array, cut: jax.Array, mirrors: jax.Array, valid: jax.Array
    ) -> jax.Array:
        """(B, d, h, w, C) windows -> (B, d, h, w, K + 1): outputs times weights, and the weights."""
        logits = self.apply(params, _mirror(cut, mirrors) if self.flips else cut)
        if isinstance(logits, list | tuple):
            logits = logits[0]
        expected = (*cut.shape[:-1], self.n_outputs)
        if logits.shape != expected:
            raise ValueError(f"the network returns {logits.shape} for windows {cut.shape}, not {expected}")
        outputs = ACTIVATIONS[self.activation](logits.astype(jnp.float32))
        outputs = _mirror(outputs, mirrors) if self.flips else outputs
        counted = jnp.concatenate([outputs, jnp.ones_like(outputs[..., :1])], axis=-1)
        return counted * weights[None, ..., None] * valid[:, None, None, None, None]


def _cut(volume: jax.Array, starts: jax.Array, patch_voxels: tuple[int, ...]) -> jax.Array:
    """(B, d, h, w, C): the windows of ``volume`` (D, H, W, C) at ``starts`` (B, 3)."""
    size = (*patch_voxels, volume.shape[3])
    return jnp.stack([lax.dynamic_slice(volume, (*starts[i], 0), size) for i in range(starts.shape[0])])


def _add(sums: jax.Array, weighted: jax.Array, starts: jax.Array) -> jax.Array:
    """Add each window (B, d, h, w, K) to ``sums`` (D, H, W, K) where it was cut, one after another."""
    for i in range(weighted.shape[0]):
        start = (*starts[i], 0)
        values = lax.dynamic_slice(sums, start, weighted.shape[1:]) + weighted[i]
        sums = lax.dynamic_update_slice(sums, values, start)
    return sums


def _average(sums: jax.Array) -> jax.Array:
    """Weighted sums (..., K) over their weight (..., 1); 0 in the padding, which has no weight."""
    weight = sums[..., -1:]
    return sums[..., :-1] / jnp.where(weight > 0, weight, 1)


def _mirror(x: jax.Array, mirrors: jax.Array) -> jax.Array:
    """Reverse the spatial axes of each (d, h, w, C) in ``x`` that its row of ``mirrors`` (B, 3) names."""
    for axis in range(3):
        x = jnp.where(mirrors[:, axis, None, None, None, None], jnp.flip(x, axis + 1), x)
    return x


def _bucket(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` rounded up to multiples of ``BUCKET_VOXELS``."""
    return tuple(-(-size // BUCKET_VOXELS) * BUCKET_VOXELS for size in shape)


def _addressable(leaf: Any) -> Any:
    """This process's copy of a leaf that is replicated over several processes; any other leaf as it is."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf.addressable_data(0)
    return leaf
