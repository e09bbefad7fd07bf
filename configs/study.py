r"""The study: what does adapting a pre-trained network to a small cohort gain, by which method, at which cost?

Pre-trains on the source cohort, tests it on the target cohort as it is, and adapts it to the target cohort by every
arm. The protocol is fixed before any test case is seen: the learning rate of each arm is chosen on validation cases,
target subset, initial weights and data order have seeds of their own, and test cases are touched once, at the end.

    python launch/study.py --config=configs/study.py:demo --workdir=runs/demo             # simulated, minutes
    python launch/study.py --config=configs/study.py:simulated --workdir=runs/simulated   # two cores: about an hour
    python launch/study.py --config=configs/study.py:real --workdir=runs/study \
        --config.source.root=DATA/BraTS2021 --config.target.root=DATA/BraTS-Africa        # one GPU of 24 GB, weeks
    # fewer arms:            ... --config.arms=full,lora
    # take given weights:    ... --config.pretrain.init_from=runs/pretrain

Stopped at any point, the same command goes on; started several times at once, on several GPUs or machines with a
common folder, the processes share the work.
"""

from ml_collections import ConfigDict

ARMS = ("scratch", "full", "paper_sequential", "paper_parallel", "conv_adapter", "conv_adapter_block", "lora",
        "norm_bias_head", "decoder", "last_stages_reinit")  # fmt: skip
LEGACY_ARMS = ("paper_sequential_legacy", "paper_parallel_legacy")  # with learning rates of their own
FAULTS = ("permuted_channels", "squeezed", "joint_normalization", "selection_by_label1", "legacy_adapters",
          "resumed_full")  # fmt: skip
DEMO_ARMS = ("scratch", "full", "paper_sequential", "conv_adapter")


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg`` is "demo" or "simulated" (simulated cohorts, a small network) or "real" (your folders, MedNeXt-S)."""
    if arg not in ("demo", "simulated", "real"):
        raise ValueError("configs/study.py needs a variant: configs/study.py:demo, :simulated or :real")
    c = ConfigDict()
    c.variant = "" if arg == "real" else "demo"  # of the arms' config files
    c.note = ""  # printed on top of the report; filled in for simulated cohorts
    c.source = _cohort(val_fraction=0.1, test_fraction=0.1)
    c.target = _cohort(val_fraction=0.15, test_fraction=0.35)
    # Used where neither root nor store is given: cases of each cohort, voxel edge, seed.
    c.simulate = ConfigDict(dict(enabled=arg != "real", source_cases=64, target_cases=70, spacing_mm=3.0, seed=3,
                                 version=1))  # of the simulator: another one is refused
    c.steps_per_process = 1  # more save start-up time, where the runs are short
    # Replicate r of every arm takes the r-th of subset_seeds, init_seeds and order_seeds, in turn; with crossed=True
    # every subset meets every pair of the other two. Pre-training runs once per init seed.
    c.subset_seeds = (0, 1, 2, 3, 4)
    c.init_seeds = (0, 1, 2)
    c.order_seeds = (0, 1, 2)
    c.crossed = arg == "real"
    # Target cases that arms train on, drawn by the subset seed. 0: all, and then no subset seed has an effect.
    c.max_train_cases = 24 if arg == "real" else 0  # of 30, if the target has 60 cases
    c.pretrain = ConfigDict(dict(init_from="", overrides=()))
    c.arms = ARMS + LEGACY_ARMS
    c.recipes = _recipes()
    c.overrides = ()  # of every arm's config, such as "optim.total_steps=1000"
    # Learning rates: trials rates, a factor apart, around the recipe's own; while the chosen one is at an edge the grid
    # grows, up to max_trials. Chosen by the validation score, mean over that many tuning subsets; of rates that come
    # within the tolerance of the best, the one nearest to the recipe's own.
    c.rates = ConfigDict(dict(trials=3, factor=3.0, max_trials=6, subsets=2, tolerance=0.005, overrides=()))
    c.few_shot = ConfigDict(dict(sizes=(1, 5, 10, 30), arms=("scratch", "full", "conv_adapter"), replicates=5))
    c.ablations = FAULTS
    c.ablation = ConfigDict(dict(
        arms=("full", "paper_sequential"),  # trained again under every fault of data or selection
        replicates=3,
        squeezed_voxels=(64, 64, 64),
        validations=10,  # per run, for the ablation of model selection
        rate_decay=1e-6,  # what the released full fine-tuning's inverted schedule leaves of the learning rate
    ))  # fmt: skip
    c.predict = ConfigDict(dict(overlap=0.5, flips=False, thresholds=(), min_component_mm3=("50",)))
    c.pages = ("main",)  # groups of runs (main, few_shot, ablations) whose evaluation becomes a page of its own
    if arg == "simulated":
        _simulated(c)
    if arg == "demo":
        _demo(c)
    return c


def _cohort(val_fraction: float, test_fraction: float) -> ConfigDict:
    """A folder of BraTS cases as downloaded, or a store of them ("" simulates one); its splits by patient."""
    return ConfigDict(
        dict(root="", store="", val_fraction=val_fraction, test_fraction=test_fraction, splits="", split_seed=0)
    )


def _recipes() -> ConfigDict:
    """Arm -> its config file and the overrides of its fields; all but scratch start from the pre-trained network."""
    recipes = ConfigDict()
    for name, file, overrides in (
        ("scratch", "scratch", ()),
        ("full", "full", ()),
        ("paper_sequential", "peft", ("peft.method=paper_sequential",)),
        ("paper_parallel", "peft", ("peft.method=paper_parallel",)),
        ("paper_sequential_legacy", "peft", ("peft.method=paper_sequential", "peft.legacy=True")),
        ("paper_parallel_legacy", "peft", ("peft.method=paper_parallel", "peft.legacy=True")),
        ("conv_adapter", "peft", ("peft.method=conv_adapter+head",)),
        ("conv_adapter_block", "peft", ("peft.method=conv_adapter+head", "peft.scope=block")),
        ("lora", "peft", ("peft.method=lora+head",)),
        ("norm_bias_head", "peft", ("peft.method=norm_bias_head",)),
        ("decoder", "peft", ("peft.method=decoder",)),
        ("last_stages_reinit", "peft", ("peft.method=last_stages", "peft.reinit=True")),
    ):
        recipes[name] = ConfigDict(dict(file=file, overrides=overrides))
    return recipes


def _simulated(c: ConfigDict) -> None:
    """Sized for two free cores (about an hour): 8 channels, 32^3 patches of 3 mm voxels, 12 target cases to train on.

    Only the trials validate; everything else takes the last step's network.
    """
    c.steps_per_process = 20
    c.arms = ARMS  # the legacy adapters are an ablation here
    # The small network has one block per stage: an adapter around the block would be that around the stage.
    c.recipes.conv_adapter_block.overrides += ("peft.position=convolution",)
    c.max_train_cases = 12
    c.source.update(val_fraction=0.1, test_fraction=0.25)
    c.target.test_fraction = 0.3
    c.pretrain.overrides = ("optim.total_steps=240", "eval.every=0", "checkpoint_every=240")
    c.overrides = ("optim.total_steps=80", "data.batch_size=1", "eval.every=0", "eval.overlap=0.25",
                   "checkpoint_every=80")  # fmt: skip
    c.rates.update(subsets=3, max_trials=9, overrides=("eval.every=80",))
    c.few_shot.update(sizes=(1, 5, 30), replicates=2)
    c.ablation.update(replicates=2, squeezed_voxels=(32, 32, 32), validations=3)
    c.predict.update(overlap=0.25, min_component_mm3=("500",))


def _demo(c: ConfigDict) -> None:
    """Minutes: four arms at the learning rates of their config files, one seed, no ablation."""
    c.steps_per_process = 20
    c.simulate.update(source_cases=40, target_cases=24, seed=0)
    c.source.test_fraction = 0.2
    c.target.update(val_fraction=0.1, test_fraction=0.5)
    c.subset_seeds, c.init_seeds, c.order_seeds = (0,), (0,), (0,)
    c.pretrain.overrides = ("optim.total_steps=400",)
    c.arms = DEMO_ARMS
    c.rates.update(trials=1, max_trials=1, subsets=1)
    c.few_shot.sizes, c.ablations = (), ()
    c.predict.min_component_mm3 = ("500",)
