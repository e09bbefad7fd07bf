"""Every experiment file in configs/ is one that a run accepts."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configs import brats_africa, full, head, peft, pretrain, scratch  # noqa: E402
from mednext_jax.train import experiment  # noqa: E402
from mednext_jax.train.workdir import plain  # noqa: E402

FILES = [(module, arg) for module in (full, head, peft, pretrain, scratch) for arg in (None, "demo")]
FILES += [(peft, "paper"), *((brats_africa, variant) for variant in brats_africa.VARIANTS)]


@pytest.mark.parametrize(("module", "arg"), FILES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_config_is_accepted_and_its_method_exists(module, arg):
    config = plain(module.get_config(arg))
    experiment.check_config(config)
    assert experiment.method_of(config).name


def test_the_winning_recipe_differs_between_its_variants_only_in_what_is_trained():
    stages, adapter = (plain(brats_africa.get_config(arg)) for arg in ("last_stages", "adapter"))
    assert {name for name in stages if stages[name] != adapter[name]} == {"peft"}
    assert stages["data"]["patch_voxels"] == [128, 160, 112] and stages["peft"]["reinit"]
