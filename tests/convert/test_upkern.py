"""UpKern resamples kernels as PyTorch's interpolate does, in 2-D and 3-D."""

import numpy as np
import pytest

from mednext_jax.convert import upkern


def test_growing_from_three_to_five_taps_is_the_hand_computed_interpolation():
    # Centres of five taps on the three: 0.6 * (i + 0.5) - 0.5 = -0.2, 0.4, 1.0, 1.6, 2.2; the outermost are clamped.
    grown = upkern.grow(np.asarray([10.0, 20.0, 40.0], np.float32).reshape(3, 1, 1), (5,))
    np.testing.assert_allclose(grown.ravel(), [10, 10 + 0.4 * 10, 20, 20 + 0.6 * 20, 40], rtol=1e-6)


@pytest.mark.parametrize("small, large", [((1, 1, 1), (3, 3, 3)), ((3, 3, 3), (5, 5, 5)), ((3, 3, 3), (7, 7, 7)),
                                          ((5, 5, 5), (7, 7, 7)), ((3, 1, 5), (9, 3, 5)), ((3, 3), (5, 5)),
                                          ((3, 5), (7, 11)), ((5, 5), (9, 9))])  # fmt: skip
def test_growing_equals_pytorchs_interpolation(small, large):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    kernel = np.random.default_rng(0).standard_normal((*small, 2, 3)).astype(np.float32)
    mode = "trilinear" if len(small) == 3 else "bilinear"
    channels_first = torch.from_numpy(np.moveaxis(kernel, (-1, -2), (0, 1)).copy())
    theirs = torch.nn.functional.interpolate(channels_first, large, mode=mode)
    ours = upkern.grow(kernel, large)
    assert ours.dtype == np.float32 and ours.shape == (*large, 2, 3)
    np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), (0, 1), (-1, -2)), rtol=0, atol=1e-6)


def test_growing_to_the_same_size_changes_nothing():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 1, 4)).astype(np.float32)
    np.testing.assert_array_equal(upkern.grow(kernel, (3, 3)), kernel)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (6, 6, 6), (7, 7)])
def test_shrinking_even_sizes_and_other_dimensions_are_refused(sizes):
    with pytest.raises(ValueError, match="larger odd ones"):
        upkern.grow(np.zeros((5, 5, 5, 1, 2), np.float32), sizes)
