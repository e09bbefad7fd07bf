r"""Full fine-tuning: every parameter of a pre-trained network, on a small cohort (BraTS-Africa: 60 cases).

The arm that adapters are to be compared with: same data, patches, augmentation and steps as configs/peft.py,
its own learning rate. Meant for one GPU of 24 GB.

    python launch/train.py --config=configs/full.py --config.data.root=DATA/BraTS-Africa \
        --config.init_from=runs/pretrain --workdir=runs/full
    # gentler on early stages:  ... --config.optim.layer_decay=0.9
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring; ``arg`` is None or "demo"."""
    c = default.get_config(arg)
    c.init_from = "runs/pretrain"
    c.model.update(variant="", kernel_size=0, n_channels=0, block_counts=(), exp_r=0)
    c.optim.update(peak_lr=4e-3 if arg == "demo" else 3e-4)
    if arg != "demo":
        c.optim.update(ema_decay=0.999)
    return c
