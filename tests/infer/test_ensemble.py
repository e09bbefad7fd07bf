"""Models from their directories to averaged probabilities."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from mednext_jax import modeldir, peft
from mednext_jax.infer.ensemble import Ensemble, Member, check_alike, load_member

IMAGE = np.random.default_rng(5).standard_normal((17, 32, 16, 4)).astype(np.float32)
WINDOW = IMAGE[:16]


@dataclasses.dataclass(frozen=True)
class Scale:
    """A network that multiplies the first channels by its parameter."""

    outputs: int = 3

    def apply(self, variables, x):
        return x[..., : self.outputs] * variables["params"]["factor"]


def member(make_model, factor, **changes):
    return Member(make_model(**changes)[0], Scale(), {"factor": np.float32(factor)}, f"model {factor}")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_ensemble_averages_probabilities_and_not_logits(make_model):
    members = [member(make_model, factor) for factor in (1, 2, 6)]
    expected = (sigmoid(IMAGE) + sigmoid(2 * IMAGE) + sigmoid(6 * IMAGE))[..., :3] / 3
    np.testing.assert_allclose(Ensemble(members).predict(IMAGE), expected, atol=1e-6)


def test_members_may_differ_in_patch_and_one_architecture_is_compiled_once(make_model):
    ensemble = Ensemble([member(make_model, 1), member(make_model, 2)])
    ensemble.predict(IMAGE)
    assert len(ensemble._windows) == 1
    mixed = Ensemble([member(make_model, 1), member(make_model, 2, patch_voxels=(8, 8, 8))], overlap=0.25)
    expected = (sigmoid(IMAGE) + sigmoid(2 * IMAGE))[..., :3] / 2
    np.testing.assert_allclose(mixed.predict(IMAGE), expected, atol=1e-6)
    assert len(mixed._windows) == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"channels": ("t1c", "t1n", "t2w", "t2f")}, r"expects the channels \(t1n, .*\(t1c, t1n"),
        ({"normalization": "minmax"}, "minmax"),
        ({"output": "labels", "kwargs": {"n_classes": 4}}, "their output are regions and labels"),
        ({"regions": {"WT": [1, 2, 3], "TC": [1, 3], "NCR": [1]}}, "their regions are"),
        ({"regions": {"TC": [1, 3], "WT": [1, 2, 3], "ET": [3]}}, "their regions are"),
    ],
)
def test_models_that_mean_different_things_are_not_averaged(make_model, change, line):
    with pytest.raises(ValueError, match=line):
        check_alike([member(make_model, 1), member(make_model, 2, **change)])


def test_ensemble_without_models_is_refused():
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])


def test_nan_is_reported_with_the_model_that_made_it(make_model):
    with pytest.raises(ValueError, match="model nan returned NaN"):
        Ensemble([member(make_model, 1), member(make_model, np.nan)]).predict(IMAGE)


def test_saved_model_with_deep_supervision_predicts_as_its_first_output(make_model, tmp_path):
    info, params = make_model(kwargs={**make_model()[0].kwargs, "deep_supervision": True})
    modeldir.save_model(tmp_path / "model", info, params)
    loaded = load_member(tmp_path / "model")
    assert not loaded.network.deep_supervision
    ours = Ensemble([loaded], overlap=0).predict(WINDOW)
    logits = jax.jit(info.network().apply)({"params": params}, WINDOW[None])[0][0]
    np.testing.assert_allclose(ours, jax.nn.sigmoid(logits), atol=1e-4)


def test_adapter_is_put_on_its_base_and_refused_by_another(make_model, tmp_path):
    info, params = make_model()
    modeldir.save_model(tmp_path / "base", info, params)
    modeldir.save_model(tmp_path / "other", *make_model(seed=1))
    method = peft.create("norm")
    _, adapted = method.apply_to(info.network(), params, jax.random.key(0))
    adapted = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, adapted)
    peft.save_adapter(tmp_path / "site", method, adapted, params, info)
    trained, _ = peft.split(adapted, method.rule)
    loaded = load_member(tmp_path / "base", tmp_path / "site")
    expected = modeldir.paths.unflatten({**modeldir.paths.flatten(params), **trained})
    assert modeldir.params_hash(loaded.params) == modeldir.params_hash(expected)
    with pytest.raises(ValueError, match="trained on the base"):
        load_member(tmp_path / "other", tmp_path / "site")
    load_member(tmp_path / "other", tmp_path / "site", force=True)
    description = tmp_path / "site" / "adapter_config.json"
    edited = json.loads(description.read_text()) | {"channels": ["t2f", "t1n", "t1c", "t2w"]}
    description.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="site was trained with channels t2f, t1n, t1c, t2w, the base has t1n, t1c"):
        load_member(tmp_path / "base", tmp_path / "site", force=True)


def test_plain_models_are_loaded_without_the_peft_package(make_model, tmp_path, monkeypatch):
    modeldir.save_model(tmp_path / "model", *make_model())
    for name in [name for name in sys.modules if name.startswith("mednext_jax.peft")]:
        monkeypatch.delitem(sys.modules, name)
    load_member(tmp_path / "model")
    assert not any(name.startswith("mednext_jax.peft") for name in sys.modules)
