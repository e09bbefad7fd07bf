"""Upstream's PyTorch MedNeXt, timed beside ours: eager and compiled, in both memory layouts, under autocast.

Every function here starts from a checkout's path and plain values, so that a process of its own can do the same work.
"""

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ours import KERNEL_SIZE, N_CLASSES, OPERATIONS, PASSES, STEPS, Network
from benchmarks.timing import SEPARATOR, Facts, Work
from mednext_jax.nn.mednext import VARIANTS

LAYOUTS = ("default", "channels-last")  # in memory


def variants(layouts: Sequence[str], with_compile: bool) -> list[tuple[str, bool, bool]]:
    """(name, channels last, compiled) of every way in which the peer is run."""
    named = [("torch" if name == "default" else f"torch {name}", name == "channels-last") for name in layouts]
    eager = [(name, last, False) for name, last in named]
    return eager + [(f"{name} compiled", last, True) for name, last in named if with_compile]


def check(checkout: Path) -> None:
    """Raises ValueError, in one line, without PyTorch or without upstream's MedNeXt at ``checkout``."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError("--peer needs PyTorch: pip install 'mednext-jax[torch]'") from None
    if not (checkout / "nnunet_mednext/network_architecture/mednextv1/MedNextV1.py").is_file():
        raise ValueError(f"--peer={checkout} is no checkout of MIC-DKFZ/MedNeXt: it has no mednextv1/MedNextV1.py")


def step_works(
    checkout: Path, network: Network, batch: int, size: int, layouts: Sequence[str], with_compile: bool
) -> list[Work]:
    """Forward and forward + backward of upstream's network, same shapes and compute type as ours."""
    return _steps(checkout, network, batch, size, layouts, with_compile, STEPS)


def training_works(
    checkout: Path, network: Network, batch: int, size: int, layouts: Sequence[str], with_compile: bool
) -> list[Work]:
    """A training step of upstream's network, forward, backward and AdamW, as ``full`` is of ours."""
    return _steps(checkout, network, batch, size, layouts, with_compile, ("full",))


def _steps(
    checkout: Path, network: Network, batch: int, size: int, layouts: Sequence[str], with_compile: bool,
    whats: Sequence[str],
) -> list[Work]:  # fmt: skip
    return [
        Work(f"{what}{SEPARATOR}{name}", _step, (str(checkout), network, batch, size, what, last, compiled))
        for name, last, compiled in variants(layouts, with_compile)
        for what in whats
    ]


def _step(
    checkout: str, network: Network, batch: int, size: int, what: str, last: bool, compiled: bool
) -> tuple[Callable[[], Any], Facts]:
    import torch

    model, device = model_on_device(checkout, network, last)
    image = laid_out(torch.randn(batch, 4, size, size, size, device=device), last)
    net = torch.compile(model) if compiled else model
    low = network["dtype"] == "bfloat16"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def forward():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
            net(image)
        wait(device)

    def backward():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            outputs = net(image)
            outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
            loss = sum(y.float().square().mean() for y in outputs)
        loss.backward()
        if what == "full":
            optimizer.step()
        wait(device)

    return (forward if what == STEPS[0] else backward), {}


def depthwise_works(batch: int, size: int, channels: int, dtype: str, layouts: Sequence[str]) -> list[Work]:
    """PyTorch's own grouped convolutions on the same shapes."""
    return [
        Work(f"{operation} {p}{SEPARATOR}{name}", _depthwise, (batch, size, channels, dtype, operation, p, last))
        for name, last, _ in variants(layouts, False)
        for operation in OPERATIONS
        for p in PASSES
    ]


def _depthwise(
    batch: int, size: int, channels: int, dtype: str, operation: str, which: str, last: bool
) -> tuple[Callable[[], Any], Facts]:
    import torch

    device = device_name()
    try_all_ways()
    kind = getattr(torch, dtype)
    edge = size // 2 if operation == "transpose" else size
    x = laid_out(torch.randn(batch, channels, edge, edge, edge, dtype=kind, device=device), last)
    w = torch.randn(channels, 1, *(KERNEL_SIZE,) * 3, dtype=kind, device=device)
    options = {"stride": 1 if operation == "stride 1" else 2, "padding": KERNEL_SIZE // 2, "groups": channels}
    functional = torch.nn.functional
    convolve = functional.conv_transpose3d if operation == "transpose" else functional.conv3d
    if which == "forward":

        def run():
            with torch.no_grad():
                convolve(x, w, **options)
            wait(device)

        return run, {}
    wanted = x.requires_grad_() if which == "input gradient" else w.requires_grad_()
    y = convolve(x, w, **options)
    g = torch.randn_like(y)

    def gradient():
        torch.autograd.grad(y, wanted, g, retain_graph=True)
        wait(device)

    return gradient, {}


def device_name() -> str:
    """"cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def try_all_ways() -> None:
    """Has the library take the fastest of its ways on a GPU, by timing them, as nnU-Net's trainer does."""
    import torch

    torch.backends.cudnn.benchmark = True


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def laid_out(array: Any, last: bool) -> Any:
    """A tensor or module with channels last in memory, or as it is."""
    import torch

    return array.to(memory_format=torch.channels_last_3d) if last else array


def model_on_device(checkout: str, network: Network, last: bool) -> tuple[Any, str]:
    """Upstream's network and the device that it is on."""
    check(Path(checkout))
    package = Path(checkout) / "nnunet_mednext"
    # The top package imports all of nnU-Net; a bare stand-in with its path lets the two files be imported alone.
    for name, path in (("nnunet_mednext", package),
                       ("nnunet_mednext.network_architecture", package / "network_architecture"),
                       ("nnunet_mednext.network_architecture.mednextv1",
                        package / "network_architecture" / "mednextv1")):  # fmt: skip
        stand_in = types.ModuleType(name)
        stand_in.__path__ = [str(path)]
        sys.modules[name] = stand_in
    from nnunet_mednext.network_architecture.mednextv1.MedNextV1 import MedNeXt

    shape = {name: list(value) for name, value in VARIANTS[network["variant"]].items()}
    model = MedNeXt(
        in_channels=4, n_channels=32, n_classes=N_CLASSES, kernel_size=network["kernel_size"], do_res=True,
        do_res_up_down=True, deep_supervision=network["deep_supervision"], **shape,
    )  # fmt: skip
    device = device_name()
    try_all_ways()
    return laid_out(model.to(device), last), device
