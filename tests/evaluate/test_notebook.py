"""notebooks/evaluate.ipynb, executed on two arms and on another tool's predictions."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mednext_jax.evaluate import cohort, measure, summary, tables

nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
for name in ("ipykernel", "ipywidgets", "pandas"):
    pytest.importorskip(name, reason="the notebook extra is not installed")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "evaluate.ipynb"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two arms, references with scans, and a workdir of a network with one changed and one new array."""
    root = tmp_path_factory.mktemp("notebook")
    rng = np.random.default_rng(0)
    for i in range(3):
        truth = np.zeros((20, 18, 16), np.uint8)
        truth[5:14, 5:13, 4:12], truth[7:11, 7:11, 6:10] = 2, 3
        folder = root / "refs" / f"BraTS-SSA-0000{i}-000"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(truth, np.eye(4)), folder / f"{folder.name}-seg.nii.gz")
        scan = rng.normal(200, 20, truth.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(scan, np.eye(4)), folder / f"{folder.name}-t2f.nii.gz")
        for arm, shift in (("one", 1), ("two", 2)):
            (root / arm).mkdir(exist_ok=True)
            pred = np.roll(truth, shift + i, axis=0)
            nib.save(nib.Nifti1Image(pred, np.eye(4)), root / arm / f"{folder.name}.nii.gz")
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a training leaves, made by hand: base/, model/ and metrics.jsonl."""
    jax = pytest.importorskip("jax")
    from mednext_jax import modeldir
    from mednext_jax.nn import adapters, mednext

    root = tmp_path_factory.mktemp("workdir")
    arguments = dict(in_channels=4, n_channels=2, n_classes=3, exp_r=1, block_counts=(1,) * 9)
    adapter = adapters.Adapter(kind="conv", target="bottleneck", gamma=2)
    image = jax.ShapeDtypeStruct((1, 16, 16, 16, 4), np.float32)
    rng = np.random.default_rng(1)

    def parameters(**changes):
        network = mednext.MedNeXt(**arguments, **changes)
        shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
        return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)

    regions = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
    info = modeldir.ModelInfo(
        kwargs=arguments, channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain",
        output="regions", label_scheme="brats2023", regions=regions, patch_voxels=(16, 16, 16),
    )  # fmt: skip
    modeldir.save_model(root / "base", info, parameters())
    adapted = dataclasses.replace(info, kwargs=arguments | {"adapters": [dataclasses.asdict(adapter)]})
    modeldir.save_model(root / "model", adapted, parameters(adapters=(adapter,)))
    lines = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.5, "val/WT": 0.7, "val/TC": None}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _execute(settings, monkeypatch):
    """Runs the notebook; returns all text it printed or displayed."""
    monkeypatch.setenv("EVALUATE_NOTEBOOK", json.dumps(settings))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    book = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(book, timeout=300, resources=place).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    text += "".join("".join(o["data"].get("text/plain", "")) for o in outputs if "data" in o)
    return text, [kind for o in outputs if "data" in o for kind in o["data"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_notebook_measures_the_predictions_of_another_tool(folders, monkeypatch):
    settings = {
        "EVALUATION": str(folders / "out"),
        "PREDICTIONS": {"theirs": str(folders / "one")},
        "REFERENCES": str(folders / "refs"),
    }
    text, kinds = _execute(settings, monkeypatch)
    assert "3 reference cases; arms theirs" in text and "n=3" in text
    assert kinds.count("image/svg+xml") == 3
    assert "No WORKDIRS given" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_notebook_compares_arms_and_shows_what_training_changed(folders, workdir, tmp_path, monkeypatch):
    names = {"references": "refs", "a": "one", "b": "two"}
    opened = [cohort.open_folder(name, folders / place) for name, place in names.items()]
    settings = measure.Settings({"WT": (1, 2, 3), "ET": (3,)})
    evaluation = cohort.evaluate(opened[1:], opened[0], settings)
    result = summary.summarise(evaluation.table)
    tables.write_table(tmp_path / "metrics.csv", evaluation.table)
    tables.write_lesions(tmp_path / "lesions.csv", evaluation.lesions)
    tables.write_json(tmp_path / "summary.json", summary.as_json(evaluation, result, {}))
    text, kinds = _execute({"EVALUATION": str(tmp_path), "WORKDIRS": {"adapter": str(workdir)}}, monkeypatch)
    assert "arms a, b" in text and "p (Holm)" in text
    assert kinds.count("image/svg+xml") == 3 + 1
    assert "application/vnd.jupyter.widget-view+json" in kinds
    assert "bottleneck" in text and "relative_change" in text


def test_notebook_is_committed_without_outputs():
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
