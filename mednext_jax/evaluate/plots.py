"""Charts of an evaluation, each returned as SVG text: one function, one chart."""

import io

import matplotlib
import matplotlib.lines
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mednext_jax.evaluate import palette, statistics
from mednext_jax.evaluate.tables import Table

STYLE = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "svg.hashsalt": "mednext_jax",
    "svg.fonttype": "path",
}
NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95, area weighted (mm)",
    "hd95_max_directed_mm": "HD95, max of directed (mm)",
    "hd95_pooled_mm": "HD95, pooled (mm)",
    "assd_mm": "ASSD (mm)",
    "lesionwise_dice": "Lesion-wise Dice",
    "lesionwise_hd95_mm": "Lesion-wise HD95 (mm)",
    "lesions_tp": "Lesions found (TP)",
    "lesions_fp": "False lesions (FP)",
    "lesions_fn": "Lesions missed (FN)",
    "instance_pq": "Instance PQ",
    "instance_rq": "Instance RQ (F1)",
    "instance_sq": "Instance SQ (mean Dice of pairs)",
    "volume_mm3": "Predicted volume (mm³)",
    "reference_volume_mm3": "True volume (mm³)",
    "volume_difference_mm3": "Volume difference (mm³)",
}


def title(metric: str) -> str:
    """Readable name of a metric."""
    if metric.startswith("nsd_"):
        return f"NSD at {metric[4:-2]} mm"
    return NAMES.get(metric, metric.replace("_", " ").capitalize())


def boxes(table: Table, metric: str) -> str:
    """Box and strip of every arm within every region; a point is a case (mean over seeds)."""
    arms, regions = list(table.arms), table.regions
    colours = palette.colours(regions)
    with matplotlib.rc_context(STYLE):
        width = max(4.2, 0.62 * len(arms) * len(regions) + 1.6)
        figure = Figure(figsize=(width, 3.5), layout="constrained")
        axes = figure.add_subplot()
        ticks, names = [], []
        for r, region in enumerate(regions):
            for a, arm in enumerate(arms):
                x = r * (len(arms) + 0.8) + a
                values = _case_values(table, arm, region, metric)
                _box(axes, x, values, colours[region], palette.MARKERS[a % len(palette.MARKERS)])
                ticks.append(x)
                names.append(f"{arm if len(arms) > 1 else region}\nn={values.size}")
            if len(arms) > 1:
                middle = r * (len(arms) + 0.8) + (len(arms) - 1) / 2
                axes.text(middle, 1.02, region, transform=axes.get_xaxis_transform(), ha="center",
                          color=colours[region], fontweight="bold")  # fmt: skip
        turn = {"rotation": 40, "ha": "right"} if max(map(len, names)) > 12 else {}
        axes.set_xticks(ticks, names, fontsize=9, **turn)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(title(metric))
        if _is_share(metric):
            axes.set_ylim(-0.03, 1.03)
        return svg(figure)


def paired_differences(table: Table, first: str, second: str, metric: str) -> str:
    """Every shared case's first - second, sorted, per region, with the mean and its bootstrap interval."""
    shared = sorted(set(table.cases(first)) & set(table.cases(second)))
    colours = palette.colours(table.regions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * len(table.regions) + 0.9, 3.0), layout="constrained")
        panels = figure.subplots(1, len(table.regions), sharey=True, squeeze=False)[0]
        for axes, region in zip(panels, table.regions, strict=True):
            sides = [table.matrix(arm, region, metric, shared) for arm in (first, second)]
            difference = statistics.mean(sides[0], 0) - statistics.mean(sides[1], 0)
            difference = np.sort(difference[~np.isnan(difference)])
            found = statistics.compare(*sides)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.vlines(range(difference.size), 0, difference, color=colours[region], linewidth=1, alpha=0.6)
            axes.plot(difference, "o", color=colours[region], markersize=4)
            if found.n > 1:
                axes.axhspan(found.low, found.high, color="#888888", alpha=0.25, linewidth=0)
            axes.axhline(found.mean_difference, color="#444444", linestyle="--", linewidth=1.2)
            axes.set_title(f"{region}  (n={found.n})", fontsize=10)
            axes.set_xlabel("cases, sorted")
            axes.set_xticks([])
        panels[0].set_ylabel(f"{title(metric)}:\n{first} − {second}")
        return svg(figure)


def bland_altman(table: Table, arm: str) -> str:
    """Predicted - true volume against their mean, in ml, with mean difference and limits of agreement."""
    colours = palette.colours(table.regions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.85 * len(table.regions) + 0.6, 2.9), layout="constrained")
        panels = figure.subplots(1, len(table.regions), squeeze=False)[0]
        for axes, region in zip(panels, table.regions, strict=True):
            pred, truth = (
                _case_values(table, arm, region, m, keep_undefined=True) / 1000
                for m in ("volume_mm3", "reference_volume_mm3")
            )
            difference = pred - truth
            axes.plot((pred + truth) / 2, difference, "o", color=colours[region], markersize=4, alpha=0.8)
            axes.axhline(difference.mean(), color="#444444", linestyle="--", linewidth=1.2)
            if difference.size > 1:
                for side in (-1.96, 1.96):
                    limit = difference.mean() + side * difference.std(ddof=1)
                    axes.axhline(limit, color="#999999", linestyle=":", linewidth=1.2)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_title(f"{region}  (n={difference.size})", fontsize=10)
            axes.set_xlabel("mean volume (ml)")
        panels[0].set_ylabel("predicted − true (ml)")
        return svg(figure)


def dice_against_volume(table: Table) -> str:
    """Dice of every case against the true volume of the region (log scale); a marker shape per arm."""
    regions, arms = table.regions, list(table.arms)
    colours = palette.colours(regions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * len(regions) + 0.7, 3.1), layout="constrained")
        panels = figure.subplots(1, len(regions), sharey=True, squeeze=False)[0]
        for axes, region in zip(panels, regions, strict=True):
            shown = 0
            for a, arm in enumerate(arms):
                volume = _case_values(table, arm, region, "reference_volume_mm3", keep_undefined=True) / 1000
                dice = _case_values(table, arm, region, "dice", keep_undefined=True)
                kept = (volume > 0) & ~np.isnan(dice)
                shown = max(shown, int(kept.sum()))
                marker = palette.MARKERS[a % len(palette.MARKERS)]
                axes.plot(volume[kept], dice[kept], marker, color=colours[region], markersize=4.5,
                          alpha=0.75, markerfacecolor=colours[region] if a == 0 else "none")  # fmt: skip
            if shown:
                axes.set_xscale("log")
                least, most = axes.get_xlim()
                # Within a decade LogLocator sets as many labels as a wide figure has room for.
                by_decades = matplotlib.ticker.LogLocator(subs=(1.0, 3.0), numticks=5)
                axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4) if most < 10 * least else by_decades)
                axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(f"{region}  (n={shown})", fontsize=10)
            axes.set_xlabel("true volume (ml)")
        panels[0].set_ylabel("Dice")
        if len(arms) > 1:
            handles = [
                matplotlib.lines.Line2D([], [], linestyle="", color="#555555", label=arm,
                                        marker=palette.MARKERS[a % len(palette.MARKERS)],
                                        markerfacecolor="#555555" if a == 0 else "none")
                for a, arm in enumerate(arms)
            ]  # fmt: skip
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
        return svg(figure)


def _box(axes: Axes, x: float, values: np.ndarray, colour: str, marker: str) -> None:
    if values.size >= 3:  # a box of fewer points would pretend to be a distribution
        axes.boxplot(
            values, positions=[x], widths=0.62, showfliers=False, patch_artist=True, manage_ticks=False,
            boxprops={"facecolor": colour + "38", "edgecolor": colour},
            medianprops={"color": "black", "linewidth": 1.4},
            whiskerprops={"color": colour}, capprops={"color": colour},
        )  # fmt: skip
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, values.size)
    axes.plot(x + spread, values, marker, color=colour, markersize=3.5, alpha=0.8, markeredgewidth=0)


def _case_values(table: Table, arm: str, region: str, metric: str, keep_undefined=False) -> np.ndarray:
    values = statistics.mean(table.matrix(arm, region, metric), axis=0)
    return values if keep_undefined else values[~np.isnan(values)]


def _is_share(metric: str) -> bool:
    return not metric.endswith(("_mm", "_mm3", "_tp", "_fp", "_fn"))


def svg(figure: Figure) -> str:
    """A figure as SVG text, the same for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
