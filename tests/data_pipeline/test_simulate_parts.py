"""The simulator's parts against what can be computed by hand."""

import io

import numpy as np
import pytest

from data_pipeline import simulate
from data_pipeline.simulate.artefacts import Scan, acquire, slice_profiles
from data_pipeline.simulate.grid import Grid, interpolate, smooth_field, whole_grid
from data_pipeline.simulate.tumour import travel_mm

BOX = Grid(1.0, (40, 50, 20), (31, 37, 45))


def scan(**changes):
    quiet = {"slice_thickness_mm": 1.0, "slice_offset": 0.3, "snr": 1e6, "bias": 0.0, "ghost_weight": 0.0}
    still = {"ghost_shift_mm": 12.0, "ghost_axis": 1, "blur_mm": 0.0, "units": 1000.0}
    return Scan(**{**quiet, **still, **changes})


def scanned(signal, seed=0, **changes):
    inside = np.ones(signal.shape, bool)
    return acquire(scan(**changes), np.random.SeedSequence(seed), signal, inside, BOX).astype(float)


def test_one_mm_grid_is_that_of_brats():
    grid = whole_grid(1.0)
    assert grid.shape == (240, 240, 155)
    np.testing.assert_array_equal(grid.affine(), [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, 2.5, 3.0, 4.0])
def test_every_grid_starts_at_the_same_corner_of_the_box(spacing_mm):
    affine = whole_grid(spacing_mm).affine()
    corner = affine @ [-0.5, -0.5, -0.5, 1]
    np.testing.assert_allclose(corner[:3], [0.5, 239.5, -0.5])


def test_interpolation_reproduces_a_straight_line():
    step, first = 4.0, (30.0, 44.0, 12.0)
    knots = np.indices((14, 13, 15)) * step + np.array(first).reshape(3, 1, 1, 1)
    for axis in range(3):
        expected = np.broadcast_to(BOX.axes_mm()[axis], BOX.shape)
        np.testing.assert_allclose(interpolate(knots[axis], first, step, BOX), expected, rtol=1e-6)


def test_field_has_unit_variance_and_the_asked_width():
    grid = whole_grid(2.0)
    field = smooth_field(np.random.default_rng(0), 12.0, grid)
    assert field.mean() == pytest.approx(0, abs=0.1)
    assert field.std() == pytest.approx(1, abs=0.1)
    # Noise under a kernel of width w correlates over w * sqrt(2): half at a lag of about w / sqrt(2).
    lag = round(12.0 / np.sqrt(2) / 2.0)
    for axis in range(3):
        near, far = np.take(field, range(50), axis), np.take(field, range(lag, 50 + lag), axis)
        assert np.mean(near * far) == pytest.approx(0.5, abs=0.12)


def test_field_is_the_same_in_a_part_of_the_grid():
    whole = smooth_field(np.random.default_rng(3), 9.0, whole_grid(1.0))
    part = smooth_field(np.random.default_rng(3), 9.0, BOX)
    np.testing.assert_array_equal(part, whole[BOX.slices_in(whole_grid(1.0))])


def test_travel_follows_the_fast_way_around_a_wall():
    slowness = np.ones((15, 9, 5), np.float32)
    slowness[7, 1:] = 1e4  # a wall with a door at index 0
    start = np.full(slowness.shape, np.inf, np.float32)
    start[3, 8, 2] = 0
    travel = travel_mm(start, slowness, 2.0, 200.0)
    assert travel[3, 4, 2] == pytest.approx(4 * 2.0)
    # To the door at (7, 0): 4 diagonal steps and 4 straight ones; beyond, the same again.
    half = 2.0 * (4 * np.sqrt(2) + 4)
    assert travel[11, 8, 2] == pytest.approx(2 * half, rel=1e-4)


def test_travel_stops_at_the_limit():
    start = np.full((20, 3, 3), np.inf, np.float32)
    start[0, 1, 1] = 0
    assert travel_mm(start, np.ones(start.shape, np.float32), 1.0, 6.0).max() == 6.0


def test_noise_matches_the_snr():
    signal = np.full(BOX.shape, 0.7, np.float32)
    image = scanned(signal, snr=20.0)
    assert image.mean() / image.std() == pytest.approx(20, rel=0.03)


def test_noise_of_thick_slices_is_correlated_along_z_alone():
    signal = np.full(BOX.shape, 0.7, np.float32)
    # Linear interpolation between slices 5 apart: the autocorrelation of a triangle, at a fifth of its half base.
    for thickness, expected in ((1.0, 0.0), (5.0, 1 - 1.5 / 5**2 + 0.75 / 5**3)):
        noise = scanned(signal, snr=20.0, slice_thickness_mm=thickness)
        noise -= noise.mean(axis=(0, 1))
        along = [np.mean(np.take(noise, range(30), a) * np.take(noise, range(1, 31), a)) for a in range(3)]
        np.testing.assert_allclose(np.array(along) / noise.var(), [0, 0, expected], atol=0.05)


@pytest.mark.parametrize("thickness", [1.3, 5.0, 6.0])
def test_slices_keep_a_constant_and_the_total(thickness):
    average, back = slice_profiles(scan(slice_thickness_mm=thickness), BOX)
    np.testing.assert_allclose(average.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(back.sum(1), 1, rtol=1e-5)
    spread = (back @ average)[:, 12:33]  # what becomes of one bright voxel, away from the ends
    assert spread.sum(0).mean() == pytest.approx(1, rel=0.03)
    assert np.count_nonzero(spread > 0.01, axis=0).min() * BOX.spacing_mm >= thickness


def test_slices_as_thin_as_voxels_are_left_alone():
    assert slice_profiles(scan(slice_thickness_mm=1.0), BOX) is None


def test_ghosts_are_shifted_copies_of_the_head():
    signal = np.zeros(BOX.shape, np.float32)
    signal[15, 18, 20] = 1.0
    image = scanned(signal, ghost_weight=0.1, ghost_shift_mm=12.0, ghost_axis=1)
    assert image[15, 18, 20] == pytest.approx(800, abs=1)
    assert image[15, 6, 20] == pytest.approx(100, abs=1)
    assert image[15, 30, 20] == pytest.approx(100, abs=1)


def test_shading_varies_slowly():
    image = scanned(np.full(BOX.shape, 1.0, np.float32), bias=0.2)
    assert np.ptp(image) > 20
    assert max(np.abs(np.diff(image, axis=axis)).max() for axis in range(3)) < 20


def test_montage_is_a_png_of_the_asked_width():
    from PIL import Image

    case = simulate.simulate_case(simulate.SOURCE, simulate.case_seed(0, simulate.SOURCE, 0), 3.0)
    picture = Image.open(io.BytesIO(simulate.montage([("a case", case)], width_px=400)))
    assert picture.format == "PNG"
    assert picture.width == pytest.approx(400, abs=1)
    colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    red = (colours[:, 0] > 120) & (colours[:, 0] > colours[:, 1:].max(1) + 60)
    assert red.any()  # the enhancing tumour is drawn
