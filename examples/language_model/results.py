"""Writes what compare_wikitext2.sh has run: table and commands into README.md, validation curves beside it.

    python results.py WORK [--into FOLDER]     # WORK as for compare_wikitext2.sh; FOLDER holds the README.md

Only rows that are trained and evaluated are written. A perplexity per word is that per piece to the power of pieces
per word: the probability of the text is the same, spread over fewer tokens.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

from fairseq_fastweights.compare.grid import Grid, read_grid
from fairseq_fastweights.compare.plots import draw_curves
from fairseq_fastweights.compare.runs import find_runs
from fairseq_fastweights.compare.tables import SEED_IN_NAME, Row, group, markdown, spread

HERE = Path(__file__).resolve().parent
START, END = "<!-- results -->", "<!-- /results -->"
TITLES = (
    "row",
    "runs",
    "valid, per piece",
    "test, per piece",
    "valid, per word",
    "test, per word",
    "parameters",
    "tokens/s",
    "minutes",
)


def finished_rows(grid: Grid) -> list[Row]:
    """The rows of the grid, in its order, without the runs that are not evaluated yet."""
    folders = [job.folder for job in grid.jobs if job.next_step() is None]
    if not folders:
        raise SystemExit(f"results.py: no row in {grid.out} is finished")
    rows = group(find_runs(folders))
    for row in rows:
        row.label = SEED_IN_NAME.sub("", row.label)
    return rows


def pieces_per_word(data: Path) -> dict[str, float]:
    """By split, ends of lines counted on both sides; from the file ``tokens`` of prepare_text.sh."""
    lines = [line.split() for line in (data / "tokens").read_text().splitlines()]
    return {split: int(pieces) / int(words) for split, words, pieces in lines}


def cells(row: Row, ratio: dict[str, float]) -> list[str]:
    """The cells below TITLES: means over the seeds, with deviations where there is more than one."""
    valid = [run.best("ppl").metrics["ppl"] for run in row.runs]
    test = [run.evaluation["ppl"] for run in row.runs]
    columns = [
        valid,
        test,
        [ppl ** ratio["valid"] for ppl in valid],
        [ppl ** ratio["test"] for ppl in test],
        [run.parameters for run in row.runs],
        [run.tokens_per_second for run in row.runs],
        [run.seconds / 60 for run in row.runs],
    ]
    return [row.label, str(len(row.runs)), *(spread(column, len(column)) for column in columns)]


def command_of(grid: Grid, row: str, step: str) -> str:
    """A command as the grid has it, in its usual folder."""
    job = next((job for job in grid.jobs if job.name.startswith(row)), grid.jobs[0])
    words = job.command(step).replace(str(grid.out.parent), "examples/language_model/wikitext2")
    return re.sub(
        r" (--(arch|decoder-layers|tokens|optimizer|lr |validate|log-format|task|path|save-dir))",
        r" \\\n    \1",
        words,
    )


def machine() -> str:
    """The processor and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return (
        f"{named.group(1) if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )


def results(grid: Grid, rows: list[Row], ratio: dict[str, float]) -> str:
    """What stands between the marks of README.md."""
    unfinished = [job.name for job in grid.jobs if job.next_step()]
    table = markdown(TITLES, [cells(row, ratio) for row in rows])
    parts = [
        table,
        f"Trained on: {machine()}. `minutes` is the training with its validations.\n",
        *([f"Not finished: {', '.join(unfinished)}.\n"] if unfinished else []),
        "![validation perplexity by updates](wikitext2.png)\n",
        "One row by hand, from the folder of the clone:\n",
        f"```bash\n{command_of(grid, 'delta+elu', 'train')}\n{command_of(grid, 'delta+elu', 'evaluate')}\n```\n",
    ]
    return "\n".join(parts)


def write_between_marks(readme: Path, text: str) -> None:
    before, start, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"results.py: {readme} lacks {START} or {END}")
    readme.write_text(f"{before}{start}\n\n{text}\n{end}{after}")


def draw(rows: list[Row], folder: Path) -> None:
    """wikitext2.png and .svg: validation perplexity by updates."""
    with tempfile.TemporaryDirectory(dir=folder) as drawn:
        for path in draw_curves(rows, "ppl", Path(drawn)):
            path.replace(folder / f"wikitext2{path.suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--into", type=Path, default=HERE)
    args = parser.parse_args()
    grid = read_grid(args.work / "grid.yaml")
    rows = finished_rows(grid)
    write_between_marks(args.into / "README.md", results(grid, rows, pieces_per_word(args.work / "data")))
    draw(rows, args.into)
    print(f"{len(rows)} rows written into {args.into / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
