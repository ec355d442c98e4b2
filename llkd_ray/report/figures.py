"""How figures look, and how they leave Python: SVG for the page, PNG for everywhere else.

Colours follow Okabe and Ito, who chose them to be told apart with any colour vision; a few are
darkened or lightened so that each one stands out on white and on near-black alike. Where several
lines share an axis, markers differ too.
"""

import functools
import io
import re
from collections.abc import Callable
from typing import ParamSpec

import matplotlib as mpl
from matplotlib.figure import Figure

P = ParamSpec("P")

TEACHER = "#D9722E"
STUDENT = "#2A86C0"
SERIES = ("#2A86C0", "#D9722E", "#0F9D76", "#C77BA8", "#BF8F00", "#4FA9D8", "#8C7AE6", "#8A8F98")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Drawn in this one colour, text and axes can follow the page from light to dark.
INK = "#1c2128"
_STYLE = {
    "font.family": ["sans-serif"],
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.0,
    # Text stays text: it can be searched, and takes the font of the page.
    "svg.fonttype": "none",
    # Identifiers inside an SVG come from a hash; with a salt of our own they are repeatable.
    "svg.hashsalt": "llkd_ray",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the report's style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return draw_styled


def to_svg(figure: Figure, title: str) -> str:
    """Return an `<svg>` element to stand inside HTML, named by its title for screen readers."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names such as axes_1 would stand once per figure on the page, where an id must be unique.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    # The page gives the width; the view box keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return svg.replace(INK, "currentColor").strip()


def to_png(figure: Figure) -> bytes:
    """Return the figure on white, at 150 dots per inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
