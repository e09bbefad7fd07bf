"""The study's pictures: one function, one figure."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mednext_jax.evaluate import palette, plots, statistics
from mednext_jax.evaluate.plots import STYLE
from mednext_jax.evaluate.tables import Table
from mednext_jax.study.results import Effect, Estimate

COLOURS = (palette.BLUE, palette.VERMILION, palette.GREEN, palette.ORANGE, palette.PURPLE, palette.SKY, palette.BLACK)


PNG_DPI = 100


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same for the same figure."""
    with matplotlib.rc_context(STYLE):
        return plots.svg(figure)


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def boxes(table: Table, arms: Sequence[str]) -> Figure:
    """Dice of every region as boxes over the test cases, one per arm; a point is a case, averaged over repetitions."""
    colours = palette.colours(table.regions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(table.regions), 0.3 * len(arms) + 1.1), layout="constrained")
        panels = figure.subplots(1, len(table.regions), sharey=True, squeeze=False)[0]
        for axes, region in zip(panels, table.regions, strict=True):
            for place, arm in enumerate(arms):
                values = statistics.mean(table.matrix(arm, region, "dice"), axis=0)
                values, colour = values[~np.isnan(values)], colours[region]
                axes.boxplot(
                    values, positions=[place], widths=0.66, orientation="horizontal", showfliers=False,
                    patch_artist=True, manage_ticks=False, boxprops={"facecolor": colour + "38", "edgecolor": colour},
                    medianprops={"color": "black"}, whiskerprops={"color": colour}, capprops={"color": colour},
                )  # fmt: skip
                spread = np.random.default_rng(0).uniform(-0.2, 0.2, values.size)
                axes.plot(values, place + spread, "o", color=colour, markersize=2.5, alpha=0.6, markeredgewidth=0)
            axes.set_title(region, color=colours[region], fontweight="bold", fontsize=10)
            axes.set_xlim(-0.03, 1.03)
            axes.set_xlabel("Dice")
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(arms)), arms, fontsize=9)
        panels[0].invert_yaxis()
        return figure


def effects(found: Sequence[Effect]) -> Figure:
    """What every fault adds to the drop, and to the gap between adapter and full fine-tuning, with intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 0.32 * len(found) + 1.3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, of, title in zip(
            panels, (lambda e: e.drop_change, lambda e: e.gap_change),
            ("change of the drop,\nsource − target", "change of\nadapter − full"), strict=True,
        ):  # fmt: skip
            changes = [of(effect) for effect in found]
            means = np.array([c.mean for c in changes])
            low, high = (np.array([getattr(c, side) for c in changes]) for side in ("low", "high"))
            spans = [np.maximum(means - low, 0), np.maximum(high - means, 0)]
            axes.errorbar(means, range(len(found)), xerr=spans, fmt="o", color=palette.BLUE, capsize=2.5, markersize=5)
            axes.axvline(0, color="#777777", linewidth=1, linestyle="--")
            axes.set_xlabel(f"{title} (mean Dice)")
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(found)), [effect.fault for effect in found], fontsize=9)
        panels[0].set_ylim(len(found) - 0.5, -0.5)
        return figure


def accuracy_against_compute(points: Mapping[str, tuple[float, int, Estimate]], zero_shot: Estimate) -> Figure:
    """Mean Dice over the arithmetic of the whole training; a circle's area grows with the trained parameters.

    Args:
      points: arm -> (training FLOPs, trained parameters, mean Dice).
      zero_shot: drawn as a line: it costs nothing.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        most = max(parameters for _, parameters, _ in points.values())
        places = _side_by_side([flops for flops, *_ in points.values()])
        for number, (place, (arm, (_, parameters, dice))) in enumerate(zip(places, points.items(), strict=True)):
            style = _style(number)
            axes.errorbar([place], [dice.mean], [[max(dice.mean - dice.low, 0)], [max(dice.high - dice.mean, 0)]],
                          color=style["color"], linewidth=1, capsize=2)  # fmt: skip
            axes.scatter([place], [dice.mean], s=25 + 220 * parameters / most, color=style["color"],
                         marker=style["marker"], alpha=0.75, edgecolor="black", linewidth=0.6,
                         label=f"{arm} ({parameters:,})")  # fmt: skip
        axes.axhline(zero_shot.mean, color="#777777", linestyle="--", linewidth=1.2, label="zero-shot")
        axes.xaxis.set_major_locator(MaxNLocator(5))  # few: the labels are wide
        axes.xaxis.set_major_formatter(EngFormatter("FLOP"))
        axes.set_xlabel("arithmetic of the whole training")
        axes.set_ylabel("mean Dice, target test cases")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="arm (trained parameters)",
                      title_fontsize=8, scatterpoints=1, markerscale=0.7)  # fmt: skip
        return figure


def _side_by_side(values: Sequence[float]) -> list[float]:
    """The values, those that are equal a little apart, so that one circle does not hide another."""
    step = 0.03 * (max(values) - min(values) or max(values))
    return [value + step * (list(values[:i]).count(value) - (list(values).count(value) - 1) / 2)
            for i, value in enumerate(values)]  # fmt: skip


def few_shot_curve(curve: Mapping[str, Mapping[int, Estimate]], zero_shot: Estimate) -> Figure:
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
        return figure


def learning_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Training loss of every arm, mean over repetitions.

    Args:
      curves: arm -> (steps, losses).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for number, (arm, (steps, losses)) in enumerate(curves.items()):
            line = "-" if number < len(COLOURS) else "--"
            axes.plot(steps, losses, label=arm, markersize=3, linewidth=1.2, linestyle=line, **_style(number))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return figure


def _style(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": palette.MARKERS[number % len(palette.MARKERS)]}
