"""Pictures of recordings: gates, implied attention maps and spectra of the state, a figure for each attention.

Every function returns a matplotlib ``Figure``; ``save`` writes it as PNG and SVG. Colours are those that
colour-blind people can tell apart: cividis for sizes, orange and purple for signs.
"""

import functools
import math
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import torch
from torch import Tensor

from ..errors import FastWeightError
from .record import Recording

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import CenteredNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    from matplotlib.ticker import MaxNLocator, NullFormatter
except ImportError as error:
    raise FastWeightError("pictures need matplotlib: pip install matplotlib") from error

SITE_NAMES = {
    "decoder": "decoder self-attention",
    "encoder": "encoder self-attention",
    "cross": "cross-attention",
}
FUTURE = "0.9"  # grey: what a token cannot see has no weight, not even 0
SMALLEST = 1e-4  # singular values below this part of the largest are as good as 0
LONGEST_LABEL = 14
FONT = 10
POINTS_A_LABEL = 1.25 * FONT
# for the letters that DejaVu Sans lacks, where one of these is installed
MORE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "IPAGothic",
    "Noto Sans Devanagari",
)
STYLE = {
    "font.size": FONT,
    "axes.titlesize": FONT + 1,
    "figure.titlesize": FONT + 3,
    "text.parse_math": False,  # a token may hold dollar signs
    "svg.hashsalt": "fairseq_fastweights",  # the same picture is the same file
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with ``STYLE`` and leave the user's own settings alone."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        more = [name for name in MORE_FONTS if name in get_font_names()]
        with matplotlib.rc_context({**STYLE, "font.family": ["DejaVu Sans", *more]}):
            return draw(*args, **kwargs)

    return drawn


def title(recording: Recording) -> str:
    """Names site, layer and rule."""
    rule = f"{recording.rule} rule" + (", attention-normalised" if recording.normalized else "")
    site = SITE_NAMES[recording.site]
    return f"{site[0].upper()}{site[1:]}, layer {recording.layer} ({rule})"


def head_title(recording: Recording, head: int) -> str:
    """Names the head, and its direction where heads have two."""
    if not recording.alternates:
        return f"head {head}"
    return f"head {head}, writes from " + (
        "right to left" if recording.right_to_left(head) else "left to right"
    )


def gates(recording: Recording) -> Dict[str, Tensor]:
    """What the rule decides for each token, by its label in the picture: (H, S). Empty for the sum rule."""
    values = {
        "write strength, beta": recording.write_strength,
        "share erased, e·k": recording.erased_share,
        "kept of the state, a": recording.decay,
    }
    return {name: x[0] for name, x in values.items() if x is not None}


@styled
def gates_figure(recording: Recording, heads: List[int], written: List[str]) -> Figure:
    """Heads by tokens, a panel for each of ``gates``; at least one is needed."""
    panels = gates(recording)
    width, labels = 9.0, 1.4
    height = 0.28 * len(heads) + 0.75
    figure = Figure((width, labels + height * len(panels) + 0.3), layout="constrained")
    figure.suptitle(title(recording))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, panels.items()):
        top = max(1.0, float(values[heads].max()))
        image = ax.imshow(values[heads].numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        figure.colorbar(image, ax=ax, pad=0.01, label=name.split(", ")[1])
        ax.set_title(name, loc="left")
        ax.set_ylabel("head")
        ax.set_yticks(range(len(heads)), [str(head) for head in heads])
    token_axis(axes[-1].xaxis, written, width - 1.8)
    axes[-1].set_xlabel("token written")
    return figure


@styled
def weights_figure(recording: Recording, heads: List[int], reading: List[str], written: List[str]) -> Figure:
    """The implied attention map of each head: rows read, columns were written; every head has its own scale."""
    rows, columns = grid(len(heads))
    side = 6.5 if len(heads) == 1 else 4.0
    shape = min(2.0, max(0.5, len(reading) / len(written)))  # of a map
    width, height = side / max(1.0, shape), side * min(1.0, shape)
    figure = Figure((columns * (width + 0.9) + 1.1, rows * (height + 0.3) + 1.2), layout="constrained")
    figure.suptitle(title(recording))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, head in zip(axes.flat, heads):
        colours = {"cmap": signed_colours(), "norm": CenteredNorm()}
        image = ax.imshow(visible(recording, head), **colours, interpolation="nearest", aspect="auto")
        figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05, label="weight")
        ax.set_title(head_title(recording, head))
    outer_labels(axes, len(heads), "token written", "token that reads")
    token_axis(axes[0, 0].yaxis, reading, height)
    for ax in bottom(axes, len(heads)):
        token_axis(ax.xaxis, written, width)
    return figure


def visible(recording: Recording, head: int):
    """The weights (T, S) of a head with the future masked."""
    weights = recording.weights[0, head].numpy()
    future = np.triu(np.full(weights.shape, recording.causal), 1)
    return np.ma.array(weights, mask=future)


def signed_colours():
    """Orange above 0, purple below, grey where there is no weight."""
    return matplotlib.colormaps["PuOr_r"].with_extremes(bad=FUTURE)


@styled
def state_figure(recording: Recording, heads: List[int], written: List[str]) -> Figure:
    """Singular values of S after every write, at the token written, and its Frobenius norm."""
    rows, columns = grid(len(heads))
    width, height = (8.0 if len(heads) == 1 else 4.4), 2.5
    figure = Figure((columns * width + 0.8, rows * height + 2.0), layout="constrained")
    figure.suptitle(title(recording))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    spectra = visible_singular_values(recording.singular_values[0, heads])  # (heads, S, n)
    ranks = Normalize(1, spectra.shape[-1] / 0.9)  # no yellow: too pale for a line
    colours = matplotlib.colormaps["cividis"]
    dots = min(4, 160 / len(written))
    for ax, head, spectrum in zip(axes.flat, heads, spectra):
        for n in reversed(range(spectrum.shape[-1])):
            ax.plot(spectrum[:, n], color=colours(ranks(n + 1)), linewidth=1.2, marker=".", markersize=dots)
        norm = recording.singular_values[0, head].norm(dim=-1)
        (dashed,) = ax.plot(norm, color="black", linestyle="--", linewidth=1.6, label="Frobenius norm")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(head_title(recording, head))
        ax.grid(alpha=0.3)
    figure.legend(handles=[dashed], loc="outside lower right")
    outer_labels(axes, len(heads), "token written", "singular value")
    for ax in bottom(axes, len(heads)):
        token_axis(ax.xaxis, written, width - 0.8)
    bar = figure.colorbar(ScalarMappable(ranks, colours), ax=axes, pad=0.01)
    bar.set_label("which singular value (1: the largest)")
    bar.ax.set_ylim(0.99, max(2, spectra.shape[-1]))
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def visible_singular_values(spectra: Tensor) -> Tensor:
    """(heads, S, n) with NaN for what is below ``SMALLEST`` of the largest, and without those that always are."""
    shown = spectra > SMALLEST * spectra.max()
    count = max(1, int(shown.any(0).any(0).sum()))
    return torch.where(shown, spectra, torch.full_like(spectra, math.nan))[..., :count]


def grid(heads: int) -> tuple:
    """(rows, columns) of panels."""
    columns = 1 if heads == 1 else 2
    return math.ceil(heads / columns), columns


def bottom(axes, used: int) -> list:
    """The last panel in use of every column, which carries its labels; what is left over is hidden."""
    rows, columns = axes.shape
    for ax in axes.flat[used:]:
        ax.set_visible(False)
    last = [axes[(used - 1 - column) // columns, column] for column in range(min(columns, used))]
    for ax in last:
        ax.tick_params(labelbottom=True)
    return last


def outer_labels(axes, used: int, x: str, y: str) -> None:
    for ax in bottom(axes, used):
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)


def token_axis(axis, labels: List[str], inches: float) -> None:
    """The labels of an axis of tokens: turned where they stand side by side, thinned where they would overlap."""
    every = max(1, math.ceil(len(labels) * POINTS_A_LABEL / (72 * inches)))
    places = range(0, len(labels), every)
    rotation = 90 if axis.axis_name == "x" else 0
    axis.set_ticks(list(places), [shorten(labels[n]) for n in places], rotation=rotation)


def shorten(label: str) -> str:
    """At most ``LONGEST_LABEL`` letters."""
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def save(figure: Figure, stem: Path) -> List[Path]:
    """STEM.png and STEM.svg."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context(STYLE):
        figure.savefig(paths[0], dpi=150)
        figure.set_layout_engine("none")  # it stays as it is
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(
    recording: Recording, heads: List[int], reading: List[str], written: List[str], out: Path
) -> List[Path]:
    """All pictures of a recorded sentence (B = 1) as OUT/SITE.LAYER.{gates,weights,state}.{png,svg}.

    There is no picture of gates for the sum rule, which has none.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "weights": weights_figure(recording, heads, reading, written),
        "state": state_figure(recording, heads, written),
    }
    if gates(recording):
        figures["gates"] = gates_figure(recording, heads, written)
    stem = f"{recording.site}.{recording.layer}"
    return [path for name, figure in figures.items() for path in save(figure, out / f"{stem}.{name}")]
