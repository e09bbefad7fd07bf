"""Choice and cutting of one crop, against NumPy's own padding and hand-worked corners."""

import numpy as np
import pytest

from data_pipeline import patches

NOWHERE = {"WT": np.zeros((0, 3), np.int32), "TC": np.zeros((0, 3), np.int32)}


def choose(shape, patch, foreground=NOWHERE, fraction=0.0, index=0):
    return patches.choose_start(shape, patch, foreground, fraction, patches.sample_generator(7, index))


def test_sample_generator_depends_on_seed_and_index_alone():
    first = patches.sample_generator(3, 10).random(4)
    np.testing.assert_array_equal(first, patches.sample_generator(3, 10).random(4))
    others = [patches.sample_generator(*key).random(4) for key in ((3, 11), (4, 10), (10, 3))]
    assert all((other != first).all() for other in others)


def test_uniform_start_reaches_every_position_equally_often():
    starts = [choose((7, 5, 9), (5, 5, 6), index=i) for i in range(3000)]
    found, counts = np.unique(starts, axis=0, return_counts=True)
    assert len(found) == 3 * 1 * 4
    assert counts.min() > 3000 / 12 * 0.75 and counts.max() < 3000 / 12 * 1.25


@pytest.mark.parametrize("voxel", [(0, 0, 0), (14, 15, 16), (7, 0, 16), (6, 8, 3)])
def test_foreground_crop_contains_its_voxel_and_stays_inside(voxel):
    shape, patch = (15, 16, 17), (5, 8, 7)
    start = choose(shape, patch, {"ET": np.array([voxel])}, 1.0)
    for s, v, p, size in zip(start, voxel, patch, shape, strict=True):
        assert 0 <= s <= v < s + p <= size


def test_foreground_crop_is_centred_where_there_is_room():
    assert choose((30, 30, 30), (5, 8, 7), {"ET": np.array([[15, 15, 15]])}, 1.0) == (13, 11, 12)


def test_foreground_voxels_may_be_stored_unsigned():
    assert choose((9, 9, 9), (5, 5, 5), {"ET": np.array([[0, 1, 8]], np.uint16)}, 1.0) == (0, 0, 4)


def test_foreground_regions_are_equally_likely_whatever_their_size():
    foreground = {"WT": np.tile([1, 1, 1], (500, 1)), "TC": NOWHERE["TC"], "ET": np.array([[20, 20, 20]])}
    starts = [choose((25, 25, 25), (3, 3, 3), foreground, 1.0, i)[0] for i in range(1000)]
    assert set(starts) == {0, 19}
    assert 0.45 < np.mean(np.equal(starts, 19)) < 0.55


def test_foreground_fraction_is_the_share_of_centred_crops():
    foreground = {"ET": np.array([[50, 50, 50]])}
    centred = [choose((101, 101, 101), (3, 3, 3), foreground, 0.33, i) == (49, 49, 49) for i in range(2000)]
    assert abs(np.mean(centred) - 0.33) < 0.03


def test_case_without_foreground_gives_uniform_crops():
    starts = {choose((9, 9, 9), (8, 8, 8), NOWHERE, 1.0, i) for i in range(100)}
    assert starts == {(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)}


def test_small_volume_lies_in_the_middle_of_the_patch():
    assert choose((4, 5, 6), (9, 5, 8)) == (-2, 0, -1)  # 9 - 4 = 5 to pad: 2 before, 3 after
    assert choose((4, 5, 6), (9, 5, 8), {"ET": np.array([[3, 4, 5]])}, 1.0) == (-2, 0, -1)


@pytest.mark.parametrize("start", [(0, 0, 0), (3, 2, 1), (-2, 1, -3), (-4, -1, 5)])
@pytest.mark.parametrize("channels", [(), (4,)])
def test_cut_equals_padding_and_slicing(start, channels):
    volume = np.random.default_rng(0).standard_normal((7, 9, 8, *channels)).astype(np.float16)
    out = np.full((11, 5, 6, *channels), np.nan, np.float32)
    patches.cut(volume, start, out)
    padded = np.pad(volume, [(20, 20)] * 3 + [(0, 0)] * len(channels))
    expected = padded[tuple(slice(20 + s, 20 + s + n) for s, n in zip(start, out.shape, strict=False))]
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_cut_converts_labels_to_the_type_of_the_batch():
    out = np.empty((2, 2, 2), np.int32)
    patches.cut(np.full((3, 3, 3), 3, np.uint8), (1, 1, 1), out)
    assert (out == 3).all()


def test_cut_converts_every_finite_half_number_exactly():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)].reshape(31, 2, 1, 1024)
    out = np.empty((31, 2, 1, 1024), np.float32)
    patches.cut(half, (0, 0, 0), out)
    np.testing.assert_array_equal(out.view(np.int32), half.astype(np.float32).view(np.int32))
