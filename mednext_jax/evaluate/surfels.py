"""Area of the surface element at a voxel corner, for each of the 256 ways its eight voxels can be filled.

The surface of a mask is cut into one element per voxel corner: the marching-cubes patch inside the cube whose
vertices are the eight voxel centres around that corner (Lorensen and Cline 1987). The areas are computed here
from three rules instead of a table of cases:

  1. the patch's vertices are the middles of the cube edges that join a filled and an empty voxel;
  2. on a face whose two diagonals differ, the voxels in the cube's minority are cut apart;
  3. a polygon of five or six vertices is not flat: it is split into the triangles of largest total area on
     the unit cube (ties have equal areas under any spacing).

These reproduce the element areas of Google DeepMind's `surface-distance`, on which the official BraTS metrics
stand, for all 256 codes and any spacing; the tests compare the two.
"""

from functools import lru_cache
from itertools import product

import numpy as np

CORNERS = tuple(product((0, 1), repeat=3))
Edge = tuple[tuple[int, ...], tuple[int, ...]]


def neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Eight-bit code of the voxels around every corner of a mask.

    Args:
      mask: (D, H, W) bool.

    Returns:
      (D+1, H+1, W+1) uint8. Corner (i, j, k) lies between voxels i-1 and i (and so on); outside the grid is
      empty. Bit ``n`` is set if the voxel at offset ``CORNERS[n] - 1`` is filled. 0 and 255 are not surface.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    sizes = [n + 1 for n in mask.shape]
    codes = np.zeros(sizes, np.uint8)
    for bit, offset in enumerate(CORNERS):
        codes |= padded[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] << bit
    return codes


def areas_mm2(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(256,) area in mm2 of the surface element of every neighbour code under a voxel spacing."""
    sz, sy, sx = (float(s) for s in spacing_mm)
    return np.linalg.norm(_area_vectors() * (sy * sx, sz * sx, sz * sy), axis=-1).sum(axis=-1)


@lru_cache(maxsize=1)
def _area_vectors() -> np.ndarray:
    """(256, triangles, 3) vectors normal to each triangle, as long as its area on the unit cube."""
    table = [_patch(frozenset(c for n, c in enumerate(CORNERS) if code >> n & 1)) for code in range(256)]
    vectors = np.zeros((256, max(len(t) for t in table), 3))
    for code, triangles in enumerate(table):
        vectors[code, : len(triangles)] = triangles
    return vectors


def _patch(filled: frozenset) -> np.ndarray:
    """(n, 3) triangle area vectors of one cube whose corners in `filled` are inside the mask."""
    triangles = [np.zeros((0, 3))]
    for polygon in _polygons(filled):
        middles = np.mean(polygon, axis=1)
        choices = [
            np.array([np.cross(middles[b] - middles[a], middles[c] - middles[a]) / 2 for a, b, c in split])
            for split in _triangulations(tuple(range(len(polygon))))
        ]
        triangles.append(max(choices, key=lambda v: round(np.linalg.norm(v, axis=1).sum(), 9)))
    return np.concatenate(triangles)


def _polygons(filled: frozenset) -> list[list[Edge]]:
    """Closed loops of cut edges (each a pair of cube corners) around the filled corners."""
    links: dict[Edge, list[Edge]] = {}
    cut_apart = filled if len(filled) <= 4 else frozenset(CORNERS) - filled
    for axis, side in product(range(3), (0, 1)):
        ring = [c[:axis] + (side,) + c[axis:] for c in ((0, 0), (0, 1), (1, 1), (1, 0))]
        edges = [tuple(sorted((ring[i - 1], ring[i]))) for i in range(4)]  # edges[i] ends in ring[i]
        cut = [e for e in edges if (e[0] in filled) != (e[1] in filled)]
        if len(cut) == 2:
            pairs = [tuple(cut)]
        else:  # none, or all four: one line around each corner that is cut apart
            pairs = [(edges[i], edges[(i + 1) % 4]) for i in range(4) if ring[i] in cut_apart and cut]
        for a, b in pairs:
            links.setdefault(a, []).append(b)
            links.setdefault(b, []).append(a)
    loops = []
    while links:
        loop = [min(links)]
        while following := [e for e in links.pop(loop[-1]) if e in links]:
            loop.append(following[0])
        loops.append(loop)
    return loops


def _triangulations(polygon: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
    """All ways to cut a polygon into triangles: choose the third vertex on its closing side, then recurse."""
    if len(polygon) < 3:
        return [[]]
    first, last = polygon[0], polygon[-1]
    return [
        [(first, polygon[k], last), *left, *right]
        for k in range(1, len(polygon) - 1)
        for left in _triangulations(polygon[: k + 1])
        for right in _triangulations(polygon[k:])
    ]
