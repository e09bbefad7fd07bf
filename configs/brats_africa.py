r"""The recipe of the third place of BraTS-Africa 2024 (arXiv:2411.15872), and the same with adapters.

    python launch/train.py --config=configs/brats_africa.py:joint \
        --config.data.root=DATA/BraTS2021,DATA/BraTS-Africa --workdir=runs/joint
    python launch/train.py --config=configs/brats_africa.py:last_stages \
        --config.data.root=DATA/BraTS-Africa --config.init_from=runs/joint --workdir=runs/last_stages
    python launch/train.py --config=configs/brats_africa.py:adapter ...  # Conv-Adapters and heads instead

Published lesion-wise mean Dice on the challenge's validation cases: .8963 for last_stages with thresholds of 0.7 for
ET and TC (docs/study.md); none for adapter. Meant for one GPU of 24 GB.
"""

from ml_collections import ConfigDict

from configs import default

VARIANTS = ("joint", "last_stages", "adapter")


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg`` is "joint" (both cohorts from scratch), "last_stages" or "adapter" (on its result)."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/brats_africa.py needs a variant: {', '.join(':' + name for name in VARIANTS)}")
    c = default.get_config()
    c.model.update(variant="B", kernel_size=3, deep_supervision=True)
    c.data.update(patch_voxels=(128, 160, 112), batch_size=2)
    c.optim.update(peak_lr=2.7e-3, weight_decay=0.0, ema_decay=0.999, total_steps=100_000)
    if arg == "joint":
        return c
    c.init_from = "runs/joint"
    c.model.update(variant="", kernel_size=0)
    c.optim.update(total_steps=10_000)
    if arg == "last_stages":
        c.peft.update(method="last_stages", reinit=True)
    else:
        c.peft.method = "conv_adapter+head"
    return c
