"""Surface element areas against solid geometry and against DeepMind's package."""

import numpy as np
import pytest

from mednext_jax.evaluate import surfels


def test_neighbour_codes_reach_one_corner_beyond_the_mask_on_every_side():
    mask = np.ones((1, 2, 3), bool)
    codes = surfels.neighbour_codes(mask)
    assert codes.shape == (2, 3, 4)
    assert (codes > 0).all() and codes[0, 0, 0] == 1 << 7 and codes[1, 2, 3] == 1


def test_area_of_a_lone_voxel_is_that_of_its_octahedron():
    # eight triangles between the middles of the edges: the octahedron with corners half a voxel away
    spacing = (1.0, 2.0, 3.0)
    a, b, c = 1 / 2, 2 / 2, 3 / 2
    triangle = 0.5 * np.sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2)
    codes = surfels.neighbour_codes(np.ones((1, 1, 1), bool))
    assert surfels.areas_mm2(spacing)[codes].sum() == pytest.approx(8 * triangle, rel=1e-14)


def test_area_inside_a_flat_face_is_one_voxel_face():
    areas = surfels.areas_mm2((2.0, 3.0, 5.0))
    half = sum(1 << n for n, corner in enumerate(surfels.CORNERS) if corner[0] == 0)
    assert areas[half] == areas[255 - half] == 3 * 5
    assert areas[0] == areas[255] == 0


def test_areas_are_equal_for_a_code_and_its_complement():
    areas = surfels.areas_mm2((1.1, 0.7, 2.3))
    np.testing.assert_allclose(areas, areas[::-1], rtol=1e-12)


def test_areas_equal_deepminds_for_all_codes_and_any_spacing():
    lookup_tables = pytest.importorskip("surface_distance.lookup_tables")
    # their bit of the corner at (i, j, k) counts down from 128, ours counts up from 1
    reversed_bits = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
    for spacing in ((1.0, 1.0, 1.0), (1.0, 0.75, 3.0), (0.3, 2.2, 1.7)):
        theirs = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
        np.testing.assert_allclose(surfels.areas_mm2(spacing)[reversed_bits], theirs, rtol=1e-14)
