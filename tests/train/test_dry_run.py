"""The dry run: the chosen method beside full fine-tuning, with every figure, and the errors of the real run."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mednext_jax import modeldir
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes
from mednext_jax.train import dry_run

INFO = modeldir.ModelInfo(
    kwargs={"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": 1, "kernel_size": 1, "block_counts": [0] * 9},
    channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain", output="regions",
    label_scheme="brats2023", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, patch_voxels=(16, 16, 16),
)  # fmt: skip


@pytest.fixture
def planned(config, tmp_path):
    """A config that adapts a saved model."""
    shapes = parameter_shapes(INFO.network())
    modeldir.save_model(tmp_path / "base", INFO, paths.unflatten(
        {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}))  # fmt: skip
    config.init_from = str(tmp_path / "base")
    config.model.update(variant="", kernel_size=0, n_channels=0, block_counts=(), exp_r=0)
    config.data.update(patch_voxels=(16, 16, 16), batch_size=1)
    config.peft.update(method="norm")
    return config


def table(text):
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("| `"): [cell.strip(" |") for cell in row[2:]] for row in rows}


def test_both_rows_have_every_figure(planned):
    text = "\n".join(dry_run.report(planned))
    assert re.search(r"trainable params: \d+ \|\| all params: [\d,]+ \|\| trainable%: ", text)
    assert "norm on " in text and "scaled from" not in text
    full, norm = table(text)["full"], table(text)["norm"]
    assert int(norm[0].replace(",", "")) < int(full[0].replace(",", ""))
    for row in (full, norm):
        assert len(row) == 7 and all(row)
        assert row[5].endswith("MiB") and row[6].endswith(" s")
    planned.peft.update(method="full")
    gflop = dry_run.cost(planned).step_flops / 1e9
    assert text.splitlines()[-1].startswith(f"FLOPs relative to full fine-tuning's: {gflop:.4g} GFLOP per step, ")
    assert text.endswith("step memory is that of the step's temporaries, beside parameters and optimizer state")


def test_a_large_step_is_timed_small_on_a_cpu_and_scaled_by_its_arithmetic(planned, monkeypatch):
    seen = []

    def costs(methods, model, patch, batch_size=1, compiled=False, timed_steps=0):
        seen.append((patch, batch_size))
        flops = batch_size * int(np.prod(patch))
        seconds = 2.0 if timed_steps else None
        return [dry_run.peft.Cost(f"`{m.name}`", "", 1, 2, 3, flops, flops, 4, seconds) for m in methods]

    monkeypatch.setattr(dry_run.peft, "costs", costs)
    planned.data.update(patch_voxels=(128, 128, 64), batch_size=2)
    text = "\n".join(dry_run.report(planned))
    assert jax.default_backend() == "cpu" and seen == [((128, 128, 64), 2), ((64, 64, 64), 1)]
    assert "step time scaled from batch 1 of 64x64x64" in text.splitlines()[0]
    assert table(text)["norm"][-1] == f"{2.0 * 2 * 4:.2f} s"


def test_an_adapted_network_is_no_base(planned, tmp_path):
    adapters = [{"kind": "lora", "target": "up_0/conv2", "rank": 1, "alpha": 1.0}]
    info = dataclasses.replace(INFO, kwargs={**INFO.kwargs, "adapters": adapters})
    shapes = parameter_shapes(info.network())
    modeldir.save_model(tmp_path / "run" / "model", info, paths.unflatten(
        {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}))  # fmt: skip
    planned.init_from = str(tmp_path / "run")
    with pytest.raises(ValueError, match="has adapters already; start from its base"):
        list(dry_run.report(planned))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"n_channels": 4}}, "base: that network has n_channels 2, config.model asks for 4"),
        ({"model": {"variant": "S"}}, "config.model asks for"),
        ({"model": {"output": "labels"}}, r"its head gives regions .* add --config.init_head=new"),
        ({"model": {"deep_supervision": True}}, r"does not train out_1/.*\+head"),
        ({"init_head": "new"}, r"does not train out_0/.*\+head"),
        ({"init_head": "fresh"}, "config.init_head is 'fresh'"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
        ({"init_from": ""}, "are both empty"),
        ({"peft": {"method": "lora", "targets": "enc_block_7"}}, "'lora': targets 'enc_block_7' matches nothing"),
        ({"optim": {"groups": (("up_9", 1.0, 1.0),)}}, "config.optim.groups: 'up_9' matches no trainable"),
        ({"data": {"patch_voxels": (24, 16, 16)}}, "three sizes divisible by 16"),
    ],
)
def test_what_a_run_would_refuse_is_refused_in_one_line(planned, change, message):
    planned.update(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        list(dry_run.report(planned))
    assert "\n" not in str(error.value)
