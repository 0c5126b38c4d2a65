"""One look for every figure, and the way it gets into a file or a page.

Figures are drawn in a handful of named colours. As PNG they stand on white paper; as SVG inside a page the ink colours
become CSS variables, so that one drawing is legible on a light and on a dark page.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path

_P = ParamSpec("_P")
_R = TypeVar("_R")

INK = "#1b1f24"
MUTED = "#646b75"
HAIRLINE = "#d3d7dc"
BONE = "#8d959f"
PAPER = "#fffffe"
BLUE = "#2163a5"
GREY_MARK = "#9aa2ad"

# What a page must define to show an inlined figure; the hex codes above occur nowhere else in a figure.
CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    HAIRLINE: "--hairline",
    BONE: "--bone",
    PAPER: "--paper",
    BLUE: "--blue",
    GREY_MARK: "--mark",
}

# Blue below the average, neutral at it, red above; none of them vanishes on white or on near-black paper.
WEIGHT_STOPS = ("#2f6fb0", "#8caecb", "#c6c5c1", "#de9068", "#b3262d")

_LONGEST_LABEL = 40

_FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")


def short_label(name: str) -> str:
    """A label that fits; the middle goes, as names of a data set often differ at their ends alone."""
    if len(name) <= _LONGEST_LABEL:
        return name
    tail = _LONGEST_LABEL // 2 - 1
    return name[: _LONGEST_LABEL - tail - 1].rstrip() + "…" + name[-tail:].lstrip()


def require_matplotlib() -> None:
    """Raise one clear line when the drawing extra is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('figures need matplotlib: pip install "jmm_fast[viz]"') from error


@contextlib.contextmanager
def context() -> Iterator[None]:
    """Matplotlib settings of this project, for the time of the block; the caller's own settings are untouched."""
    require_matplotlib()
    import matplotlib
    from matplotlib import font_manager

    # Naming a font that is not installed makes matplotlib warn at every text.
    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "font.family": [name for name in _FONTS if name in installed],
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # class and joint names may hold a dollar sign
        "axes.edgecolor": HAIRLINE,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": HAIRLINE,
        "grid.linewidth": 0.6,
        "xtick.color": HAIRLINE,
        "ytick.color": HAIRLINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "savefig.dpi": 160,
        "svg.fonttype": "none",
        "svg.hashsalt": "jmm_fast",  # the same data give the same bytes
    }
    with matplotlib.rc_context(settings):
        yield


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a drawing function inside :func:`context`."""

    @functools.wraps(draw)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with context():
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float):
    """A figure of ``width`` x ``height`` inches on the Agg canvas, outside pyplot's global list of figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def inches(figure, left: float, bottom: float, width: float, height: float, **options):
    """Add axes placed in inches from the lower left corner, so that margins do not grow with the figure."""
    total_width, total_height = figure.get_size_inches()
    box = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    return figure.add_axes(box, **options)


def weight_colormap():
    """Colours of the masking weight on the scale of :func:`weight_range`."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("jmm_weight", WEIGHT_STOPS)


def weight_range(weight: np.ndarray) -> float:
    """Factor ``f``: colours run from ``1/f`` over 1 to ``f`` times the average, in equal steps of the logarithm.

    98 % of the weights lie inside; a few extreme tokens must not take the colour from all others. Never below 1.1: a
    body at rest gives every token the same weight, and a scale of rounding errors would say otherwise.
    """
    return float(max(np.exp(np.quantile(np.abs(np.log(np.maximum(weight, 1e-6))), 0.98)), 1.1))


def weight_position(weight: np.ndarray, factor: float) -> np.ndarray:
    """Place of each weight on the colour scale, 0..1, with 0.5 for the average."""
    return np.clip(0.5 + 0.5 * np.log(np.maximum(weight, 1e-6)) / np.log(factor), 0, 1)


def share_colormap():
    """Transparent to solid blue: zero shows the page itself, whatever its colour.

    Opacity grows as the square root does nearly (power 0.7), so that confusions of a few per cent are seen.
    """
    from matplotlib.colors import ListedColormap, to_rgb

    colors = np.empty((256, 4))
    colors[:, :3] = to_rgb(BLUE)
    colors[:, 3] = np.linspace(0, 1, 256) ** 0.7
    return ListedColormap(colors, name="jmm_share")


def save(figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path`` (``.png``, ``.svg`` or ``.pdf``), whole or not at all.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"a figure is written as .png, .svg or .pdf, got {path}")
    with context(), atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind)
    return path


def inline_svg(figure) -> str:
    """The figure as an ``<svg>`` element for an HTML page: no prologue, no addresses, page fonts, page colours.

    The page defines the CSS variables of :data:`CSS_VARIABLES` and ``--sans``.
    """
    buffer = io.StringIO()
    with context():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # matplotlib's group names would repeat from figure to figure
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--sans)", text)
    width, height = figure.get_size_inches()
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text[:400]) + text[400:]
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" style="aspect-ratio:{width:.4g}/{height:.4g}" ', 1).strip()
