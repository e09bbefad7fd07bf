"""The one table of names: our parameter path <-> upstream's state-dict name and array layout.

Upstream is MIC-DKFZ/MedNeXt (``mednextv1``); the adapter networks are those of the original study
(CAMERA-MRI/SPARK2024), which nest a stage's blocks one level deeper to place an adapter beside them:

    path                                   upstream, by flavour of the network
    stem/kernel                            stem.weight
    down_0/conv1/kernel, out_0/...         down_0.conv1.weight, out_0.conv_out.weight
    enc_block_0/1/conv2/bias               plain       enc_block_0.1.conv2.bias
                                           sequential  enc_block_0.0.1.conv2.bias
                                           linear      enc_block_0.0.1.conv2.bias
                                           parallel    enc_block_0.mednext_block.1.conv2.bias
    enc_block_0/adapter/conv2/bias         sequential  enc_block_0.1.med_adp_conv2.bias
                                           parallel    enc_block_0.adapter_block.med_adp_conv2.bias
    enc_block_0/adapter/fc1/kernel         linear      enc_block_0.1.fc1.weight

Every state dict of upstream also holds ``dummy_tensor``, a parameter that takes part in no computation; it
has no path here.
"""
from __future__ import annotations

import dataclasses

DUMMY = "dummy_tensor"

# module -> (input width in units of n_channels, index of its expansion ratio, whose kernel size)
MODULES = {
    **{f"enc_block_{i}": (2**i, i, "enc") for i in range(4)},
    **{f"down_{i}": (2**i, i + 1, "enc") for i in range(4)},
    "bottleneck": (16, 4, "dec"),
    **{f"up_{i}": (2 ** (i + 1), 8 - i, "dec") for i in range(4)},
    **{f"dec_block_{i}": (2**i, 8 - i, "dec") for i in range(4)},
}
# The nine stages in the order of exp_r and block_counts.
STAGES = (*(f"enc_block_{i}" for i in range(4)), "bottleneck", *(f"dec_block_{i}" for i in (3, 2, 1, 0)))


@dataclasses.dataclass(frozen=True)
class Flavour:
    """How a network names what lies in a stage: templates of ``{stage}``, ``{block}``, ``{layer}``."""

    blocks: str
    adapter: str = ""


FLAVOURS = {
    "plain": Flavour("{stage}.{block}.{layer}"),
    "sequential": Flavour("{stage}.0.{block}.{layer}", "{stage}.1.med_adp_{layer}"),
    "parallel": Flavour("{stage}.mednext_block.{block}.{layer}", "{stage}.adapter_block.med_adp_{layer}"),
    "linear": Flavour("{stage}.0.{block}.{layer}", "{stage}.1.{layer}"),
}

# our layer and leaf -> (upstream's, layout of the array: see layouts.py)
LAYERS = {
    "kernel": ("weight", "conv"),  # stem
    "bias": ("bias", "vector"),
    "norm/scale": ("norm.weight", "vector"),
    "norm/bias": ("norm.bias", "vector"),
    "grn_gamma": ("grn_gamma", "grn"),
    "grn_beta": ("grn_beta", "grn"),
    "conv_out/kernel": ("conv_out.weight", "transposed"),
    "conv_out/bias": ("conv_out.bias", "vector"),
    **{f"{layer}/kernel": (f"{layer}.weight", "conv") for layer in ("conv1", "conv2", "conv3", "res_conv")},
    **{f"{layer}/bias": (f"{layer}.bias", "vector") for layer in ("conv1", "conv2", "conv3", "res_conv")},
    **{f"{layer}/kernel": (f"{layer}.weight", "linear") for layer in ("fc1", "fc2")},
    **{f"{layer}/bias": (f"{layer}.bias", "vector") for layer in ("fc1", "fc2")},
}


def layer_name(layer: str, up: bool = False) -> tuple[str, str] | None:
    """Upstream's name and the layout of a layer's leaf, e.g. ``"conv1/kernel"``; None when it has neither.

    ``up`` says that the layer belongs to an up block, whose residual convolution is a transposed one. (Its
    ``conv1`` is transposed too, but depthwise: one channel in, one out, the layout is that of a convolution.)
    """
    if up and layer == "res_conv/kernel":
        return "res_conv.weight", "transposed"
    return LAYERS.get(layer)


def upstream_name(path: str, flavour: str = "plain") -> tuple[str, str]:
    """The state-dict name and the layout of the parameter at ``path`` in a network of that flavour.

    Raises:
      ValueError: upstream has no such parameter (an adapter that only exists here, say).
    """
    kind = FLAVOURS[flavour]
    module, _, rest = path.partition("/")
    template = "{stage}.{layer}"
    block = ""
    if module in STAGES:
        block, _, rest = rest.partition("/")
        template = kind.adapter if block == "adapter" else kind.blocks if block.isdigit() else ""
    found = layer_name(rest, up=module.startswith("up_"))
    if not template or found is None:
        raise ValueError(f"{path} has no counterpart in the PyTorch networks: merge the adapter, "
                         "or export the base network without it")
    name, layout = found
    return template.format(stage=module, block=block, layer=name), layout
