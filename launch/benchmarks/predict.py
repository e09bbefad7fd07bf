"""A whole volume by sliding window: ours, and MONAI's with upstream's PyTorch network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours, upstream
from benchmarks.timing import OURS, SEPARATOR, Facts, Work, costs
from mednext_jax.infer import windows
from mednext_jax.infer.sliding_window import SlidingWindow


def work(network: ours.Network, volume: Sequence[int], patch: int, overlap: float, windows_per_batch: int) -> Work:
    """Our sliding window, from a volume on the host to logits on the host."""
    return Work(f"volume{SEPARATOR}{OURS}", _ours, (network, tuple(volume), patch, overlap, windows_per_batch))


def peer_works(
    checkout: Path, network: ours.Network, volume: Sequence[int], patch: int, overlap: float, windows_per_batch: int,
    layouts: Sequence[str], with_compile: bool,
) -> list[Work]:  # fmt: skip
    """MONAI's sliding window around upstream's network, same windows."""
    arguments = (str(checkout), network, tuple(volume), patch, overlap, windows_per_batch)
    return [
        Work(f"volume{SEPARATOR}monai + {name}", _monai, (*arguments, last, compiled))
        for name, last, compiled in upstream.variants(layouts, with_compile)
    ]


def check() -> None:
    """Raises ValueError, in one line, without MONAI."""
    try:
        import monai.inferers  # noqa: F401
    except ImportError:
        raise ValueError("predict --peer needs MONAI for its sliding window: pip install monai") from None


def _ours(
    network: ours.Network, volume: tuple[int, ...], patch: int, overlap: float, windows_per_batch: int
) -> tuple[Callable[[], Any], Facts]:
    model = ours.model_of(network)
    small = jax.ShapeDtypeStruct((1, 16, 16, 16, 4), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), small)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.05 * random.standard_normal(leaf.shape, np.float32), shapes)
    window = SlidingWindow(
        lambda params, x: model.apply({"params": params}, x), (patch,) * 3, ours.N_CLASSES, overlap=overlap,
        windows_per_batch=windows_per_batch,
    )  # fmt: skip
    image = random.standard_normal((*volume, 4), np.float32)
    padded = tuple(max(size, patch) for size in volume)
    n_windows = len(windows.window_starts(padded, (patch,) * 3, overlap))
    # The network alone, for one batch of windows; what is cut out and added up is little beside it.
    batch = jax.ShapeDtypeStruct((windows_per_batch, *(patch,) * 3, 4), np.float32)
    of_batch = costs(jax.jit(window.apply).lower(params, batch).compile(), window.apply, (params, batch))
    n_batches = -(-n_windows // windows_per_batch)
    facts = {"windows": n_windows, "gflop": n_windows / windows_per_batch * of_batch["gflop"],
             "gbytes": n_batches * of_batch["gbytes"]}  # fmt: skip
    return lambda: window.predict(params, image), facts


def _monai(
    checkout: str, network: ours.Network, volume: tuple[int, ...], patch: int, overlap: float, windows_per_batch: int,
    last: bool, compiled: bool,
) -> tuple[Callable[[], Any], Facts]:  # fmt: skip
    import torch
    from monai.inferers import sliding_window_inference

    model, device = upstream.model_on_device(checkout, network, last)
    net = torch.compile(model.eval()) if compiled else model.eval()
    image = torch.randn(1, 4, *volume)
    low = network["dtype"] == "bfloat16"

    def run():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
            logits = sliding_window_inference(
                upstream.laid_out(image.to(device), last), (patch,) * 3, windows_per_batch, net, overlap=overlap,
                mode="gaussian",
            )  # fmt: skip
        return logits.float().cpu()

    return run, {}
