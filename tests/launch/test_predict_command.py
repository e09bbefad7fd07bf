"""Label maps come out in each case's own space, header and scheme; a stop or a bad case costs nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from data_pipeline import preprocess
from mednext_jax import modeldir, peft
from mednext_jax.infer import export
from mednext_jax.infer.postprocess import PostProcess
from mednext_jax.infer.sliding_window import SlidingWindow
from mednext_jax.modeldir import ModelInfo
from mednext_jax.nn import paths
from mednext_jax.nn.mednext import parameter_shapes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import prediction  # noqa: E402

INFO = ModelInfo(
    kwargs={"in_channels": 4, "n_channels": 2, "n_classes": 3, "exp_r": 1, "block_counts": [1] * 9},
    channels=("t1n", "t1c", "t2w", "t2f"), normalization="zscore_brain", output="regions",
    label_scheme="brats2023", regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}, patch_voxels=(16, 16, 16),
)  # fmt: skip
SUFFIXES = {
    "brats2021": {"t1n": "_t1", "t1c": "_t1ce", "t2w": "_t2", "t2f": "_flair", "seg": "_seg"},
    "brats2023": {name: f"-{name}" for name in ("t1n", "t1c", "t2w", "t2f", "seg")},
}
NAMES = {"brats2021": "BraTS2021_{:05d}", "brats2023": "BraTS-SSA-{:05d}-000"}


def rotation(degrees):
    """Rotation about the axis (1, 2, 3)."""
    axis, angle = np.array([1, 2, 3]) / np.sqrt(14), np.deg2rad(degrees)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


AFFINES = {
    "as the challenge": nib.affines.from_matvec(np.diag([-1, -1, 1]), [0, 239, 0]),
    "flipped": nib.affines.from_matvec(np.diag([1, -1, -1]), [3, 4, 5]),
    "permuted": nib.affines.from_matvec(np.array([[0, 0, -1.0], [1, 0, 0], [0, 1, 0]]), [9, 8, 7]),
    "oblique": nib.affines.from_matvec(rotation(25), [-5, 11, 2.5]),
    "oblique, permuted, anisotropic": nib.affines.from_matvec(
        rotation(-15) @ np.array([[0, -1.0, 0], [0, 0, 3.0], [1.5, 0, 0]]), [1, 2, 3]
    ),
}


def write_case(folder, number, affine, naming="brats2023", size=(21, 18, 25)):
    """A case whose t1c shows the segmentation; returns its id and its label map as in the file."""
    rng = np.random.default_rng(number)
    labels = np.zeros(size, np.uint8)
    labels[4:17, 5:15, 6:20] = rng.choice(4, (13, 10, 14), p=[0.4, 0.2, 0.2, 0.2])
    brain = np.zeros(size, bool)
    brain[2:19, 3:17, 4:23] = True
    name = NAMES[naming].format(number)
    (folder / name).mkdir(parents=True)
    for channel, suffix in SUFFIXES[naming].items():
        array = np.where(brain, rng.integers(100, 200, size), 0).astype(np.int16)
        if channel == "t1c":
            array = np.where(brain, 100 + 50 * labels.astype(np.int16), 0).astype(np.int16)
        if channel == "seg":
            array = np.where(labels == 3, 4 if naming == "brats2021" else 3, labels).astype(np.uint8)
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = b"made for a test"
        nib.save(image, folder / name / f"{name}{suffix}.nii.gz")
    return name, array


class TrueSegmentation:
    """In the network's place: reads the labels off t1c, window by window."""

    info = INFO

    def __init__(self):
        self.window = SlidingWindow(self.apply, (16, 16, 16), 3, activation="sigmoid")
        self.images_seen = 0

    @staticmethod
    def apply(levels, x):
        label = jnp.abs(x[..., 1:2] - levels).argmin(-1)
        label = jnp.where((x != 0).any(-1), label, 0)
        return jnp.stack([20.0 * jnp.isin(label, jnp.array(v)) - 10 for v in INFO.regions.values()], -1)

    def predict(self, image, progress=None):
        self.images_seen += 1
        levels = np.unique(image[(image != 0).any(-1), 1])
        assert len(levels) == 4
        return self.window.predict(levels, image, progress)


@pytest.mark.parametrize("naming", ["brats2021", "brats2023"])
def test_true_segmentation_comes_back_voxel_for_voxel_whatever_the_header(tmp_path, naming):
    cases = [write_case(tmp_path / "in", i, affine, naming) for i, affine in enumerate(AFFINES.values())]
    jobs, bad = prediction.find_jobs(tmp_path / "in")
    (tmp_path / "out").mkdir()
    failed = prediction.predict_cases(jobs, TrueSegmentation(), tmp_path / "out", prediction.Options(), False)
    assert not failed and not bad
    for name, truth in cases:
        written = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(written.dataobj), truth)
        given = nib.load(tmp_path / "in" / name / f"{name}{SUFFIXES[naming]['t1n']}.nii.gz")
        np.testing.assert_array_equal(written.affine, given.affine)
        for field in ("pixdim", "sform_code", "qform_code", "xyzt_units", "descrip", "srow_x", "dim"):
            np.testing.assert_array_equal(written.header[field], given.header[field])


def predict_into(folder, jobs, options=None, predictor=None):
    folder.mkdir(exist_ok=True)
    return prediction.predict_cases(
        jobs, predictor or TrueSegmentation(), folder, options or prediction.Options(), False
    )


def test_label_scheme_and_probabilities_are_written_as_asked(tmp_path):
    name, truth = write_case(tmp_path / "in", 1, AFFINES["flipped"], "brats2021")
    jobs, _ = prediction.find_jobs(tmp_path / "in")
    predict_into(tmp_path / "out", jobs, prediction.Options(label_scheme="brats2023", save_probabilities=True))
    written = np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)
    np.testing.assert_array_equal(written, np.where(truth == 4, 3, truth))
    saved = np.load(tmp_path / "out" / "probabilities" / f"{name}.npz")
    assert list(saved["names"]) == ["WT", "TC", "ET"] and saved["probabilities"].dtype == np.float16
    np.testing.assert_array_equal(saved["probabilities"][..., 2] > 0.5, truth == 4)


def test_small_components_are_removed_by_their_volume_in_the_cases_own_spacing(tmp_path):
    name, truth = write_case(tmp_path / "in", 1, AFFINES["oblique, permuted, anisotropic"])
    jobs, _ = prediction.find_jobs(tmp_path / "in")
    voxel_mm3 = 1.5 * 1 * 3
    rules = PostProcess(min_total_mm3={"ET": voxel_mm3 * ((truth == 3).sum() + 0.5)})
    predict_into(tmp_path / "out", jobs, prediction.Options(rules))
    written = np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)
    np.testing.assert_array_equal(written, np.where(truth == 3, 1, truth))


def test_store_gives_the_same_label_maps_as_its_raw_cases(tmp_path):
    for number, affine in enumerate(AFFINES.values()):
        write_case(tmp_path / "in", number, affine)
    preprocess.preprocess(tmp_path / "in", tmp_path / "store", workers=1, folds=0, progress=False)
    for source, output in (("in", "from_raw"), ("store", "from_store")):
        assert not predict_into(tmp_path / output, prediction.find_jobs(tmp_path / source)[0])
    files = sorted((tmp_path / "from_raw").glob("*.nii.gz"))
    assert len(files) == len(AFFINES)
    for file in files:
        assert file.read_bytes() == (tmp_path / "from_store" / file.name).read_bytes()


def test_bad_case_is_reported_in_one_line_and_the_others_are_done(tmp_path, capsys):
    names = [write_case(tmp_path / "in", i, AFFINES["flipped"])[0] for i in range(3)]
    damaged = tmp_path / "in" / names[1] / f"{names[1]}-t2w.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    jobs, _ = prediction.find_jobs(tmp_path / "in")
    failed = predict_into(tmp_path / "out", jobs)
    assert list(failed) == [names[1]] and "t2w" in failed[names[1]]
    written = sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz"))
    assert written == [f"{names[0]}.nii.gz", f"{names[2]}.nii.gz"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"failed: {names[1]}: ")


def test_second_run_computes_only_what_is_missing(tmp_path):
    names = [write_case(tmp_path / "in", i, AFFINES["flipped"])[0] for i in range(3)]
    jobs, _ = prediction.find_jobs(tmp_path / "in")
    predict_into(tmp_path / "out", jobs)
    before = (tmp_path / "out" / f"{names[0]}.nii.gz").stat().st_mtime_ns
    (tmp_path / "out" / f"{names[1]}.nii.gz").unlink()
    again = TrueSegmentation()
    predict_into(tmp_path / "out", jobs, predictor=again)
    assert again.images_seen == 1 and (tmp_path / "out" / f"{names[1]}.nii.gz").exists()
    assert (tmp_path / "out" / f"{names[0]}.nii.gz").stat().st_mtime_ns == before


@pytest.mark.parametrize("source", ["in", "store"])
def test_a_case_whose_scans_changed_is_predicted_again(tmp_path, source, capsys):
    names = [write_case(tmp_path / "in", i, AFFINES["flipped"])[0] for i in range(2)]

    def predictor_that_ran():
        if source == "store":
            preprocess.preprocess(tmp_path / "in", tmp_path / "store", workers=1, folds=0, progress=False)
        predictor = TrueSegmentation()
        assert not predict_into(tmp_path / "out", prediction.find_jobs(tmp_path / source)[0], predictor=predictor)
        return predictor

    assert predictor_that_ran().images_seen == 2
    files = [tmp_path / "in" / name / f"{name}-t1c.nii.gz" for name in names]
    os.utime(files[0], (1, 1))  # as a copy changes it
    scan = nib.load(files[1])
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], scan.affine, scan.header), files[1])
    before = nib.load(tmp_path / "out" / f"{names[1]}.nii.gz").get_fdata()
    assert predictor_that_ran().images_seen == 1
    assert f"{names[1]}: its scans changed" in capsys.readouterr().err
    assert (nib.load(tmp_path / "out" / f"{names[1]}.nii.gz").get_fdata() != before).any()
    assert predictor_that_ran().images_seen == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_damaged_or_missing_notes_of_what_was_predicted_from_are_told_and_cost_no_label_map(tmp_path, content, capsys):
    name, _ = write_case(tmp_path / "in", 1, AFFINES["flipped"])
    jobs, _ = prediction.find_jobs(tmp_path / "in")
    predict_into(tmp_path / "out", jobs)
    file = tmp_path / "out" / prediction.INPUTS_FILE
    file.unlink() if content is None else file.write_text(content)
    assert not predict_into(tmp_path / "out", jobs)
    assert (tmp_path / "out" / f"{name}.nii.gz").exists()
    told = capsys.readouterr().err
    assert ("inputs.json is damaged" in told) == (content is not None)
    assert "nothing tells which scans 1 label maps" in told


def test_case_with_channels_in_another_order_is_refused():
    record = {"channels": ["t2f", "t1n", "t1c", "t2w"], "normalization": {"name": "zscore_brain"}}
    with pytest.raises(ValueError, match="another order"):
        prediction.check_record(INFO, record)


def test_predictions_of_two_models_or_options_are_not_mixed(tmp_path):
    record = {"models": ["sha256:1"], "options": {"flips": False, "patch_voxels": (16, 32, 16)}}
    job = prediction.Job("BraTS-SSA-00001-000", lambda: None, {})
    prediction.begin(tmp_path, record, [job])
    label_map = tmp_path / "BraTS-SSA-00001-000.nii.gz"
    label_map.touch()
    prediction.begin(tmp_path, {**record, "sources": ["elsewhere"]}, [job])
    with pytest.raises(ValueError, match="predicted with other options"):
        prediction.begin(tmp_path, {**record, "options": {"flips": True}}, [job])
    prediction.begin(tmp_path, {**record, "models": ["sha256:2"]}, [job], keep=False)
    assert not label_map.exists()
    (tmp_path / "other.nii.gz").touch()
    (tmp_path / prediction.RECORD_FILE).unlink()
    for keep in (True, False):
        with pytest.raises(ValueError, match="not written by this program"):
            prediction.begin(tmp_path, record, [job], keep)


def test_no_label_map_is_removed_before_all_may_be_replaced(tmp_path):
    record = {"models": ["sha256:1"], "options": {}}
    jobs = [prediction.Job(f"BraTS-SSA-{number:05d}-000", lambda: None, {}) for number in range(3)]
    files = [tmp_path / f"{job.case_id}.nii.gz" for job in jobs]
    for file in files:
        file.touch()
    with pytest.raises(ValueError, match="not written by this program"):
        prediction.begin(tmp_path, record, jobs, keep=False)
    (tmp_path / prediction.RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="00002-000.nii.gz was predicted with other models"):
        prediction.begin(tmp_path, {**record, "models": ["sha256:2"]}, jobs[:2], keep=False)
    assert all(file.exists() for file in files)
    prediction.begin(tmp_path, record, jobs[:1], keep=False)  # same model: only what is asked for is made again
    assert [file.exists() for file in files] == [False, True, True]


def test_files_whose_names_say_nothing_are_failures(tmp_path):
    name, _ = write_case(tmp_path / "in", 1, AFFINES["flipped"])
    (tmp_path / "in" / "Pazient\u00e9").mkdir()
    strange = tmp_path / "in" / "Pazient\u00e9" / "Pazient\u00e9-t1n.nii.gz"
    strange.write_bytes((tmp_path / "in" / name / f"{name}-t1n.nii.gz").read_bytes())
    jobs, bad = prediction.find_jobs(tmp_path / "in")
    assert [job.case_id for job in jobs] == [name]
    assert list(bad.values()) == ["unknown name"] and str(strange) in next(iter(bad))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``command(*arguments) -> finished process`` of launch/predict.py, all with one compilation cache."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments):
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cache), "JAX_PLATFORMS": "cpu"}
        launcher = [sys.executable, str(ROOT / "launch" / "predict.py"), *map(str, arguments)]
        return subprocess.run(launcher, capture_output=True, text=True, env=environment, timeout=300)

    return run


@pytest.fixture
def model(tmp_path):
    """A tiny model and an adapter for it."""
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(0, 0.5, leaf.shape).astype(np.float32)
            for path, leaf in parameter_shapes(INFO.network()).items()}
    modeldir.save_model(tmp_path / "workdir" / "model", INFO, flat)
    method = peft.create("norm")
    trained = {path: leaf * 2 for path, leaf in peft.split(flat, method.rule)[0].items()}
    peft.save_adapter(tmp_path / "adapter", method, {**flat, **trained}, paths.unflatten(flat), INFO)
    return tmp_path / "workdir"


def test_command_segments_a_folder_with_a_model_and_its_adapter(tmp_path, model, command):
    name, truth = write_case(tmp_path / "in", 1, AFFINES["flipped"], "brats2021")
    place = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--overlap=0")
    result = command(f"--model={model}", f"--adapter={tmp_path / 'adapter'}", *place)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: 1 label maps, 0 cases failed\n"
    assert "predict: 1/1 cases" in result.stderr
    written = nib.load(tmp_path / "out" / f"{name}.nii.gz")
    assert written.shape == truth.shape and set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    record = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert record["failed"] == {} and record["models"][0].startswith("sha256:")
    assert record["options"]["overlap"] == 0
    mixed = command(f"--model={model}", *place)
    assert (mixed.returncode, mixed.stdout) == (1, "")
    assert "predicted with other models" in mixed.stderr and mixed.stderr.count("\n") == 1
    next((tmp_path / "in").rglob("*t2.nii.gz")).unlink()
    lost = command(f"--model={model}", f"--adapter={tmp_path / 'adapter'}", *place)
    assert lost.returncode == 1 and "its earlier label map stays" in lost.stderr
    assert (tmp_path / "out" / f"{name}.nii.gz").exists()


def test_model_of_other_channels_is_refused_once_for_all_cases(tmp_path, model, command):
    for number in range(3):
        write_case(tmp_path / "in", number, AFFINES["flipped"])
    _, params = modeldir.load_model(model)
    info = dataclasses.replace(INFO, channels=("t2f", "t1n", "t1c", "t2w"))
    modeldir.save_model(tmp_path / "other", info, params)
    result = command(f"--model={tmp_path / 'other'}", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert result.returncode == 1 and "in another order" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_merged_model_predicts_without_the_peft_package(tmp_path, model):
    write_case(tmp_path / "in", 1, AFFINES["flipped"])
    info, base = modeldir.load_model(model)
    method = peft.create("lora", rank=1, targets="decoder")
    _, params = method.apply_to(info.network(), base, jax.random.key(0))
    trained = {path: leaf + 0.5 for path, leaf in peft.split(params, method.rule)[0].items()}
    peft.save_adapter(tmp_path / "lora", method, {**paths.flatten(params), **trained}, base, info)
    peft.merge_directories(model, tmp_path / "lora", tmp_path / "merged")
    folded = paths.flatten(modeldir.load_model(tmp_path / "merged")[1])
    changed = {path for path, leaf in paths.flatten(base).items() if not np.array_equal(folded[path], leaf)}
    assert changed == {f"dec_block_{i}/0/{layer}/kernel" for i in range(4) for layer in ("conv2", "conv3")}
    program = (
        "import runpy, sys\n"
        "del sys.argv[0]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print('ended', end.code)\n"
        "print([name for name in sys.modules if name.startswith('mednext_jax.peft')])"
    )
    launch = ROOT / "launch"
    environment = {"PYTHONPATH": f"{ROOT}:{launch}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
                   "JAX_PLATFORMS": "cpu"}  # fmt: skip
    arguments = [f"--model={tmp_path / 'merged'}", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"]
    result = subprocess.run([sys.executable, "-c", program, str(launch / "predict.py"), *arguments, "--overlap=0"],
                            capture_output=True, text=True, env=environment, timeout=300)  # fmt: skip
    assert "1 label maps, 0 cases failed\nended 0\n[]\n" in result.stdout, result.stderr


def test_export_command_writes_a_program_that_loads(tmp_path, model):
    launcher = [sys.executable, str(ROOT / "launch" / "export.py"), f"--model={model}", f"--output={tmp_path / 'out'}"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(launcher, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "(16, 16, 16), sigmoid, on cpu, cuda" in result.stdout
    assert export.load_export(tmp_path / "out").n_outputs == 3


def test_bad_arguments_are_one_line_and_exit_code_1(tmp_path, model, command):
    write_case(tmp_path / "in", 1, AFFINES["flipped"])
    (tmp_path / "empty").mkdir()
    good = {"model": model, "input": tmp_path / "in", "output": tmp_path / "out"}
    for change, words in [
        ({"input": tmp_path / "empty"}, "no case found"),
        ({"patch_voxels": "16,16,20"}, "divisible by 16"),
        ({"thresholds": "WT=0.5"}, "one per region like WT:0.5"),
        ({"output": tmp_path / "in"}, "lie in each other"),
        ({"output": tmp_path / "in" / "out"}, "lie in each other"),
        ({"output": tmp_path}, "lie in each other"),
    ]:
        result = command(*[f"--{name}={value}" for name, value in {**good, **change}.items()])
        assert result.returncode == 1 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
        assert not list(tmp_path.rglob("out")) and not list(tmp_path.rglob("prediction.json"))
