"""Learning curves, and quality against what it cost. One colour, marker and line style a row."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import needed
from .runs import Run
from .tables import SECONDS_IN, Quantity, Row, subset, time_unit

# Okabe and Ito's colours, which colour-blind people tell apart; their yellow is too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BITS = {"cross_entropy", "label_smoothed_cross_entropy", "adaptive_loss"}
NAMES = {"nll_loss": "loss", "ppl": "perplexity", "bleu": "BLEU"}
SUBSETS = {"valid": "validation"}
COSTS = ("wall", "tokens", "parameters", "memory", "updates")
# readable where a page halves the figure
STYLE = {
    "font.size": 15,
    "axes.labelsize": 16,
    "legend.fontsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "svg.fonttype": "path",
}
WIDTH, HEIGHT, LEGEND_LINE = 8.0, 5.0, 0.32  # inches


def metric_title(runs: Sequence[Run], metric: str) -> str:
    """What a metric is called on an axis, with its unit where that is known."""
    criteria = {run.options.get("criterion") for run in runs}
    unit = " (bits/token)" if metric in ("loss", "nll_loss") and criteria <= BITS else ""
    if metric == "accuracy" and criteria == {"label_smoothed_cross_entropy"}:
        unit = " (%)"
    data = subset(runs)
    return f"{SUBSETS.get(data, data)} {NAMES.get(metric, metric.replace('_', ' '))}{unit}"


def cost_quantity(runs: Sequence[Run], cost: str) -> Quantity:
    """The quantity behind a value of --cost."""
    if cost == "wall":
        unit = time_unit([run.seconds for run in runs if run.seconds is not None])
        return Quantity("run", "seconds", f"wall time ({unit})", SECONDS_IN[unit])
    if cost == "memory":
        key = "gpu_memory" if any(run.gpu_memory is not None for run in runs) else "memory"
        return Quantity("run", key, f"peak {'GPU ' if key == 'gpu_memory' else ''}memory (GiB)")
    if cost == "tokens":
        return Quantity("run", "tokens_per_second", "training speed (tokens/s)")
    if cost == "parameters":
        return _scaled_parameters(runs)
    return Quantity("run", "updates", "updates")


def _scaled_parameters(runs: Sequence[Run]) -> Quantity:
    most = max((run.parameters or 0 for run in runs), default=0)
    scale, unit = (1e6, " (millions)") if most >= 1e6 else (1e3, " (thousands)") if most >= 1e4 else (1.0, "")
    return Quantity("run", "parameters", "parameters" + unit, scale)


def curve(runs: Sequence[Run], metric: str) -> Optional[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Updates, mean and sample standard deviation over the runs, where all of them have been.

    Epochs of different seeds may end at different updates: between two validations of a run a straight line
    is drawn, so there it is read.
    """
    points = [
        [(v.updates, v.metrics[metric]) for v in run.validations if metric in v.metrics] for run in runs
    ]
    series = [np.array(p, dtype=float).T for p in points if p]
    if not series:
        return None
    first, last = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    updates = np.unique(np.concatenate([x for x, _ in series]))
    updates = updates[(updates >= first) & (updates <= last)]
    if not len(updates):
        return None
    values = np.stack([np.interp(updates, x, y) for x, y in series])
    deviation = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(updates))
    return updates, values.mean(0), deviation


def draw_curves(rows: Sequence[Row], metric: str, folder: Path) -> List[Path]:
    """curves.png and curves.svg: ``metric`` by updates, a band of one standard deviation over seeds."""
    runs = [run for row in rows for run in row.runs]
    with _figure(folder / "curves") as figure:
        shown = []
        for i, row in enumerate(rows):
            found = curve(row.runs, metric)
            if found is None:
                continue
            updates, values, deviation = found
            figure.axes.plot(
                updates, values, label=_legend(row), markevery=_every(len(updates), i), **look(i)
            )
            figure.axes.fill_between(
                updates,
                values - deviation,
                values + deviation,
                color=look(i)["color"],
                alpha=0.2,
                linewidth=0,
            )
            shown.append(np.stack([values, deviation]))
        figure.axes.set_xlabel("updates")
        figure.axes.set_ylabel(metric_title(runs, metric))
        if not runs[0].higher_is_better(metric):
            _scale(figure.axes, "y", *np.concatenate([np.zeros((2, 0)), *shown], axis=1))
    return figure.written


def draw_cost(rows: Sequence[Row], metric: str, cost: str, folder: Path) -> List[Path]:
    """quality-against-COST.png and .svg: a point a row, bars of one standard deviation over seeds."""
    runs = [run for row in rows for run in row.runs]
    across, up = cost_quantity(runs, cost), Quantity("valid", metric, metric_title(runs, metric))
    with _figure(folder / f"quality-against-{cost}") as figure:
        shown = []
        for i, row in enumerate(rows):
            x, y = row.values(across), row.values(up)
            if not x or not y:
                continue
            style = {**look(i), "linestyle": "none", "markersize": 12}
            point = np.array([[np.mean(x), _deviation(x)], [np.mean(y), _deviation(y)]])
            (x_mean, x_error), (y_mean, y_error) = point
            bars = {"xerr": x_error, "yerr": y_error} if len(row.runs) > 1 else {}
            figure.axes.errorbar(
                x_mean, y_mean, **bars, label=_legend(row), capsize=4, elinewidth=1.5, **style
            )
            shown.append(point)
        figure.axes.set_xlabel(across.title)
        figure.axes.set_ylabel("best " + up.title)
        figure.axes.margins(0.12)
        for axis, points in zip("xy", np.array(shown).reshape(-1, 2, 2).swapaxes(0, 1), strict=True):
            if axis == "x" or not runs[0].higher_is_better(metric):
                _scale(figure.axes, axis, *points.T)
    return figure.written


def draw_groups(
    rows: Sequence[Tuple[str, Sequence[float]]], groups: Sequence[str], across: str, up: str, path: Path
) -> List[Path]:
    """path.png and path.svg: a curve a row over groups that are named, such as lengths; nan leaves a gap."""
    with _figure(path) as figure:
        for i, (label, values) in enumerate(rows):
            figure.axes.plot(range(len(groups)), values, label=label, **look(i))
        figure.axes.set_xticks(range(len(groups)), groups)
        figure.axes.set_xlabel(across)
        figure.axes.set_ylabel(up)
    return figure.written


def look(i: int) -> Dict[str, Any]:
    """Colour, marker and line style of row ``i``: 315 rows before one comes again."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
    }


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _legend(row: Row) -> str:
    return row.label + (f" (n={len(row.runs)})" if len(row.runs) > 1 else "")


def _every(points: int, i: int) -> Tuple[int, int]:
    """About ten markers a curve, not at the same places as its neighbour's."""
    step = max(1, points // 10)
    return i % step, step


def _scale(axes: Any, axis: str, values: np.ndarray, deviations: np.ndarray) -> None:
    """Logarithmic where the values are positive and span more than a decade.

    The lowest value is seen and not its deviation: less than nothing has no logarithm.
    """
    top = np.max((values + deviations)[np.isfinite(values)], initial=0.0)
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() <= 10 * values.min():
        return
    ticker = needed("matplotlib.ticker", "matplotlib")
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(values.min() / 1.8, top * 1.4)
    between = (1, 2, 5) if values.max() < 1000 * values.min() else (1,)
    shown = getattr(axes, f"{axis}axis")
    shown.set_major_locator(ticker.LogLocator(subs=between))
    shown.set_major_formatter(ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    shown.set_minor_formatter(ticker.NullFormatter())


class _figure:
    """A figure that writes itself as PNG and SVG, legend below, at the end of its with block."""

    def __init__(self, path: Path):
        self.path = path
        self.written: List[Path] = []

    def __enter__(self) -> "_figure":
        matplotlib = needed("matplotlib", "matplotlib")
        backend = needed("matplotlib.backends.backend_agg", "matplotlib")
        self.style = matplotlib.rc_context(STYLE)
        self.style.__enter__()
        self.figure = needed("matplotlib.figure", "matplotlib").Figure(layout="constrained")
        backend.FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_subplot()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            self.style.__exit__(kind, *rest)

    def _write(self) -> None:
        handles, labels = self.axes.get_legend_handles_labels()
        columns = max(1, min(3, int(72 / (max(map(len, labels), default=0) + 8))))
        lines = -(-len(labels) // columns)
        self.figure.set_size_inches(WIDTH, HEIGHT + LEGEND_LINE * lines)
        if labels:
            self.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        for ending in (".png", ".svg"):
            target = self.path.with_name(self.path.name + ending)
            self.figure.savefig(target, dpi=150)
            self.written.append(target)
