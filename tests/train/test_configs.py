import importlib

import pytest

from configs import default
from mednext_jax import peft
from mednext_jax.train import augment, experiment, losses, workdir

EXPERIMENTS = ("pretrain", "full", "peft", "scratch", "head")
VARIANTS = [(name, arg) for name in EXPERIMENTS for arg in (None, "demo")] + [("peft", "paper")]


@pytest.mark.parametrize(("name", "arg"), VARIANTS)
def test_config_has_the_default_fields_and_possible_values(name, arg):
    module = importlib.import_module(f"configs.{name}")
    config = workdir.plain(module.get_config(arg))
    assert workdir.leaves(config).keys() == workdir.leaves(workdir.plain(default.get_config())).keys()
    experiment.check_config(config)
    experiment.method_of(config)
    losses.make_loss(config["loss"], config["model"]["output"], {"WT": [1, 2, 3]})
    assert "python launch/train.py --config=configs/" in module.__doc__


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_unknown_variant_of_a_config_is_refused(name):
    with pytest.raises(ValueError, match="unknown variant 'huge'"):
        importlib.import_module(f"configs.{name}").get_config("huge")


def test_augmentation_of_the_config_is_that_of_the_library():
    section = workdir.plain(default.get_config())["augment"]
    section.pop("enabled")
    assert augment.check_config(section) == augment.check_config({})


def test_config_offers_every_option_of_every_method():
    offered = set(workdir.plain(default.get_config())["peft"]) - {"method"}
    assert offered == {option for method in peft.METHODS for option in peft.options_of(method)}


def test_demo_and_full_size_arms_share_everything_but_what_they_are_about():
    for arg in (None, "demo"):
        full, scratch = (
            workdir.leaves(workdir.plain(importlib.import_module(f"configs.{name}").get_config(arg)))
            for name in ("full", "scratch")
        )
        differing = {field for field in full if full[field] != scratch[field]}
        names = ("variant", "kernel_size", "n_channels", "block_counts", "exp_r")
        network = {f"model.{name}" for name in names}
        assert differing <= {"init_from", "optim.peak_lr", *network}
