"""Opening an evaluation again, pictures, colours, and what fine-tuning changed."""

import io
import math
import re

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image as images

from mednext_jax.evaluate import archive, changes, cohort, measure, palette, pictures, plots, report, summary, tables

REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.fixture
def written(tmp_path):
    """A finished evaluation of one run in the old label scheme, and its folder."""
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[2:7, 3:8, 2:8] = 2
    truth[4, 5, 4:6] = 4
    for name, labels in (("truth", truth), ("mine", np.roll(truth, 1, 2))):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(labels, LPS), tmp_path / name / "a.nii.gz")
    scheme = {0: 0, 1: 1, 2: 2, 4: 3}
    references, arm = (
        cohort.relabelled(cohort.open_folder(n, tmp_path / p), "brats2021", scheme)
        for n, p in (("references", "truth"), ("mine", "mine"))
    )
    evaluation = cohort.evaluate([arm], references, measure.Settings(REGIONS, challenge="MET"))
    out = tmp_path / "out"
    out.mkdir()
    tables.write_table(out / "metrics.csv", evaluation.table)
    tables.write_lesions(out / "lesions.csv", evaluation.lesions)
    result = summary.summarise(evaluation.table)
    tables.write_json(out / "summary.json", summary.as_json(evaluation, result, {}))
    return evaluation, out


def test_evaluation_is_the_same_after_writing_and_loading(written):
    evaluation, out = written
    again = archive.load(out)
    assert again.settings == evaluation.settings
    assert again.lesions == {k: v for k, v in evaluation.lesions.items() if v}
    assert again.references.relabel == evaluation.references.relabel
    assert again.missing == evaluation.missing and again.extra == evaluation.extra
    # As text: NaN, which stands for what is undefined, equals nothing.
    assert repr(summary.summarise(again.table)) == repr(summary.summarise(evaluation.table))


def test_changed_label_file_is_noticed(written):
    evaluation, out = written
    file = evaluation.arms[0].files["a"]
    nib.save(nib.Nifti1Image(np.zeros((9, 10, 11), np.uint8), LPS), file)
    with pytest.raises(ValueError, match="a.nii.gz is not the file that was measured"):
        archive.load(out)


def test_folder_without_an_evaluation_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="launch/evaluate.py"):
        archive.load(tmp_path)


def test_chosen_cases_are_the_worst_median_and_best_by_mean_dice():
    table = tables.Table()
    for case, dice in zip("abcde", (0.9, 0.1, 0.5, math.nan, 0.7), strict=True):
        table.add("x", case, "A", {"dice": dice})
    order = sorted("abce", key=dict(zip("abce", (0.9, 0.1, 0.5, 0.7), strict=True)).get)
    assert report.chosen_cases(table) == {order[0]: "worst", order[2]: "median", order[3]: "best"}


def test_one_case_is_the_only_one_and_two_have_no_median():
    table = tables.Table()
    table.add("x", "a", "A", {"dice": 0.5})
    assert report.chosen_cases(table) == {"a": "only"}
    table.add("x", "b", "A", {"dice": 0.6})
    assert report.chosen_cases(table) == {"a": "worst", "b": "best"}


def test_view_turns_every_orientation_to_the_same_picture():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (5, 6, 7))
    ras = pictures.view(labels, labels, np.diag([1.0, 2.0, 3.0, 1.0]), None)
    turned = np.flip(labels.transpose(2, 0, 1), (1, 2))  # axes: z, -x, -y
    affine = np.array([[0, -1.0, 0, 4], [0, 0, -2.0, 10], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    again = pictures.view(turned, turned, affine, None)
    np.testing.assert_array_equal(ras.truth, again.truth)
    np.testing.assert_allclose(ras.spacing_mm, (1, 2, 3))
    np.testing.assert_allclose(again.spacing_mm, (1, 2, 3))


def test_errors_are_painted_in_three_colours():
    seen = pictures.View(None, np.zeros((9, 9, 3), int), np.zeros((9, 9, 3), int), (1, 1, 1), "no scan found")
    seen.truth[1:3, 4, 1], seen.pred[6:8, 4, 1] = 2, 2
    seen.truth[4, 1, 1], seen.pred[4, 1, 1] = 3, 1
    png = pictures.plane_png(seen, {"a": (1,), "b": (2,), "c": (3,)}, "axial", 1)
    pixels = (images.imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
    found = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    for colour in (palette.MISSED, palette.INVENTED, palette.SWAPPED):
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in found


def test_scan_beside_the_labels_is_found_by_name(tmp_path):
    for name in ("c1-t1c.nii.gz", "c1-t2f.nii.gz", "c1-seg.nii.gz", "c10-t2f.nii.gz", "c2_flair.nii"):
        (tmp_path / name).write_bytes(b"")
    assert pictures.find_scan("c1", [tmp_path]) == ("t2f", tmp_path / "c1-t2f.nii.gz")
    assert pictures.find_scan("c2", [tmp_path]) == ("flair", tmp_path / "c2_flair.nii")
    assert pictures.find_scan("c3", [tmp_path]) is None


@pytest.mark.parametrize("volumes", [(231.5, 239.5), (16, 30), (0.2, 310)])
def test_axis_of_volumes_has_a_few_labels_however_near_or_far_they_lie(volumes):
    table = tables.Table()
    for case, millilitres in zip("ab", volumes, strict=True):
        table.add("mine", case, "WT", {"dice": 0.5, "reference_volume_mm3": 1000 * millilitres})
    drawn = [float(text) for text in re.findall(r"<!-- ([\d.]+) -->", plots.dice_against_volume(table))]
    # Beside them, 0.0 to 1.0 in steps of 0.2 label the other axis.
    assert 8 <= len(drawn) <= 13 and sum(volumes[0] / 2 <= label <= 2 * volumes[1] for label in drawn) >= 2


def test_regions_keep_their_colours_and_others_get_free_ones():
    assert palette.colours(["WT", "TC", "ET"]) == {k: palette.FIXED[k] for k in ("WT", "TC", "ET")}
    assert len(set(palette.colours(["a", "b", "c"]).values())) == 3


def test_changes_tell_frozen_moved_and_new_parameters_apart():
    base = {"stem/kernel": np.ones((2, 3)), "enc/kernel": np.full(4, 2.0), "enc/bias": np.zeros(2)}
    adapted = {**base, "enc/kernel": np.full(4, 3.0), "enc/adapter/up": np.array([3.0, 4.0])}
    stem, enc = changes.by_stage(base, adapted)
    assert (stem.stage, stem.parameters, stem.new, stem.changed, stem.relative_change) == ("stem", 6, 0, 0, 0)
    assert (enc.parameters, enc.new, enc.changed, enc.new_norm) == (8, 2, 4, 5.0)
    assert enc.relative_change == pytest.approx(math.sqrt(4 * 1) / math.sqrt(4 * 4))


def test_changes_refuse_a_base_of_another_shape():
    with pytest.raises(ValueError, match="stem/kernel has shape"):
        changes.by_stage({"stem/kernel": np.ones(3)}, {"stem/kernel": np.ones(4)})
