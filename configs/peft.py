r"""Adapter tuning: a pre-trained network frozen, small adapters and the heads trained on a small cohort.

The default is a Conv-Adapter (gamma 4) beside each of the nine stages: 2.7 % of MedNeXt-S's parameters. Any
method of ``mednext_jax.peft`` goes: lora, ssf, norm_bias_head, paper_sequential, ..., also "lora+norm".

    python launch/train.py --config=configs/peft.py --config.data.root=DATA/BraTS-Africa \
        --config.init_from=runs/pretrain --workdir=runs/peft
    # another method:                ... --config.peft.method=lora+head --config.peft.rank=8
    # what would it train and cost:  ... --dry_run
    # the published study's recipe:  --config=configs/peft.py:paper
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module docstring; ``arg`` is None, "demo" or "paper"."""
    c = default.get_config(None if arg == "paper" else arg)
    c.init_from = "runs/pretrain"
    c.model.update(variant="", kernel_size=0, n_channels=0, block_counts=(), exp_r=0)
    c.peft.method = "conv_adapter+head"
    c.optim.update(peak_lr=3e-2 if arg == "demo" else 1e-3)
    if arg == "paper":
        _paper(c)
    elif arg != "demo":
        c.optim.update(ema_decay=0.999)
    return c


def _paper(c: ConfigDict) -> None:
    """PEFT-MedNeXt (arXiv:2412.14100) as its code was released, where that does not break the comparison.

    Kept: a MedNeXt block after each stage, Dice alone on a softmax of four classes, AdamW 2e-3 with decay
    1e-4, clip 0.5, batch 1, no augmentation, plateau schedule. Not kept: its 64^3 whole-volume resize, the
    schedule's inverted direction, the score that watched one label, the head frozen and float32.
    """
    c.peft.method = "paper_sequential"
    c.model.update(output="labels", deep_supervision=False)
    c.loss.update(batch_dice=False, ce_weight=0.0)
    c.data.update(batch_size=1)
    c.augment.enabled = False
    c.optim.update(
        peak_lr=2e-3, weight_decay=1e-4, clip_norm=0.5, schedule="plateau", warmup_steps=0, total_steps=3000
    )
    c.eval.update(every=60, patience=20)
