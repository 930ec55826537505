"""Compares fairseq runs, by what they logged and saved.

    fastweights-compare PATH [PATH ...] [--out FOLDER] [--json FILE]
    fastweights-compare run grid.yaml [--jobs N]

A PATH is a save-dir, a log of fairseq-train (--log-format json or simple), or a folder in which both are looked for.
Printed is a table of each metric's best validation, cost, and the options in which the runs differ. Runs that differ
in the seed only are one row: mean and sample standard deviation. --out writes the table (table.md), learning curves
and quality against cost (PNG and SVG) and all numbers (comparison.json).
"""

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence

from ..errors import FastWeightError, user_mistake
from . import PROGRAM, plots, tables
from .grid import Job, read_grid, run_grid
from .runs import Run, find_runs

INTERRUPTED = 130


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq lets every logger speak
    try:
        return _run(words[1:]) if words[:1] == ["run"] else _compare(words)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except FastWeightError as error:
        line = user_mistake(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 1


def _compare(words: Sequence[str]) -> int:
    parser = _parser(__doc__, PROGRAM)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="save-dir, log, or folder of runs"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write table.md, plots and comparison.json there"
    )
    args = parser.parse_args(words)
    if args.metric and not args.out:
        raise FastWeightError("--metric says what is drawn: it needs --out")
    compare(find_runs(args.paths, args.subset), args)
    return 0


def _run(words: Sequence[str]) -> int:
    parser = _parser("Runs a grid of fairseq commands and compares them.", f"{PROGRAM} run")
    parser.add_argument(
        "grid", type=Path, metavar="GRID", help="YAML file: command, vary, rows, seeds, evaluate, out"
    )
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the comparison (default: the grid's out)"
    )
    args = parser.parse_args(words)
    grid = read_grid(args.grid)
    args.out = args.out or grid.out
    failures = run_grid(grid, args.jobs, lambda job: _warn_of_what_is_not_there(job, args))
    started = [job.folder for job in grid.jobs if job.folder.is_dir()]
    try:
        compare(find_runs(started, args.subset, every=False), args)
    finally:
        for failure in failures:
            print(f"\n{PROGRAM}: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _warn_of_what_is_not_there(job: Job, args: argparse.Namespace) -> None:
    """Say after the first training, not after all, that it lacks what is to be shown; others may have it."""
    try:
        tables.check_metric(find_runs([job.folder], args.subset), args.metric)
    except FastWeightError as error:
        print(f"{PROGRAM}: warning: {job.name}: {error}", file=sys.stderr)


def _parser(description: str, program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--metric", help="metric to draw (default: by which the best checkpoint is kept)")
    parser.add_argument(
        "--cost",
        choices=plots.COSTS,
        default="wall",
        help="what quality is drawn against: wall time, training speed, ... (default wall)",
    )
    parser.add_argument("--subset", help="validation subset to read (default: the first one)")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def compare(runs: List[Run], args: argparse.Namespace) -> None:
    """Print the table, and write what ``args`` asks for. FastWeightError if no run has it."""
    tables.check_metric(runs, args.metric)
    rows = tables.group(runs)
    titles, cells = tables.table(rows)
    tables.print_table(titles, cells)
    if args.json:
        _write_json(runs, rows, args.json)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        written = _write_all(runs, rows, args)
        print(f"written to {args.out}: {', '.join(path.name for path in written)}")


def _write_all(runs: List[Run], rows: List[tables.Row], args: argparse.Namespace) -> List[Path]:
    table, numbers = args.out / "table.md", args.out / "comparison.json"
    table.write_text(tables.markdown(*tables.table(rows)), encoding="utf-8")
    _write_json(runs, rows, numbers)
    written = [table, numbers]
    if tables.metrics(runs):
        metric = tables.main_metric(runs, args.metric)
        written += plots.draw_curves(rows, metric, args.out)
        written += plots.draw_cost(rows, metric, args.cost, args.out)
    return written


def _write_json(runs: List[Run], rows: List[tables.Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _without_nan(
        {
            "differing_options": tables.differing_options(rows),
            "rows": [{"label": row.label, "runs": [run.name for run in row.runs]} for row in rows],
            "runs": [_described(run, tables.metrics(runs)) for run in runs],
        }
    )
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _described(run: Run, metrics: Sequence[str]) -> dict:
    best = {metric: run.best(metric) for metric in metrics}
    return {
        "name": run.name,
        "path": str(run.path),
        "best": {name: {"value": v.metrics[name], "updates": v.updates} for name, v in best.items() if v},
        "evaluation": run.evaluation,
        "parameters": run.parameters,
        "updates": run.updates,
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.seconds,
        "peak_gpu_memory_gib": run.gpu_memory,
        "peak_memory_gib": run.memory,
        "subset": tables.subset([run]),
        "validations": [{"updates": v.updates, "seconds": v.seconds, **v.metrics} for v in run.validations],
        "options": run.options,
    }


def _without_nan(value: Any) -> Any:
    """JSON has neither nan nor infinity: null."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
