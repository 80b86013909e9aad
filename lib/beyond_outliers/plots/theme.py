"""One theme for every figure: colours, markers, panels, tick labels, and `save`.

`save` writes a figure as PDF and PNG below figures/SCALE, named after notebook and figure.
"""

import base64
import io
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from beyond_outliers import paths
from beyond_outliers.claims.estimates import label
from beyond_outliers.config.registry import OPTIMIZER_NAMES, entry


class _Each(dict[str, str]):
    """One field of the entry of an optimizer: of the study's six in their order, of others as they are asked for."""

    def __init__(self, field: str):
        self.field = field
        for name in OPTIMIZER_NAMES:
            self[name] = self.__missing__(name)

    def __missing__(self, name: str) -> str:
        return getattr(entry(name), self.field)


# one name, one colour and one marker an optimizer in every figure
LABELS, COLOURS, MARKERS = (_Each(field) for field in ("label", "colour", "marker"))


GUIDE: dict[str, Any] = {"color": "grey", "lw": 1}  # of lines that are no data: a reference, zero, chance


def style_of(optimizer: str) -> dict[str, Any]:
    """Colour, marker and label of an optimizer's curve."""
    return {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "label": LABELS[optimizer]}


def set_theme() -> None:
    """Matplotlib's defaults, then ours: a matplotlibrc of the user's changes no figure."""
    plt.rcdefaults()
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    plt.rcParams |= {
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "pdf.fonttype": 42,
    }


class SavedFigure:
    """A figure that `save` wrote: a notebook shows the very file, and a page links to it by its name."""

    def __init__(self, path: Path, width: float, caption: str, alt: str):
        self.path = path
        self.shown = {"width": round(110 * width), "figure": path.stem, "caption": caption, "alt": alt}

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {
            "image/png": base64.b64encode(self.path.read_bytes()).decode(),
            "text/plain": f"figure {self.path.stem}",
        }
        return data, {"image/png": self.shown}


def described(figure: Figure) -> str:
    """What a figure shows, for who cannot see it: its panels and the labels of its axes."""
    shown = [ax for ax in figure.axes if ax.get_visible()]
    parts = []
    for part, name in (("Panels", "title"), ("Across", "xlabel"), ("Up", "ylabel")):
        if texts := dict.fromkeys(filter(None, (getattr(ax, f"get_{name}")() for ax in shown))):
            parts.append(f"{part}: {', '.join(texts)}.")
    return re.sub(r"[$\\{}\[\]]", "", " ".join(" ".join(parts).split()))


def save(figure: Figure, scale: str, name: str, caption: str = "", alt: str = "") -> SavedFigure:
    """NAME.pdf and .png in `paths.figures`; returns what a notebook shows, so that a cell can end with it.

    caption: says what to see; pages show it below the figure. alt: what the picture shows, in place of `described`.
    """
    folder: Path = paths.figures(scale)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, left_out in (("pdf", "CreationDate"), ("png", "Software")):  # no date: same data, same file
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={left_out: None})
        paths.write_whole(folder / f"{name}.{kind}", drawn.getvalue())
    plt.close(figure)
    return SavedFigure(folder / f"{name}.png", figure.get_size_inches()[0], caption, alt or described(figure))


def subplots(*shape: int, figsize: tuple[float, float], **options):
    """Like `plt.subplots`, in our theme; pyplot does not know the figure, so a cell's last line is shown once."""
    set_theme()
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **options)


def panels(values, width: float = 2.7, height: float = 2.4, xlabel: str = "", **options):
    """Panels, one a value and titled so, at most two side by side; returns (figure, {value: axes}).

    Two panels side by side are as wide as a telephone can show with labels that are read."""
    values = list(dict.fromkeys(values))
    if not values:
        figure, ax = subplots(figsize=(width + 1.1, 1.0))
        ax.set_axis_off()
        ax.text(0.5, 0.5, "nothing has been measured yet", ha="center", va="center")
        return figure, {}
    columns = min(2, len(values))
    rows = -(-len(values) // columns)
    figure, axes = subplots(
        rows, columns, figsize=(width * columns + 0.9, height * rows + 0.3), squeeze=False, **options
    )
    for ax in axes.flat[len(values) :]:
        ax.set_visible(False)
    named = dict(zip(values, axes.flat, strict=False))
    for place, (value, ax) in enumerate(named.items(), columns):
        ax.set_title(label(value))
        if place >= len(values):  # the lowest of its column
            ax.set_xlabel(textwrap.fill(xlabel, int(11 * width)))
            ax.tick_params(labelbottom=True)
    return figure, named


def name_ticks(axis, names: Iterable[str], **style) -> None:
    """A tick a name, at 0, 1, 2, ...: optimizers as they are written in text."""
    axis.set_ticks(*zip(*enumerate(map(label, names)), strict=True), **style)


def name_lines(ax) -> None:
    """The label of every line at its end, in its colour; labels keep a height of text apart."""
    apart = 13 / 72 / (ax.get_position().height * ax.figure.get_size_inches()[1])
    to_axes, height = ax.transScale + ax.transLimits, 1 + apart
    ends = [(to_axes.transform([values[-1] for values in line.get_data()])[1], line) for line in ax.get_lines()]
    for end, line in sorted(ends, key=lambda end: -end[0]):
        height = min(end, height - apart)
        ax.annotate(
            line.get_label(),
            (1.03, height),
            xycoords="axes fraction",
            annotation_clip=False,
            color=line.get_color(),
            fontsize=9,
            va="center",
        )


def tidy_log(axis, format=None) -> None:
    """Tick labels of a logarithmic axis that do not overlap: round steps within a decade, few within two."""
    low, high = axis.get_view_interval()
    span = high / max(low, 1e-300)
    if span < 100:
        axis.set_major_locator(
            LogLocator(subs=(1, 3) if span > 20 else (1, 2, 5)) if span > 4 else MaxNLocator(4, steps=[1, 2, 5, 10])
        )
        axis.set_major_formatter(format or FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(figure: Figure, ylabel: str = "", legend: bool = False) -> Figure:
    """The figure with a label of y no longer than its axis, on the first panel of every row, and with one legend of
    everything that some panel shows where asked for."""
    unique: dict[str, Any] = {}
    for ax in figure.axes:
        grid = ax.get_subplotspec()
        if ylabel and grid and grid.is_first_col() and ax.get_visible() and ax.axison:
            rows = grid.get_geometry()[0]
            ax.set_ylabel(textwrap.fill(ylabel, int(8 * figure.get_size_inches()[1] / rows)))
        unique |= {name: handle for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    unique = {name: unique[name] for name in (*LABELS.values(), *unique) if name in unique}  # the paper's order
    if legend and unique:
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=5)
    return figure
