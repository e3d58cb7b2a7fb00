"""Figures as SVG that takes its colours and its font from the page, so that one drawing works in light mode, dark mode and print.

matplotlib draws with marker colours. In the SVG, CSS variables (``--ink``, ``--s0``, ...) replace them. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, NullFormatter

from stages.report.run_folder import thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_POINTS = 250
"""Maximum number of drawn points of a curve. More points would not be visible, and would take space from completions."""
# Marker colours: matplotlib draws each role in a separate colour, which ``VARIABLES`` maps to a CSS variable.
INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0a0a{number:02x}" for number in range(1, 13))
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "var(--card)"} | {
    color: f"var(--s{number})" for number, color in enumerate(SERIES)
}
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tristage",
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.linewidth": 0.8,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "axes.formatter.limits": (-3, 4),
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Panel:
    """One drawing with its own axes."""

    title: str
    svg: str


@dataclass(frozen=True)
class Figure:
    """Panels under one heading. ``legend``: (name, index of the series).

    ``headings`` and ``rows`` are a table of the numbers, for readers who cannot see the drawing.
    """

    key: str
    title: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[str, int]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    small: bool = False  # panels are small multiples

    def __post_init__(self) -> None:
        own = [Panel(panel.title, prefixed_ids(panel.svg, f"{self.key}-{index}-")) for index, panel in enumerate(self.panels)]
        object.__setattr__(self, "panels", own)


class Canvas:
    """A drawing in progress: draw on ``axes``, then call ``panel`` to get it as SVG."""

    def __init__(self, width: float = 4.9, height: float = 3.1, *, rows: int = 1) -> None:
        self._context = rc_context(RC)
        self._context.__enter__()
        self.drawing: Drawing = Drawing(figsize=(width, height), layout="constrained")
        self.all_axes: list[Axes] = list(self.drawing.subplots(rows, 1, squeeze=False)[:, 0])

    @property
    def axes(self) -> Axes:
        return self.all_axes[0]

    def panel(self, title: str) -> Panel:
        """Finish the drawing and return it as SVG."""
        try:
            return Panel(title, as_svg(self.drawing, title))
        finally:
            self._context.__exit__(None, None, None)


def as_svg(drawing: Drawing, label: str) -> str:
    """The drawing as an inline SVG that uses the page's colours."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # its selector is *, which would match the entire page
    opening = f'<svg class="plot" viewBox="{{}}" role="img" aria-label="{_attribute(label)}">'
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda match: opening.replace("{}", match[1]), text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"#0[0-9a]0[0-9a][0-9a-f]{2}", lambda match: VARIABLES.get(match[0], match[0]), text)
    text = re.sub(r"<[^>]*>", lambda tag: _compact(tag[0]), text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    return re.sub(r">\s+<", "><", text).strip()


def _compact(tag: str) -> str:
    """Shorten a tag: cut numbers after two decimals, and remove the font (the page sets it) and rotations by zero."""
    tag = re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)
    tag = re.sub(r'font-family: [^;"]*(; )?', "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", tag)
    return re.sub(r"\s*\n\s*", " ", tag)


def prefixed_ids(text: str, prefix: str) -> str:
    """Add a prefix to all ids of a drawing, so that they are unique on the page.

    Browsers look up clip paths and markers in the entire document.
    """
    text = re.sub(r'\bid="([^"]+)"', lambda match: f'id="{prefix}{match[1]}"', text)
    text = re.sub(r'(xlink:href|href)="#([^"]+)"', lambda match: f'href="#{prefix}{match[2]}"', text)
    return re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{prefix}{match[1]})", text)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def interval_points(
    axes: Axes, x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, *, size: float = 5
) -> None:
    """Draw points with vertical intervals."""
    axes.vlines(x, low, high, color=color, linewidth=1.4)
    axes.plot(x, y, "o", color=color, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.8)


def root_scale(axes: Axes) -> None:
    """Scale the horizontal axis by the square root, with plain numbers at its ticks. Call this after everything is drawn."""
    low, high = axes.get_xlim()
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda root: np.sign(root) * root**2))
    axes.set_xlim(low if low >= 0 else max(low, -0.002 * high), high)
    ticks = [0.0]
    for tick in (one * ten for ten in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) for one in (1, 2, 5)):
        if tick <= high and tick**0.5 - ticks[-1] ** 0.5 >= 0.09 * high**0.5:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def log_scale(axes: Axes, axis: str) -> None:
    """Make the ``axis`` ("x" or "y") logarithmic, with plain numbers at its ticks, because the page has no mathematical notation."""
    getattr(axes, f"set_{axis}scale")("log")
    chosen = getattr(axes, f"{axis}axis")
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Running mean over a centred window with a ``share`` of the values. The window is narrower at the ends."""
    half = max(0, round(len(values) * share / 2))
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def drawn(*series: Sequence[float]) -> list[list[float]]:
    """At most ``DRAWN_POINTS`` points of each series, evenly spaced, including the first and the last. All series have the same length."""
    return [thinned(values, DRAWN_POINTS) for values in series]


def drawn_text(number: int) -> str:
    """A sentence for the caption if a curve has more points than are drawn. Otherwise empty."""
    return f" Of {number:,} points {DRAWN_POINTS:,} are drawn, evenly spread." if number > DRAWN_POINTS else ""


def short(name: str, length: int = 16) -> str:
    """A name, cut to ``length`` characters so that it fits next to an axis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def number_text(value: object) -> str:
    """A number as text: with thousands separators, or with four significant digits. A dash for None."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
