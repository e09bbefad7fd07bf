"""A picture of simulated cases: three views of the four channels, and the labels over FLAIR."""

from __future__ import annotations

import io

import numpy as np

from data_pipeline.cohorts import CHANNELS
from data_pipeline.simulate.case import SimulatedCase

_TITLES = {"t1n": "T1", "t1c": "T1 + contrast", "t2w": "T2", "t2f": "FLAIR"}
# Background, necrosis, oedema, enhancing tumour.
_COLOURS = np.array([[0, 0, 0], [0.20, 0.45, 1.0], [0.25, 0.85, 0.35], [1.0, 0.25, 0.20]])
_OPACITY = 0.55
_VIEWS = ("axial", "coronal", "sagittal")


def _plane(volume: np.ndarray, view: str, at: tuple[int, int, int]) -> np.ndarray:
    """One slice as seen on a screen: front or top up, the patient's right on the left."""
    if view == "axial":
        return volume[:, :, at[2]].T
    if view == "coronal":
        return volume[:, at[1], ::-1].T
    return volume[at[0], :, ::-1].T


def _window(image: np.ndarray) -> np.ndarray:
    brain = image[image > 0]
    low, high = np.percentile(brain, (0.5, 99.7)) if brain.size else (0, 1)
    return np.clip((image - 0.5 * low) / (high - 0.5 * low), 0, 1) * (image > 0)


def _best_slices(labels: np.ndarray) -> tuple[int, int, int]:
    """Along each axis, the slice with most core (or, without a core, most tumour)."""
    core = (labels == 1) | (labels == 3)
    shown = core if core.any() else labels > 0
    return tuple(int(shown.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def case_tiles(case: SimulatedCase, views: tuple[str, ...] = _VIEWS) -> list[list[np.ndarray]]:
    """RGB tiles (rows of views, columns of channels and overlay), cropped to the brain, values in [0, 1]."""
    brain = np.argwhere(case.images["t1n"] > 0)
    low, high = np.maximum(brain.min(0) - 1, 0), brain.max(0) + 2
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    labels = case.labels[box]
    images = {channel: _window(case.images[channel][box].astype(np.float32)) for channel in CHANNELS}
    at = _best_slices(labels)
    rows = []
    for view in views:
        tiles = [np.repeat(_plane(images[channel], view, at)[..., None], 3, axis=-1) for channel in CHANNELS]
        drawn = _plane(labels, view, at)
        overlay = np.where(drawn[..., None] > 0, (1 - _OPACITY) * tiles[-1] + _OPACITY * _COLOURS[drawn], tiles[-1])
        rows.append([*tiles, overlay])
    return rows


def _palette() -> np.ndarray:
    """256 RGB colours, uint8: greys, and each label's colour over greys."""
    greys = np.repeat(np.linspace(0, 1, 136)[:, None], 3, axis=1)
    dim = np.repeat(np.linspace(0, 1, 40)[:, None], 3, axis=1)
    tints = [(1 - _OPACITY) * dim + _OPACITY * colour for colour in _COLOURS[1:]]
    return np.rint(255 * np.concatenate([greys, *tints])).astype(np.uint8)


def montage(cases: list[tuple[str, SimulatedCase]], views: tuple[str, ...] = _VIEWS, width_px: int = 900) -> bytes:
    """PNG of several cases below each other.

    Args:
      cases: (caption, case) pairs.
      views: rows of every case.
      width_px: width of the picture; the height follows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = [(caption, row) for caption, case in cases for row in case_tiles(case, views)]
    heights = [max(tile.shape[0] for tile in row) / max(tile.shape[1] for tile in row) for _, row in rows]
    columns = len(CHANNELS) + 1
    tile_inch = 2.0
    size = columns * tile_inch + 0.3, sum(heights) * tile_inch + 0.4
    figure = Figure(size, dpi=width_px / size[0], facecolor="black", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    titles = [*(_TITLES[channel] for channel in CHANNELS), "labels"]
    for number, (caption, row) in enumerate(rows):
        for column, tile in enumerate(row):
            axis = axes[number, column]
            axis.imshow(tile, interpolation="bilinear")
            axis.set(xticks=[], yticks=[], facecolor="black")
            if number == 0:
                axis.set_title(titles[column], color="white", fontsize=11)
        if number % len(views) == 0:
            axes[number, 0].set_ylabel(caption, color="white", fontsize=10)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    file = io.BytesIO()
    # Nearly all is grey: with a palette the picture looks the same and takes half the space.
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette().tobytes())
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()
