r"""The study: what does adapting a pre-trained network to a small cohort gain, and by which method?

Pre-trains on the source cohort, then tests on the target cohort without adaptation, trained from scratch, fully
fine-tuned and with adapters. All arms share the target's cases, patches, augmentation and number of steps.

    python launch/study.py --config=configs/study.py:demo --workdir=runs/demo       # simulated, minutes on two cores
    python launch/study.py --config=configs/study.py:real --workdir=runs/study \
        --config.source.root=DATA/BraTS2021 --config.target.root=DATA/BraTS-Africa  # one GPU of 24 GB, days

Stopped at any point, the same command goes on.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg`` is "demo" (simulated cohorts, a small network) or "real" (your folders, MedNeXt-S)."""
    if arg not in ("demo", "real"):
        raise ValueError("configs/study.py needs a variant: configs/study.py:demo or configs/study.py:real")
    demo = arg == "demo"
    c = ConfigDict()
    c.variant = "demo" if demo else ""  # of the arms' config files
    c.seeds = (0,)  # one repetition of every arm per seed: weights, data order, target subset
    c.note = ""  # printed on top of the report; filled in for simulated cohorts
    c.source = _cohort(val_fraction=0.1, test_fraction=0.2 if demo else 0.1)
    c.target = _cohort(val_fraction=0.1, test_fraction=0.5 if demo else 0.25)
    # Used where no root is given: cases of each cohort, voxel edge, seed.
    c.simulate = ConfigDict(dict(enabled=demo, source_cases=40, target_cases=24, spacing_mm=3.0, seed=0))
    c.pretrain = ConfigDict(dict(init_from="", overrides=("optim.total_steps=400",) if demo else ()))
    # (name, config file, overrides of its fields); every arm but scratch starts from the pre-trained network.
    c.arms = (
        ("scratch", "scratch", ()),
        ("full", "full", ()),
        ("paper_sequential", "peft", ("peft.method=paper_sequential",)),
        ("conv_adapter", "peft", ()),
    )
    c.predict = ConfigDict(dict(overlap=0.5, flips=False, thresholds=()))
    return c


def _cohort(val_fraction: float, test_fraction: float) -> ConfigDict:
    """A folder of BraTS cases as downloaded ("" simulates one), its splits by patient."""
    return ConfigDict(
        dict(root="", val_fraction=val_fraction, test_fraction=test_fraction, splits="", split_seed=0)
    )
