"""Validation: whole cases at the store's resolution, by sliding window, scored by the Dice of each region."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mednext_jax.evaluate import overlap
from mednext_jax.infer.postprocess import PostProcess
from mednext_jax.infer.sliding_window import SlidingWindow
from mednext_jax.train import devices, waits
from mednext_jax.train.preemption import Stopped

THRESHOLD = 0.5
READ_SECONDS = 300.0  # longest time for one case

Regions = Mapping[str, Sequence[int]]
LoadCase = Callable[[str], tuple[np.ndarray, np.ndarray]]


def label_of(score: str) -> int | None:
    """The label that ``config.eval.score`` names, as in "label1"; None for "mean" and regions."""
    name, number = score[:5], score[5:]
    return int(number) if name == "label" and number.isdecimal() else None


def check_score(score: str, regions: Regions) -> None:
    """Raises ValueError if ``config.eval.score`` names neither the mean, nor a region, nor a label."""
    if score not in ("mean", *regions) and label_of(score) not in (1, 2, 3):
        raise ValueError(
            f"config.eval.score is {score!r}; it must be mean, {', '.join(regions)}, or label1, label2, label3"
        )


def predicted_masks(outputs: np.ndarray, output: str, regions: Regions) -> dict[str, np.ndarray]:
    """Boolean mask of each region.

    Args:
      outputs: (D, H, W, K) probabilities: one sigmoid per region, or a softmax over labels.
      output: ``"regions"`` or ``"labels"``.
    """
    if output == "regions":
        return {name: outputs[..., i] > THRESHOLD for i, name in enumerate(regions)}
    return overlap.region_masks(outputs.argmax(-1), regions)


def average(dice: np.ndarray, regions: Regions) -> dict[str, float]:
    """Means over cases and regions.

    Args:
      dice: (cases, regions); NaN where a region is absent from both truth and prediction. Such entries are
        left out of a region's mean (and counted out in ``n_<region>``); a region without any has mean NaN
        and is left out of ``mean``.

    Returns: ``{region: mean, "mean": mean of the regions' means, "n_<region>": cases that counted}``.
    """
    counted = (~np.isnan(dice)).sum(0)
    sums = np.nansum(dice, 0)
    means = [float(s / n) if n else float("nan") for s, n in zip(sums, counted, strict=True)]
    known = [value for value in means if not np.isnan(value)]
    scores = dict(zip(regions, means, strict=True))
    scores["mean"] = sum(known) / len(known) if known else float("nan")
    return scores | {f"n_{name}": int(n) for name, n in zip(regions, counted, strict=True)}


def validate(
    window: SlidingWindow,
    params: Any,
    case_ids: Sequence[str],
    load: LoadCase,
    output: str,
    regions: Regions,
    stop: Callable[[], bool] = lambda: False,
    score: str = "mean",
) -> dict[str, float]:
    """Dice of WT, TC, ... over whole cases, see :func:`average`. With several processes each takes its share.

    A ``score`` that names a label ("label1") is measured too, on the label map; it has no part in the mean.

    Args:
      window: gives probabilities for a volume.
      params: what the window's network takes.
      load: case id -> image (D, H, W, C), label (D, H, W).
      stop: asked before each case.

    Raises:
      Stopped: ``stop()`` became true.
      TimeoutError: a case was not read within :data:`READ_SECONDS`.
    """
    named = label_of(score)
    columns = dict(regions) if named is None else {**regions, score: (named,)}
    dice = np.full((len(case_ids), len(columns)), np.nan, np.float32)
    for row in range(jax.process_index(), len(case_ids), jax.process_count()):
        if stop():
            raise Stopped
        image, label = _read(load, case_ids[row])
        outputs = window.predict(params, image)
        predicted = predicted_masks(outputs, output, regions)
        if named is not None:
            predicted[score] = PostProcess()(outputs, output, regions, (1.0, 1.0, 1.0)) == named
        truth = overlap.region_masks(label, columns)
        dice[row] = [overlap.dice(predicted[name], truth[name]) for name in columns]
    if jax.process_count() > 1:
        devices.meet("validated")
        shares = multihost_utils.process_allgather(dice)  # (processes, cases, regions)
        rows = np.arange(len(case_ids))
        dice = np.asarray(shares)[rows % jax.process_count(), rows]
    scores = average(dice[:, : len(regions)].astype(np.float64), regions)
    if named is not None:
        scores[score] = average(dice[:, len(regions) :].astype(np.float64), {score: (named,)})["mean"]
    return scores


def _read(load: LoadCase, case_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Image and label in memory: what is only mapped would be read from the disk later, without a limit."""
    told = f"validation case {case_id} was not read within {READ_SECONDS:g} s: check the disk that holds the store"
    return waits.within(READ_SECONDS, lambda: tuple(np.array(part) for part in load(case_id)), told)
