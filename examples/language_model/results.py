"""Writes what compare_wikitext2.sh has run: table and commands into README.md, validation curves beside it.

    python results.py WORK [--into FOLDER]     # WORK as for compare_wikitext2.sh; FOLDER holds the README.md

Only rows that are trained and evaluated are written. A perplexity per word is that per piece to the power of pieces
per word: the probability of the text is the same, spread over fewer tokens.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "compare"))

from results_in_readme import (  # noqa: E402
    arguments,
    command_of,
    draw,
    finished_rows,
    flags_of_rows,
    machine,
    unfinished,
    write_between_marks,
)

from fairseq_fastweights.compare.grid import Grid, read_grid  # noqa: E402
from fairseq_fastweights.compare.tables import Row, markdown, spread  # noqa: E402

USUAL = "examples/language_model/wikitext2"
NEW_LINES = "arch|decoder-layers|tokens|optimizer|lr |validate|log-format|task|path|save-dir"
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


def results(grid: Grid, rows: list[Row], ratio: dict[str, float]) -> str:
    """What stands between the marks of README.md."""
    commands = [command_of(grid, "delta+elu", step, USUAL, NEW_LINES) for step in ("train", "evaluate")]
    table = markdown(TITLES, [cells(row, ratio) for row in rows])
    parts = [
        table,
        f"Trained on: {machine()}. `minutes` is the training with its validations.\n",
        *unfinished(grid),
        "![validation perplexity by updates](wikitext2.png)\n",
        "One row by hand, from the folder of the clone:\n",
        f"```bash\n{commands[0]}\n{commands[1]}\n```\n",
        flags_of_rows(grid, USUAL),
    ]
    return "\n".join(parts)


def main() -> None:
    args = arguments(__doc__, HERE)
    grid = read_grid(args.work / "grid.yaml")
    rows = finished_rows(grid)
    write_between_marks(args.into / "README.md", results(grid, rows, pieces_per_word(args.work / "data")))
    draw(rows, "ppl", args.into / "wikitext2")
    print(f"{len(rows)} rows written into {args.into / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
