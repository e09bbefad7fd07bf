"""The study's pictures, each returned as SVG text."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from mednext_jax.evaluate import palette
from mednext_jax.evaluate.plots import STYLE, svg
from mednext_jax.study.results import Estimate

COLOURS = (palette.BLUE, palette.VERMILION, palette.GREEN, palette.ORANGE, palette.PURPLE, palette.SKY, palette.BLACK)


def accuracy_against_compute(points: Mapping[str, tuple[float, int, Estimate]], zero_shot: Estimate) -> str:
    """Mean Dice over the arithmetic of the whole training; a circle's area grows with the trained parameters.

    Args:
      points: arm -> (training FLOPs, trained parameters, mean Dice).
      zero_shot: drawn as a line: it costs nothing.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        most = max(parameters for _, parameters, _ in points.values())
        for number, (arm, (flops, parameters, dice)) in enumerate(points.items()):
            style = _style(number)
            axes.errorbar([flops], [dice.mean], [[max(dice.mean - dice.low, 0)], [max(dice.high - dice.mean, 0)]],
                          color=style["color"], linewidth=1, capsize=2)  # fmt: skip
            axes.scatter([flops], [dice.mean], s=25 + 220 * parameters / most, color=style["color"],
                         marker=style["marker"], alpha=0.75, edgecolor="black", linewidth=0.6,
                         label=f"{arm} ({parameters:,})")  # fmt: skip
        axes.axhline(zero_shot.mean, color="#777777", linestyle="--", linewidth=1.2, label="zero-shot")
        axes.set_xlabel("arithmetic of the whole training (FLOP)")
        axes.set_ylabel("mean Dice, target test cases")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="arm (trained parameters)",
                      title_fontsize=8, scatterpoints=1, markerscale=0.7)  # fmt: skip
        return svg(figure)


def few_shot_curve(curve: Mapping[str, Mapping[int, Estimate]], zero_shot: Estimate) -> str:
    """Mean Dice over the number of target cases trained on (log scale), with intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (arm, points) in enumerate(curve.items()):
            sizes = sorted(points)
            means = [points[size].mean for size in sizes]
            low = [max(points[size].mean - points[size].low, 0) for size in sizes]
            high = [max(points[size].high - points[size].mean, 0) for size in sizes]
            shift = [size * (1 + 0.03 * (number - len(curve) / 2)) for size in sizes]
            axes.errorbar(shift, means, [low, high], label=arm, capsize=2, linewidth=1.3, **_style(number))
        axes.axhline(zero_shot.mean, color="#777777", linestyle="--", linewidth=1.2, label="zero-shot")
        sizes = sorted({size for points in curve.values() for size in points})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("target cases trained on")
        axes.set_ylabel("mean Dice, target test cases")
        axes.legend(frameon=False, fontsize=8)
        return svg(figure)


def learning_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    """Training loss of every arm, mean over repetitions.

    Args:
      curves: arm -> (steps, losses).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for number, (arm, (steps, losses)) in enumerate(curves.items()):
            axes.plot(steps, losses, label=arm, markersize=3, linewidth=1.2, **_style(number))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return svg(figure)


def _style(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": palette.MARKERS[number % len(palette.MARKERS)]}
