r"""Pre-training of MedNeXt-S (k=3) on a large cohort such as BraTS-2021 (1251 cases).

Trains all 5.55 million parameters from scratch on 128^3 patches. Meant for one GPU of 24 GB; cost on your
machine: the seconds per step that the run prints, times 250,000. No score is claimed: none has been measured
on patients.

    python launch/train.py --config=configs/pretrain.py --config.data.root=DATA/BraTS2021 --workdir=runs/pretrain
    # a larger network:   ... --config.model.variant=B
    # simulated cohort:   ... --config=configs/pretrain.py:demo --config.data.store=stores/source
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring; ``arg`` is None or "demo"."""
    c = default.get_config(arg)
    if arg == "demo":
        c.optim.update(peak_lr=4e-3, total_steps=500, warmup_steps=25)
        c.eval.update(every=250)
        return c
    c.optim.update(peak_lr=1e-3, total_steps=250_000, warmup_steps=1000, ema_decay=0.999)
    c.eval.update(every=10_000, max_cases=50)
    c.checkpoint_every = 2500
    return c
