"""Upstream's PyTorch MedNeXt, timed beside ours by ``launch/benchmark.py``."""

import copy
import sys
import types
from pathlib import Path
from typing import Any

from benchmark_work import Job

from mednext_jax.nn.mednext import VARIANTS

SEPARATOR = ": "


def jobs(checkout: Path, network: dict[str, Any], batch: int, size: int, with_compile: bool) -> list[Job]:
    """Forward and forward + backward of upstream's network, in both memory layouts, eager and (if asked) compiled.

    Raises:
      ValueError: no PyTorch, or no upstream MedNeXt at ``checkout``.
    """
    try:
        import torch
    except ImportError:
        raise ValueError("--peer needs PyTorch: pip install 'mednext-jax[torch]'") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = _model(checkout, network).to(device)
    image = torch.randn(batch, 4, size, size, size, device=device)
    low = network["dtype"] == "bfloat16"

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def both(label: str, model, net, x) -> list[Job]:
        def forward():
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
                net(x)
            wait()

        def backward():
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=low):
                outputs = net(x)
                outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
                loss = sum(y.float().square().mean() for y in outputs)
            loss.backward()
            wait()

        return [Job(f"forward{SEPARATOR}{label}", forward), Job(f"forward+backward{SEPARATOR}{label}", backward)]

    found = both("torch", plain, plain, image)
    last = torch.channels_last_3d
    channels_last, image_last = copy.deepcopy(plain).to(memory_format=last), image.to(memory_format=last)
    found += both("torch channels-last", channels_last, channels_last, image_last)
    if with_compile:
        found += both("torch compiled", plain, torch.compile(plain), image)
        found += both("torch compiled channels-last", channels_last, torch.compile(channels_last), image_last)
    return found


def _model(checkout: Path, network: dict[str, Any]):
    package = checkout / "nnunet_mednext"
    if not (package / "network_architecture" / "mednextv1" / "MedNextV1.py").is_file():
        raise ValueError(f"--peer={checkout} is no checkout of MIC-DKFZ/MedNeXt: it has no mednextv1/MedNextV1.py")
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
    return MedNeXt(
        in_channels=4, n_channels=32, n_classes=4, kernel_size=network["kernel_size"], do_res=True,
        do_res_up_down=True, deep_supervision=network["deep_supervision"], **shape,
    )  # fmt: skip


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our median over each peer's median, by work and peer."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    found = {}
    for name, value in seconds.items():
        work, separator, who = name.partition(SEPARATOR)
        if separator and who != "ours":
            found[f"{work} against {who}"] = seconds[f"{work}{SEPARATOR}ours"] / value
    return found
