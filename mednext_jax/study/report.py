"""The study's result as text: one list of tables, written as Markdown and as a page without network."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from mednext_jax.study import figures
from mednext_jax.study.results import Difference, Effect, Estimate

HERE = Path(__file__).parent
SHORT = {"WT dice": "WT", "TC dice": "TC", "ET dice": "ET", "mean dice": "mean Dice", "mean sensitivity": "sensitivity",
         "mean specificity": "specificity", "mean precision": "precision", "mean lesionwise_dice": "lesion-wise Dice",
         "mean lesionwise_hd95_mm": "lesion-wise HD95 (mm)"}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A heading, what it says, a table (header and rows; empty without one) and a picture."""

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: Figure | None = None

    @property
    def name(self) -> str:
        """The title as a file name."""
        return self.title.lower().replace(" ", "_")


def number(value: float | None, digits: int = 3) -> str:
    """A number for readers; undefined is a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: Estimate) -> str:
    """A difference with its interval."""
    if math.isnan(value.mean):
        return "–"
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def with_interval(value: Estimate, digits: int = 3) -> str:
    """A mean with its interval, where there is one."""
    if math.isnan(value.low):
        return number(value.mean, digits)
    return f"{number(value.mean, digits)} [{number(value.low, digits)}, {number(value.high, digits)}]"


def score_rows(named: Mapping[str, Mapping[str, Estimate]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paper's table."""
    columns = list(next(iter(named.values())))
    header = ["", "cases", "seeds", *(SHORT.get(c, c) for c in columns)]
    rows = []
    for name, found in named.items():
        first = found["mean dice"]
        cells = [with_interval(found[c]) if c == "mean dice" else number(found[c].mean, 1 if c.endswith("_mm") else 3)
                 for c in columns]
        rows.append([name, str(first.cases), str(first.seeds), *cells])
    return header, rows


def difference_rows(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paired differences."""
    header = ["first − second", "mean Dice", "first better / equal / worse", "p", "Holm p"]
    rows = [[f"{d.first} − {d.second}", signed(d.estimate), f"{d.wins} / {d.ties} / {d.losses}", f"{d.p:.2g}",
             f"{d.p_holm:.2g}"] for d in found]  # fmt: skip
    return header, rows


def effect_rows(clean: Effect, effects: Sequence[Effect]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the ablations; ``clean`` is the study without a fault, over all repetitions."""
    header = ["fault", "drop with it", "change of the drop", "share of the drop (%)", "full", "adapter",
              "adapter − full", "change of that"]  # fmt: skip
    rows = [["none, all repetitions", with_interval(clean.drop), "", "", number(clean.full.mean),
             number(clean.adapter.mean), signed(clean.gap), ""]]  # fmt: skip
    for e in effects:
        share = "–" if math.isnan(e.share_of_drop.mean) else percent(e.share_of_drop)
        untouched = e.drop_change.low == e.drop_change.high == 0
        drop = ["", "none", ""] if untouched else [number(e.drop.mean), signed(e.drop_change), share]
        rows.append([e.fault, *drop, number(e.full.mean), number(e.adapter.mean), signed(e.gap), signed(e.gap_change)])
    return header, rows


def percent(value: Estimate) -> str:
    """A share with its interval, in per cent."""
    return f"{100 * value.mean:.0f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def markdown(title: str, note: str, sections: Sequence[Section]) -> str:
    """The tables as Markdown; pictures are left to the page."""
    parts = [f"# {title}", *([f"**{note}**"] if note else [])]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.rows:
            lines = [section.header, ["---", *["--:"] * (len(section.header) - 1)], *section.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def page(title: str, note: str, sections: Sequence[Section], links: Mapping[str, str]) -> str:
    """The same as an HTML page, pictures included.

    Args:
      links: text -> relative address of the evaluations' own reports.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_uri"] = _data_uri
    style = (HERE.parent / "evaluate" / "assets" / "report.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title, note=note, sections=sections, links=links, style=style
    )


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure).encode()).decode()


def plain_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)
