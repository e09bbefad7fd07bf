"""Makes the golden files that README.md lists as our own, by running the original PyTorch code on seeded inputs.

    git clone https://github.com/MIC-DKFZ/MedNeXt; git clone https://github.com/CAMERA-MRI/SPARK2024
    git clone https://github.com/Project-MONAI/MONAI
    python tests/golden/make.py --mednext=MedNeXt --study=SPARK2024 --monai=MONAI        (needs torch alone)

Nothing of theirs is copied: the files hold numbers. Regenerating them is a change to review like any other.
"""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

SMALL = {"in_channels": 4, "n_channels": 2, "n_classes": 4, "exp_r": 2, "kernel_size": 3, "do_res": True,
         "do_res_up_down": True, "block_counts": [1] * 9}  # fmt: skip
MIXED = {"kernel_size": None, "block_counts": [1, 2, 1, 1, 2, 1, 3, 1, 2], "exp_r": [2, 1, 3, 2, 4, 1, 2, 3, 2]}
MONAI_B = {"spatial_dims": 2, "init_filters": 2, "in_channels": 4, "out_channels": 4, "kernel_size": 3,
           "encoder_expansion_ratio": [2, 3, 4, 4], "decoder_expansion_ratio": [4, 4, 3, 2],
           "bottleneck_expansion_ratio": 4, "use_residual_connection": True, "blocks_down": [1, 1, 1, 1],
           "blocks_bottleneck": 1, "blocks_up": [1, 1, 1, 1], "deep_supervision": True}  # fmt: skip
# file -> (class, constructor arguments, input shape, seed); a name that begins with grad_ gets gradients
CASES = {
    "block_k3_groups2": ("MedNeXtBlock", {"in_channels": 6, "out_channels": 6, "exp_r": 2, "kernel_size": 3,
                                          "n_groups": 2}, (2, 6, 5, 7, 6), 1),
    "block_k7_2d_grn": ("MedNeXtBlock", {"in_channels": 3, "out_channels": 3, "exp_r": 3, "kernel_size": 7, "grn": True,
                                         "dim": "2d"}, (2, 3, 6, 9), 2),
    "up_k5_2d_res": ("MedNeXtUpBlock", {"in_channels": 4, "out_channels": 2, "exp_r": 2, "kernel_size": 5,
                                        "do_res": True, "dim": "2d"}, (2, 4, 5, 3), 3),
    "down_k3_layer": ("MedNeXtDownBlock", {"in_channels": 3, "out_channels": 6, "exp_r": 2, "kernel_size": 3,
                                           "do_res": True, "norm_type": "layer"}, (2, 3, 5, 8, 7), 4),
    "net_2d_enc3_dec5_nores_mixed": ("MedNeXt", SMALL | MIXED | {
        "enc_kernel_size": 3, "dec_kernel_size": 5, "do_res": False, "do_res_up_down": False, "dim": "2d"},
        (2, 4, 48, 32), 5),
    "net_layer_grn": ("MedNeXt", SMALL | {"norm_type": "layer", "grn": True}, (2, 4, 16, 32, 16), 6),
    "grad_net_2d_grn_ds": ("MedNeXt", SMALL | {"dim": "2d", "grn": True, "deep_supervision": True}, (2, 4, 32, 48), 7),
    "adapter_seq_2d_ak5": ("MedNeXtWithAdapters", SMALL | {
        "dim": "2d", "adapter_kernel_size": 5}, (2, 4, 32, 48), 8),
    "adapter_seq_2d_nores": ("MedNeXtWithAdapters", SMALL | {
        "dim": "2d", "adapter_kernel_size": 3, "do_res": False, "do_res_up_down": False}, (2, 4, 32, 48), 9),
    "adapter_par_2d_enc5_dec3": ("MedNeXtWithParallelAdapters", SMALL | {
        "dim": "2d", "kernel_size": None, "enc_kernel_size": 5, "dec_kernel_size": 3}, (1, 4, 48, 32), 10),
    "monai_b_2d_ds": ("MONAI", MONAI_B, (2, 4, 32, 48), 11),
    "monai_b_2d_grn": ("MONAI", MONAI_B | {"deep_supervision": False, "global_resp_norm": True}, (2, 4, 32, 48), 12),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("mednext", "study", "monai"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="clone of the repository")
    classes = load_classes(parser.parse_args())
    for name, (cls, ctor, shape, seed) in CASES.items():
        torch.manual_seed(seed)
        network = randomised(classes[cls](**ctor), seed).train()
        x = np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)
        single, double = (run(network, x, dtype) for dtype in (torch.float32, torch.float64))
        arrays = {"input": x} | {f"param/{key}": value.numpy() for key, value in network.state_dict().items()}
        arrays |= {"output" if i == 0 else f"output_ds{i}": y for i, y in enumerate(single["outputs"])}
        meta = {"cls": cls, "ctor": ctor, "seed": seed, "torch": torch.__version__,
                "max_abs_f32_vs_f64": gaps(single["outputs"], double["outputs"])}  # fmt: skip
        if name.startswith("grad_"):
            arrays |= {f"grad/{key}": value for key, value in single["gradients"].items()}
            arrays |= {"grad_input": single["by_input"], "loss_f64": np.asarray(double["loss"])}
            meta |= {
                "no_grad": ["dummy_tensor"],
                "grad_max_abs_f32_vs_f64": max(gaps(*map(every_gradient, (single, double)))),
                "grad_absmax": float(max(np.abs(g).max() for g in every_gradient(double))),
                "grad_numerically_zero": [k for k, g in double["gradients"].items() if np.abs(g).max() < 1e-10],
            }
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", meta=json.dumps(meta), **arrays)
        print(name, meta["max_abs_f32_vs_f64"])


def load_classes(clones: argparse.Namespace) -> dict[str, type]:
    """The original classes, imported file by file: their packages need more than torch."""
    sys.path[:0] = [str(clones.mednext), str(clones.study / "PEFT_MedNeXt/src/models/components")]
    from mednext import MedNeXt_with_conv_adapter, MedNeXt_with_parallel_convnext_adapter
    from nnunet_mednext.network_architecture.mednextv1 import MedNextV1, blocks

    for name in ("blocks.mednext_block", "nets.mednext"):
        file = clones.monai / "monai/networks" / f"{name.replace('.', '/')}.py"
        spec = importlib.util.spec_from_file_location(f"monai.networks.{name}", file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return vars(blocks) | {
        "MedNeXt": MedNextV1.MedNeXt, "MONAI": sys.modules["monai.networks.nets.mednext"].MedNeXt,
        "MedNeXtWithAdapters": MedNeXt_with_conv_adapter.MedNeXtWithAdapters,
        "MedNeXtWithParallelAdapters": MedNeXt_with_parallel_convnext_adapter.MedNeXtWithParallelAdapters,
    }  # fmt: skip


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter away from its special initial value, and on the float16 grid so that files stay small."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"gamma": (0.0, 0.5), "beta": (0.0, 0.2), "bias": (0.0, 0.2), "norm": (1.0, 0.25)}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            kind = next((kind for kind in spread if kind in name), None)
            if name == "dummy_tensor":
                continue
            if kind is None:
                parameter.mul_(1.5)
            else:
                mean, deviation = spread[kind]
                parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half().float())
    return network


def run(network: torch.nn.Module, x: np.ndarray, dtype: torch.dtype) -> dict:
    """Outputs, and gradients of the sum over outputs of mean(output ** 2)."""
    network, x = copy.deepcopy(network).to(dtype), torch.tensor(x, dtype=dtype, requires_grad=True)
    outputs = network(x)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    loss = sum((output**2).mean() for output in outputs)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
    return {"outputs": [output.detach().numpy() for output in outputs], "loss": loss.item(), "gradients": gradients,
            "by_input": x.grad.numpy()}  # fmt: skip


def every_gradient(result: dict) -> list[np.ndarray]:
    return [*result["gradients"].values(), result["by_input"]]


def gaps(single: list[np.ndarray], double: list[np.ndarray]) -> list[float]:
    """Largest absolute difference of each pair."""
    return [float(np.abs(a - b).max()) for a, b in zip(single, double, strict=True)]


if __name__ == "__main__":
    main()
