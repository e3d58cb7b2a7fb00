"""Figures as SVG that takes its colours and its font from the page, so that one drawing serves light, dark and print.

matplotlib draws with marker colours; in the SVG they become CSS variables (``--ink``, ``--s0``, ...), and text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.report.run_folder import thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

DRAWN_POINTS = 250
"""Points of a curve that are drawn; a page shows no more, and they would take room from completions."""
# Colours that mark a role while matplotlib draws; no two differ by less than one step of a channel.
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
    """Panels under one heading. ``legend``: (name, number of the series). ``table``: the numbers, for those who cannot see the drawing."""

    key: str
    title: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[str, int]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    small: bool = False  # panels are small multiples

    def __post_init__(self) -> None:
        own = [Panel(panel.title, own_ids(panel.svg, f"{self.key}-{place}-")) for place, panel in enumerate(self.panels)]
        object.__setattr__(self, "panels", own)


class Canvas:
    """A drawing under way: ``axes`` to draw on, then ``panel`` to have it as SVG."""

    def __init__(self, width: float = 4.9, height: float = 3.1, *, rows: int = 1) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Drawing

        self._context = rc_context(RC)
        self._context.__enter__()
        self.drawing: Drawing = Drawing(figsize=(width, height), layout="constrained")
        self.all_axes: list[Axes] = list(self.drawing.subplots(rows, 1, squeeze=False)[:, 0])

    @property
    def axes(self) -> Axes:
        return self.all_axes[0]

    def panel(self, title: str) -> Panel:
        """The drawing, finished."""
        try:
            return Panel(title, as_svg(self.drawing, title))
        finally:
            self._context.__exit__(None, None, None)


def as_svg(drawing: Drawing, label: str) -> str:
    """The drawing as an inline SVG whose colours are the page's."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # its selector is *, which would reach the whole page
    opening = f'<svg class="plot" viewBox="{{}}" role="img" aria-label="{_attribute(label)}">'
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda found: opening.replace("{}", found[1]), text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"#0[0-9a]0[0-9a][0-9a-f]{2}", lambda found: VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r"<[^>]*>", lambda tag: _compact(tag[0]), text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    return re.sub(r">\s+<", "><", text).strip()


def _compact(tag: str) -> str:
    """A tag without what the page does not need: hundredths of a point are enough for a path, and the font is the page's."""
    tag = re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)
    tag = re.sub(r'font-family: [^;"]*(; )?', "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", tag)
    return re.sub(r"\s*\n\s*", " ", tag)


def own_ids(text: str, prefix: str) -> str:
    """The drawing with ids that no other one of the page has: clip paths and markers are looked up in the whole document."""
    text = re.sub(r'\bid="([^"]+)"', lambda found: f'id="{prefix}{found[1]}"', text)
    text = re.sub(r'(xlink:href|href)="#([^"]+)"', lambda found: f'href="#{prefix}{found[2]}"', text)
    return re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{prefix}{found[1]})", text)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def interval_points(
    axes: Axes, x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, *, size: float = 5
) -> None:
    """Points with vertical intervals."""
    axes.vlines(x, low, high, color=color, linewidth=1.4)
    axes.plot(x, y, "o", color=color, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.8)


def root_scale(axes: Axes) -> None:
    """Let the horizontal axis go with the square root of its numbers, whose marks stay readable; call when all is drawn."""
    import numpy as np

    low, high = axes.get_xlim()
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda root: np.sign(root) * root**2))
    axes.set_xlim(low if low >= 0 else max(low, -0.002 * high), high)
    ticks = [0.0]
    for tick in (one * ten for ten in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) for one in (1, 2, 5)):
        if tick <= high and tick**0.5 - ticks[-1] ** 0.5 >= 0.09 * high**0.5:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def log_scale(axes: Axes, axis: str) -> None:
    """Make the ``axis`` ("x" or "y") logarithmic, with plain numbers at its marks: the page has no mathematical notation."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    chosen = getattr(axes, f"{axis}axis")
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Running mean over a centred window of ``share`` of the values, narrower at the ends."""
    half = max(0, round(len(values) * share / 2))
    found = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        found.append(sum(window) / len(window))
    return found


def drawn(*series: Sequence[float]) -> list[list[float]]:
    """Series of one length as a drawing needs them: at most ``DRAWN_POINTS`` points of each, evenly spread, the first and the last too."""
    return [thinned(values, DRAWN_POINTS) for values in series]


def drawn_text(number: int) -> str:
    """A sentence for the caption where a curve has more points than are drawn."""
    return f" Of {number:,} points {DRAWN_POINTS:,} are drawn, evenly spread." if number > DRAWN_POINTS else ""


def short(name: str, length: int = 16) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def number_text(value: Any) -> str:
    """A number as a reader wants it."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)
