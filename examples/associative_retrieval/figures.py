"""Draw the paper's figures 2 and 5 from the runs of grid.py, with the published points beside ours.

    pip install matplotlib
    python examples/associative_retrieval/figures.py     # seconds; any number of finished runs

Adds the last row of every finished run, as the paper's figures show it, to results.csv, in place of an earlier one, and
draws what is there: capacity.svg and .png (setting 1), overwriting.svg and .png (setting 2), the table in README.md.
published.csv has the authors' last rows (from
synthetic/logs of github.com/ischlag/fast-weight-transformers, one seed).
"""

import csv
import logging
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from grid import CURVES, HERE, OVERWRITING, RESULTS, RUNS, Run, read_rows  # noqa: E402

from fairseq_fastweights.compare.plots import STYLE  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker of its own for each curve
STYLES = {
    "softmax": ("softmax", "#000000", "o"),
    "elu-sum": ("ELU+1", "#E69F00", "s"),
    "favor64-sum": ("FAVOR+ 64", "#56B4E9", "v"),
    "favor128-sum": ("FAVOR+ 128", "#0072B2", "^"),
    "favor512-sum": ("FAVOR+ 512", "#999999", "<"),
    "dpfp1-sum": ("DPFP-1", "#009E73", "D"),
    "dpfp2-sum": ("DPFP-2", "#D55E00", "P"),
    "dpfp3-sum": ("DPFP-3", "#CC79A7", "X"),
    "overwriting-dpfp1-sum": ("sum, DPFP-1", "#E69F00", "s"),
    "overwriting-dpfp1-delta": ("delta, DPFP-1", "#009E73", "D"),
    "overwriting-dpfp2-delta": ("delta, DPFP-2", "#D55E00", "P"),
    "overwriting-elu-delta": ("delta, ELU+1", "#0072B2", "^"),
    "overwriting-favor64-delta": ("delta, FAVOR+ 64", "#56B4E9", "v"),
    "overwriting-dpfp1-fwm": ("fwm, DPFP-1", "#CC79A7", "X"),
    "overwriting-tanh-fwm": ("fwm, tanh", "#000000", "o"),
}
PUBLISHED_NAMES = {"softmax": "softmax", "linear": "elu"}
PUBLISHED_RULES = {"cat": "", "sum": "-sum", "ours": "-delta", "fwm": "-fwm"}
START, END = "<!-- results -->", "<!-- /results -->"
Points = Dict[str, List[Tuple[int, float, int]]]  # curve: keys, last loss, updates


def ours() -> Points:
    """The last rows of what has finished, here or earlier."""
    found = {
        Run(row["curve"], int(row["keys"])): (float(row["final_loss"]), int(row["updates"]))
        for row in read_rows(RESULTS)
    }
    for file in RUNS.glob("*.finished"):
        curve, _, size = file.stem.rpartition("-")
        run = Run(curve, int(size))
        step, loss = run.csv.read_text().split()[-1].split(",")
        found[run] = (float(loss), int(step))
    points: Points = {curve: [] for curve in CURVES}
    for run, last in found.items():
        points[run.curve].append((run.size, *last))
    return {curve: sorted(rows) for curve, rows in points.items() if rows}


def published() -> Points:
    """The authors' last rows; without runs that ended in NaN."""
    points: Points = {}
    for row in read_rows(HERE / "published.csv"):
        prefix = "overwriting-" if row["replace"] == "1" else ""
        name = PUBLISHED_NAMES.get(row["method"], row["method"]) + PUBLISHED_RULES[row["update_rule"]]
        loss = float(row["final_loss"])
        if loss == loss and row["stop_reason"] != "other":
            points.setdefault(prefix + name, []).append((int(row["S"]), loss, int(row["steps"])))
    return {curve: sorted(rows) for curve, rows in points.items() if curve in CURVES}


def draw(setting: int, mine: Points, theirs: Points) -> None:
    """One figure: lines are our runs, rings the published ones."""
    plt.rcParams.update({**STYLE, "svg.hashsalt": "figures"})
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    largest = max(size for curve, rows in mine.items() if CURVES[curve][0] == setting for size, _, _ in rows)
    for curve, (label, colour, marker) in STYLES.items():
        if CURVES[curve][0] != setting or curve not in mine:
            continue
        sizes, losses, _ = zip(*mine[curve])
        axes.plot(sizes, losses, color=colour, marker=marker, label=label)
        rings = [(size, loss) for size, loss, _ in theirs.get(curve, []) if size <= largest]
        if rings:
            axes.plot(*zip(*rings), "o", color=colour, fillstyle="none", markersize=13, markeredgewidth=1.4)
    axes.plot([], [], "o", color="grey", fillstyle="none", markersize=13, label="published")
    axes.set_xlabel("number of keys S")
    axes.set_ylabel("last evaluation loss")
    if setting == OVERWRITING:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    name = "overwriting" if setting == OVERWRITING else "capacity"
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        figure.savefig(HERE / f"{name}.{kind}", dpi=110, metadata=metadata)
    plt.close(figure)


def write_results(mine: Points, theirs: Points) -> None:
    """results.csv, with the published loss where there is one."""
    with open(RESULTS, "w", newline="") as lines:
        out = csv.writer(lines)
        out.writerow(["curve", "keys", "final_loss", "updates", "published_loss", "published_updates"])
        for curve, rows in mine.items():
            other = {size: rest for size, *rest in theirs.get(curve, [])}
            for size, loss, step in rows:
                out.writerow([curve, size, f"{loss:.8g}", step, *other.get(size, ("", ""))])


def write_table(mine: Points, theirs: Points) -> None:
    """Into README.md, between its marks: our last loss, and the published one in brackets."""
    sizes = sorted({size for rows in mine.values() for size, _, _ in rows})
    lines = [
        "| curve | " + " | ".join(f"S = {size}" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for curve in STYLES:
        own = {size: loss for size, loss, _ in mine.get(curve, [])}
        other = {size: loss for size, loss, _ in theirs.get(curve, [])}
        cells = [cell(own.get(size), other.get(size)) for size in sizes]
        if own:
            lines.append(f"| {curve} | " + " | ".join(cells) + " |")
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition(START)
    readme.write_text("\n".join([before + mark, "", *lines, "", END + rest.partition(END)[2]]))


def cell(own: Optional[float], other: Optional[float]) -> str:
    """0.000771 (0.000766), as far as there is one."""
    return "" if own is None else f"{own:.3g}" + ("" if other is None else f" ({other:.3g})")


def main() -> None:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq lets every logger speak
    mine, theirs = ours(), published()
    write_results(mine, theirs)
    write_table(mine, theirs)
    for setting in sorted({CURVES[curve][0] for curve in mine}):
        draw(setting, mine, theirs)
    print(f"{sum(map(len, mine.values()))} runs drawn, in {Path(HERE).name}/")


if __name__ == "__main__":
    main()
