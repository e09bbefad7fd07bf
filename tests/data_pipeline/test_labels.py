"""Label values mean what their naming says, or are refused by file name."""

import numpy as np
import pytest

from data_pipeline import labels


def test_regions_are_nested_and_in_order():
    assert list(labels.REGIONS) == ["WT", "TC", "ET"]
    assert set(labels.REGIONS["ET"]) < set(labels.REGIONS["TC"]) < set(labels.REGIONS["WT"])


def test_old_and_new_schemes_become_the_same_canonical_labels():
    old = np.array([[0, 1, 2, 4]], np.int16)
    new = np.array([[0, 1, 2, 3]], np.float64)
    for array, scheme in ((old, "brats2021"), (new, "brats2023")):
        result = labels.to_canonical(array, scheme)
        assert result.dtype == np.uint8 and result.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("scheme", "values"), [("brats2021", [3, 1, 2, 4]), ("brats2023", [3, 1, 2, 3])])
def test_canonical_labels_go_back_to_the_scheme(scheme, values):
    canonical = np.array([[[3, 1], [2, 3]]], np.uint8)
    expected = [[[4, 1], [2, 4]]] if scheme == "brats2021" else [[[3, 1], [2, 3]]]
    back = labels.from_canonical(canonical, scheme)
    assert back.tolist() == expected
    assert (labels.to_canonical(back, scheme) == canonical).all()


def test_value_4_in_new_naming_is_refused_with_file_and_remedy():
    with pytest.raises(ValueError, match=r"x-seg.nii.gz: label value 4 .*resection cavity.*--label_map=4:0"):
        labels.to_canonical(np.array([0, 4]), "brats2023", source="x-seg.nii.gz")


def test_value_4_in_new_naming_follows_the_users_map():
    assert labels.to_canonical(np.array([0, 4, 3]), "brats2023", {4: 0}).tolist() == [0, 0, 3]
    assert labels.detect_scheme("brats2023", [0, 4], label_map={4: 1}) == "brats2023"


def test_value_3_in_old_naming_is_refused_until_it_is_mapped():
    with pytest.raises(ValueError, match="label value 3 .*enhancing tumour; .*--label_map=3:3"):
        labels.detect_scheme("brats2021", [0, 1, 2, 3])
    assert labels.to_canonical(np.array([3]), "brats2021", {3: 3}).tolist() == [3]


@pytest.mark.parametrize("value", [0.5, -1, 7, 256, 1e20, np.nan, np.inf])
def test_impossible_values_are_refused(value):
    with pytest.raises(ValueError, match="label value"):
        labels.to_canonical(np.array([[0.0, value, 1.0]]), "brats2023")


def test_unknown_scheme_and_non_canonical_labels_are_refused():
    with pytest.raises(ValueError, match="brats1999"):
        labels.detect_scheme("brats1999", [0])
    with pytest.raises(ValueError, match="canonical labels are 0 to 3, found 4"):
        labels.from_canonical(np.array([4]), "brats2021")


def test_distinct_values_of_any_dtype():
    assert labels.distinct_values(np.array([[2, 0], [2, 1]], np.int8)) == [0, 1, 2]
    assert labels.distinct_values(np.array([300, -1, 1.5])) == [-1, 1.5, 300]


def test_region_mask_is_the_set_of_its_labels():
    array = np.array([0, 1, 2, 3])
    assert labels.region_mask(array, "TC").tolist() == [False, True, False, True]


def test_label_map_text_is_read():
    assert labels.parse_label_map("4:0, 5:2") == {4: 0, 5: 2}
    assert labels.parse_label_map("") == {}


@pytest.mark.parametrize("text", ["4", "4=0", "4:x", "-1:0", "4:4", "4:0,4:1", "300:0", "4:0:1"])
def test_bad_label_map_text_is_refused(text):
    with pytest.raises(ValueError, match="label map"):
        labels.parse_label_map(text)
