r"""Head tuning: only the output layers of a pre-trained network are trained, the cheapest baseline.

    python launch/train.py --config=configs/head.py --config.data.root=DATA/BraTS-Africa \
        --config.init_from=runs/pretrain --workdir=runs/head
    # other classes than the pre-trained network's:  ... --config.init_head=new
"""

from ml_collections import ConfigDict

from configs import peft


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring; ``arg`` is None or "demo"."""
    c = peft.get_config(arg)
    c.peft.method = "head"
    return c
