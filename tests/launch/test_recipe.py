"""The published recipe of configs/brats_africa.py, made small: two cohorts, then the last stages or adapters."""

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import training_data  # noqa: E402

from configs import brats_africa  # noqa: E402
from mednext_jax import modeldir  # noqa: E402
from mednext_jax.train import loop  # noqa: E402
from tests.study.cohorts import write_cohort  # noqa: E402


def small(variant: str, roots: str, init_from: str = ""):
    """Everything of the recipe but its size: a few channels, no blocks, 16 x 32 x 16 voxels, two steps."""
    config = brats_africa.get_config(variant)
    if variant == "joint":
        config.model.update(n_channels=4, exp_r=1, kernel_size=1, block_counts=(0,) * 9)
    config.init_from = init_from
    config.data.update(root=roots, patch_voxels=(16, 32, 16), batch_size=1)
    config.optim.update(total_steps=2, warmup_steps=1)
    config.eval.update(every=2, max_cases=1)
    config.n_devices = 1
    return config


def train(config, workdir: Path) -> dict:
    data = training_data.open_data(config, workdir)
    try:
        return loop.fit(config, data, workdir)
    finally:
        data.stream.close()


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the joint pre-training, and the target's cases."""
    folder = tmp_path_factory.mktemp("recipe")
    source, target = write_cohort(folder / "adult", 8, False), write_cohort(folder / "africa", 8, True)
    train(small("joint", f"{source},{target}"), folder / "joint")
    return folder / "joint", target


def test_joint_pretraining_sees_both_cohorts(joint):
    described = json.loads((joint[0] / "environment.json").read_text())["data"]
    assert described["name"] == "adult,africa"
    assert modeldir.load_info(joint[0]).network().deep_supervision


@pytest.mark.parametrize(
    ("variant", "part"), (("last_stages", r"(dec_block|up|out)_\d/.*"), ("adapter", r".*/adapter/.*|out_\d/.*"))
)
def test_what_follows_trains_its_part_of_the_joint_network(joint, variant, part, tmp_path):
    result = train(small(variant, str(joint[1]), str(joint[0])), tmp_path / variant)
    assert result["step"] == 2 and 0 <= result["scores"]["mean"] <= 1
    saved = load_file(tmp_path / variant / "adapter" / "adapter_model.safetensors")
    assert saved and all(re.fullmatch(part, name) for name in saved)
    assert modeldir.load_info(joint[0]).params_hash in (tmp_path / variant / "base" / "model.json").read_text()
