"""Fields that every experiment shares, with their defaults; not an experiment itself.

An experiment file imports this, changes what it is about and says so in its docstring. Any field can be
changed from the command line: ``--config.optim.peak_lr=3e-4``, ``--config.data.patch_voxels=96,96,96``.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str | None = None) -> ConfigDict:
    """The defaults; with ``arg="demo"`` those of the small network for the simulated cohorts."""
    c = ConfigDict()
    c.seed = 0  # everything random: initial weights and, unless data.order_seed says otherwise, what follows
    c.init_from = ""  # model directory or workdir to start from; "": draw new parameters
    c.init_head = "loaded"  # "new": draw the output layers anew, for other classes than the loaded network's
    c.data = _data()
    c.model = _model()
    c.peft = _peft()
    c.loss = ConfigDict(dict(batch_dice=True, include_background=False, dice_weight=1.0, ce_weight=1.0))
    c.optim = _optim()
    c.augment = _augment()
    c.eval = _eval()
    c.log_every = 50  # steps
    c.checkpoint_every = 500  # steps; every validated step is saved too
    c.resume_step = 0  # 0: the newest checkpoint; else go back to this one (after a damaged file)
    c.max_bad_steps = 0  # steps with a loss or gradient that is not finite which may be skipped
    c.n_devices = 0  # 0: all
    c.deterministic = False  # bit-equal runs on GPU; slower (XLA may not use its fastest kernels)
    if arg == "demo":
        _shrink(c)
    elif arg:
        raise ValueError(f"unknown variant {arg!r} of the config; the text on top of its file names those there are")
    return c


def _data() -> ConfigDict:
    return ConfigDict(
        dict(
            root="",  # folder of BraTS cases as downloaded; preprocessed on first use
            store="",  # a store made by launch/preprocess.py; where root's is put if both are given
            weights=(),  # with several roots or stores, comma-separated: how often each is drawn
            train_split="train",
            val_split="val",
            fold=-1,  # 0, 1, ...: that fold's train and val instead
            max_train_cases=0,  # 0: all; else that many, chosen by subset_seed
            subset_seed=0,
            order_seed=-1,  # order of cases, places of patches, augmentation; -1: seed
            patch_voxels=(128, 128, 128),
            batch_size=2,  # patches per step, over all devices
            foreground_fraction=0.33,  # share of patches centred on tumour, nnU-Net's default
            workers=0,  # processes that read; 0: threads
            threads=2,
            buffer=2,  # batches read ahead
        )
    )


def _model() -> ConfigDict:
    return ConfigDict(
        dict(
            variant="S",  # S, B, M, L; "": as the network in init_from
            kernel_size=3,
            n_channels=0,  # 0 and (): the variant's, or those of init_from
            block_counts=(),
            exp_r=0,
            grn=False,
            deep_supervision=True,
            output="regions",  # one sigmoid each for WT, TC, ET; "labels": softmax over 0..3
            dtype="auto",  # bfloat16 on GPU, float32 elsewhere; parameters, statistics of norms, loss: always float32
            remat="auto",  # "none", "mlp" or "block": what the backward pass computes again to save memory
        )
    )


def _peft() -> ConfigDict:
    """The method and the options of all methods; None keeps the method's default."""
    return ConfigDict(
        dict(
            method="full",
            gamma=placeholder(int),
            placement=placeholder(str),
            position=placeholder(str),
            scope=placeholder(str),
            kernel_size=placeholder(int),
            scale=placeholder(bool),
            ratio=placeholder(float),
            rank=placeholder(int),
            alpha=placeholder(float),
            layers=placeholder(str),  # comma-separated
            targets=placeholder(str),
            up=placeholder(bool),
            n_stages=placeholder(int),
            reinit=placeholder(bool),
            legacy=placeholder(bool),
        )
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        dict(
            name="adamw",  # or "sgd"
            peak_lr=1e-3,
            weight_decay=1e-2,  # of kernels; never of biases, norms and scales
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            momentum=0.99,  # sgd
            nesterov=True,
            schedule="warmup_cosine",  # or poly, constant, plateau
            warmup_steps=500,
            total_steps=25_000,
            final_fraction=0.0,  # warmup_cosine: last learning rate / peak_lr
            poly_power=0.9,
            plateau_factor=0.1,  # plateau: on the validation's mean Dice
            plateau_patience=5,
            clip_norm=1.0,  # 0: none
            accumulate=1,  # micro-batches that a batch is cut into, to save memory
            shard_state=False,  # split the optimizer's state over the devices: less memory, the same result
            ema_decay=0.0,  # 0: none; else validation and the saved model use the average
            groups=(),  # ((regex on the path, learning-rate factor, weight-decay factor), ...)
            layer_decay=1.0,  # learning-rate factor per stage of distance from the last head
            new_warmup_steps=0,  # extra warm-up of parameters that were not loaded
        )
    )


def _augment() -> ConfigDict:
    """Probabilities and ranges of ``mednext_jax.train.augment.DEFAULTS``."""
    return ConfigDict(
        dict(
            enabled=True,
            flip_probability=0.5,
            affine_probability=0.3,
            rotation_deg=30.0,
            scale=(0.7, 1.4),
            translation_voxels=0.0,
            noise_probability=0.15,
            noise_std=(0.0, 0.3),
            blur_probability=0.2,
            blur_sigma_voxels=(0.5, 1.0),
            brightness_probability=0.15,
            brightness_shift=(-0.25, 0.25),
            contrast_probability=0.15,
            contrast_factor=(0.75, 1.25),
            low_resolution_probability=0.25,
            low_resolution_zoom=(0.5, 1.0),
            bias_field_probability=0.2,
            bias_field_strength=(0.0, 0.4),
            gamma_probability=0.3,
            gamma_exponent=(0.7, 1.5),
        )
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        dict(
            every=2500,  # steps; 0: no validation
            score="mean",  # what makes a network the best: mean over regions, a region, or label1, label2, label3
            max_cases=0,  # 0: all of the split
            overlap=0.5,
            flips=False,
            windows_per_device=1,
            patience=0,  # stop after that many validations without a better one; 0: never
        )
    )


def flips_only(c: ConfigDict) -> None:
    """Switches every augmentation but the flips off."""
    for name in c.augment:
        if name.endswith("_probability") and name != "flip_probability":
            c.augment[name] = 0.0


def _shrink(c: ConfigDict) -> None:
    """The 8-channel network, 32^3 patches and few hundred steps that suit simulated cohorts and two CPU
    cores.
    """
    c.model.update(n_channels=8, block_counts=(1,) * 9, exp_r=2, deep_supervision=False)
    c.data.update(patch_voxels=(32, 32, 32), batch_size=2, foreground_fraction=0.67)
    c.optim.update(b2=0.99, warmup_steps=10, total_steps=200)
    c.eval.update(every=200)
    flips_only(c)
    c.log_every, c.checkpoint_every, c.n_devices = 20, 100, 1
