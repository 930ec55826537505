"""What the results.py of the comparisons share: finished rows of a grid, written between the marks of a README.

Only rows that are trained and evaluated are written.
"""

import argparse
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
from pathlib import Path

from fairseq_fastweights.compare.grid import Grid
from fairseq_fastweights.compare.plots import draw_curves
from fairseq_fastweights.compare.runs import find_runs
from fairseq_fastweights.compare.tables import SEED_IN_NAME, Row, group


def arguments(description: str, into: Path) -> argparse.Namespace:
    """``work`` and ``into``, the folder of the README.md."""
    for name in ("matplotlib", "sacrebleu"):
        logging.getLogger(name).setLevel(logging.WARNING)  # fairseq lets every logger speak
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--into", type=Path, default=into)
    return parser.parse_args()


def finished_rows(grid: Grid) -> list[Row]:
    """The rows of the grid, in its order, without the runs that are not evaluated yet."""
    folders = [job.folder for job in grid.jobs if job.next_step() is None]
    if not folders:
        raise SystemExit(f"results.py: no row in {grid.out} is finished")
    rows = group(find_runs(folders))
    for row in rows:
        row.label = SEED_IN_NAME.sub("", row.label)
    return rows


def unfinished(grid: Grid) -> list[str]:
    """A paragraph that names the runs that are not finished; nothing if all are."""
    names = [job.name for job in grid.jobs if job.next_step()]
    return [f"Not finished: {', '.join(names)}.\n"] if names else []


def command_of(grid: Grid, row: str, step: str, usual: str, new_lines: str) -> str:
    """A command as the grid has it, in its usual folder, with a new line before flags that begin like one of these."""
    job = next((job for job in grid.jobs if job.name.startswith(row)), grid.jobs[0])
    words = job.command(step).replace(str(grid.out.parent), usual)
    return re.sub(rf" (--({new_lines}))", r" \\\n    \1", words)


def flags_of_rows(grid: Grid, usual: str) -> str:
    """A paragraph and a block of code: the flags in which the rows' commands differ, but for folder and seed."""
    lines = []
    for step, title in (("train", ""), ("evaluate", ", evaluation")):
        rows = {SEED_IN_NAME.sub("", job.name): flags(job.commands[step]) for job in grid.jobs}
        shared = set.intersection(*map(set, rows.values()))
        for name, own in rows.items():
            differing = [
                x
                for x in own
                if x not in shared and not x.startswith(("--save-dir", "--seed", "--path", "--out"))
            ]
            if differing:
                lines.append((name + title, " ".join(differing).replace(str(grid.out.parent), usual)))
    width = max((len(name) for name, _ in lines), default=0)
    block = "\n".join(f"{name:<{width}}  {words}" for name, words in lines)
    return f"What differs from row to row, beside the folder:\n\n```\n{block}\n```\n"


def flags(command: list[str]) -> list[str]:
    """The flags of a command, each with its values."""
    found: list[str] = []
    for word in command:
        if word.startswith("--"):
            found.append(word)
        elif found:
            found[-1] += f" {shlex.quote(word)}"
    return found


def machine() -> str:
    """The processor and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return (
        f"{named.group(1) if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )


def write_between_marks(readme: Path, text: str, name: str = "results") -> None:
    """Between <!-- name --> and <!-- /name -->."""
    mark, end_mark = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = readme.read_text().partition(mark)
    _, end, after = rest.partition(end_mark)
    if not start or not end:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {readme} lacks {mark} or {end_mark}")
    readme.write_text(f"{before}{start}\n\n{text}\n{end}{after}")


def draw(rows: list[Row], metric: str, path: Path) -> None:
    """path.png and path.svg: a metric of the validations by updates."""
    with tempfile.TemporaryDirectory(dir=path.parent) as drawn:
        for picture in draw_curves(rows, metric, Path(drawn)):
            picture.replace(path.with_name(path.name + picture.suffix))
