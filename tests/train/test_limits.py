"""Numbers no run can have are refused with the field's name, before any data is touched."""

import math

import pytest

from configs import default
from mednext_jax.train import experiment, limits
from mednext_jax.train.workdir import plain


def changed(field, value):
    config = plain(default.get_config())
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


def test_every_range_is_that_of_a_field_whose_default_lies_in_it():
    config = plain(default.get_config())
    fields = {name for name, _ in limits._numbers(config)}
    assert {name for name in limits.RANGES if not name.startswith("model.")} <= fields
    experiment.check_config(config)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("optim.peak_lr", math.nan, "config.optim.peak_lr is nan: a finite number is needed"),
        ("optim.peak_lr", math.inf, "config.optim.peak_lr is inf: a finite number is needed"),
        ("optim.peak_lr", -1e-3, "config.optim.peak_lr is -0.001: at least 0 is needed"),
        ("optim.b2", 1, "config.optim.b2 is 1: a number from 0 to below 1 is needed"),
        ("optim.total_steps", 0, "config.optim.total_steps is 0: at least 1 is needed"),
        ("eval.overlap", 0.96, "config.eval.overlap is 0.96: a number from 0 to 0.95 is needed"),
        ("seed", 2**32, "config.seed is 4294967296: a number from 0 to 4294967295 is needed"),
        ("seed", -(10**400), "config.seed is -1000"),
        ("model.n_channels", 2**40, "config.model.n_channels is 1099511627776: a number from 0 to 4096 is needed"),
        ("data.patch_voxels", (64, 64), "three sizes divisible by 16 are needed"),
        ("data.patch_voxels", (64, 64, 40), "three sizes divisible by 16 are needed"),
        ("data.patch_voxels", (2048, 2048, 2048), "at most 268435456 voxels are possible"),
    ],
)
def test_impossible_number_is_refused_by_name(field, value, line):
    with pytest.raises(ValueError) as error:
        experiment.check_config(changed(field, value))
    assert line in str(error.value) and "\n" not in str(error.value)
