"""charts: the report's pictures, as inline SVG that takes its colours from the page.

Drawn by matplotlib without a display. Text, axes and grid get stand-in colours that become `currentColor` and CSS
variables, so that one picture serves light and dark pages; figures are narrow, to be legible on a phone.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from teal.statistics import FIRST_NON_FINITE, InputStatistics

WIDTH = 4.7  # inches; 450 CSS pixels
INK, FAINT, GRID, PAGE = "#010203", "#020304", "#030405", "#040506"  # stand-ins
CSS_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", GRID: "var(--grid)", PAGE: "var(--page)"}
SERIES = ("#3b82c4", "#d97706", "#2a9d6f", "#b5539c", "#8b6f4e", "#c2414b")  # at least 3:1 on white and on black
MARKERS = ("o", "s", "^", "D", "v", "P")
SHADES = "viridis"
LONGEST_NAME = 32
CURVES = 8  # of blocks in one panel
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "teal", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
    "xtick.labelsize": 9, "ytick.labelsize": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 5, "figure.constrained_layout.use": True,
    "axes.unicode_minus": True,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker: x, y and how far each bar reaches up, and down, too, unless `down` says."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    up: Sequence[float]
    down: Sequence[float] | None = None
    line: bool = True


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str,
    description: str,
    log_y: bool = False,
    level_line: tuple[float, str] | None = None,
) -> str:
    """Series with error bars as one chart; `level_line` is a height and what it means."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, one in enumerate(series):
            down = one.up if one.down is None else one.down
            axes.errorbar(
                one.x, one.y, yerr=(down, one.up), label=_label(one.name), color=SERIES[index % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)], linestyle="-" if one.line else "none", capsize=2.5,
            )  # fmt: skip
        if level_line is not None:
            height, meaning = level_line
            axes.axhline(height, color=INK, linewidth=1, linestyle="--", label=_label(meaning))
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_log_ticks(axes.get_ylim()))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.minorticks_off()
        else:
            lowest = min((y for one in series for y in one.y), default=0)
            axes.set_ylim(bottom=None if lowest < 0 else 0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(series) > 1 or level_line is not None:
            axes.legend()

    return _svg(draw, 3.3, title, description)


def heat_map(rows: Sequence[dict[str, float]], *, title: str, description: str) -> str:
    """Shares by block (downwards) and projection."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, math.nan) for name in names] for row in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = axes.pcolormesh(values, cmap=SHADES, vmin=0.0, vmax=1.0, edgecolors=PAGE, linewidth=0.5)
        axes.grid(False)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([index + 0.5 for index in range(len(names))], [_short(name) for name in names])
        every = max(1, len(rows) // 8)
        axes.set_yticks(
            [index + 0.5 for index in range(0, len(rows), every)], list(map(str, range(0, len(rows), every)))
        )
        axes.set_ylabel("block")
        bar = figure.colorbar(mesh, ax=axes, format=lambda value, _: f"{100 * value:.0f} %", pad=0.02)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return _svg(draw, min(7.0, 1.0 + 0.24 * max(6, len(rows))), title, description)


def spreads(values: Mapping[str, Sequence[float]], y_label: str, *, title: str, description: str) -> str:
    """For each name the median, the middle half and nine tenths of positive values, on a logarithmic axis."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line = {"color": SERIES[0], "linewidth": 1.2}
        axes.boxplot(
            list(values.values()), whis=(5, 95), showfliers=False, tick_labels=[_short(name) for name in values],
            boxprops=line, whiskerprops=line, capprops=line, medianprops={"color": SERIES[1], "linewidth": 1.6},
        )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(y_label)

    return _svg(draw, 3.0, title, description)


def distribution(entries: Sequence[InputStatistics], levels: Sequence[float], *, title: str, description: str) -> str:
    """The distribution of |x| at one input of some blocks, with the thresholds of `levels` on each curve."""
    last = len(entries) - 1
    shown = sorted({round(index * last / (CURVES - 1)) for index in range(CURVES)})

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shades = ScalarMappable(Normalize(0, max(1, last)), SHADES)
        for block in shown:
            entry, colour = entries[block], shades.to_rgba(block)  # pyright: ignore[reportArgumentType]
            curve = _density(entry)
            axes.plot(*curve, color=colour, linewidth=1.2)
            for marker, level in zip(MARKERS, levels, strict=False):
                threshold = entry.threshold(level)
                if threshold > 0:
                    axes.plot(threshold, _at(curve, threshold), marker, color=colour, markersize=4)
        for marker, level in zip(MARKERS, levels, strict=False):
            axes.plot([], [], marker, color=INK, markersize=4, label=f"{100 * level:g} %")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_ylim(0, 1.18 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("|x|")
        axes.set_ylabel("share per doubling of |x|")
        axes.legend(loc="upper left", ncols=len(levels), handletextpad=0.2, columnspacing=1.2)
        bar = figure.colorbar(shades, ax=axes, label="block", pad=0.02, ticks=MaxNLocator(integer=True))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return _svg(draw, 3.0, title, description)


def _density(entry: InputStatistics) -> tuple[list[float], list[float]]:
    """|x| at the middle of quarter-octave bins and the share of values per octave there, where there are any."""
    edges = (torch.arange(0, FIRST_NON_FINITE + 1, 32, dtype=torch.int32) << 16).view(torch.float32).double()
    shares = entry.counts[:FIRST_NON_FINITE].unflatten(0, (-1, 32)).sum(1).double() / max(1, int(entry.counts.sum()))
    cumulative = shares.cumsum(0)
    kept = (shares > 0) & (cumulative > 1e-2) & (cumulative < 1 - 1e-6) & (edges[:-1] > 0)
    octaves = torch.log2(edges[1:] / edges[:-1])
    middle = (edges[1:] * edges[:-1]).sqrt()
    return middle[kept].tolist(), (shares / octaves)[kept].tolist()


def _at(curve: tuple[list[float], list[float]], x: float) -> float:
    """The height of a curve at the point nearest to x, on a logarithmic scale."""
    nearest = min(range(len(curve[0])), key=lambda index: abs(math.log(curve[0][index] / x)), default=None)
    return math.nan if nearest is None else curve[1][nearest]


def _log_ticks(limits: tuple[float, float]) -> FixedLocator:
    low, high = limits
    ticks = MaxNLocator(5).tick_values(low, high)
    if high / low > 4:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    return FixedLocator([tick for tick in ticks if low <= tick <= high])


def _short(projection: str) -> str:
    return projection.rpartition(".")[2].removesuffix("_proj")


def _label(name: str) -> str:
    """A name as matplotlib shows it: not too long, and not hidden for the underscore it starts with."""
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return f"\u200b{name}" if name.startswith("_") else name


def _svg(draw: Callable[[Figure], None], height: float, title: str, description: str) -> str:
    """The picture as an <svg> element that fills its place, with a title and a description for who cannot see it."""
    buffer = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's fonts draw the text
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view[1]}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>",
        svg,
        count=1,
    )
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda attribute: _shortened(attribute[0]), svg)
    for colour, css in CSS_COLOURS.items():
        svg = svg.replace(colour, css)
    return svg


def _shortened(numbers: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", numbers).replace("\n", "")


def with_unique_ids(svg: str, prefix: str) -> str:
    """`svg` with all ids prefixed, to stand beside others in one page."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', svg)
