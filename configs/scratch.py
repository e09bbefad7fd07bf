r"""Training from scratch on the small cohort alone: what fine-tuning has to beat.

The same network, data, patches, augmentation and steps as configs/full.py, without pre-trained weights.

    python launch/train.py --config=configs/scratch.py --config.data.root=DATA/BraTS-Africa --workdir=runs/scratch
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring; ``arg`` is None or "demo"."""
    c = default.get_config(arg)
    c.optim.update(peak_lr=1e-2 if arg == "demo" else 1e-3)
    if arg != "demo":
        c.optim.update(ema_decay=0.999)
    return c
