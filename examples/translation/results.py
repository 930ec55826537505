"""Writes what compare_multi30k.sh has run: table and commands into README.md, BLEU curves and BLEU by length beside it.

    python results.py WORK [--into FOLDER]     # WORK as for compare_multi30k.sh; FOLDER holds the README.md

Only rows that are trained and evaluated are written. Against softmax stands the paired bootstrap of sacreBLEU: how much
better the row's test BLEU is, and how probable a difference at least as large is if there is none; for every seed that
softmax has, too.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "compare"), str(HERE)]

from evaluate import read_data, read_lines  # noqa: E402
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
from fairseq_fastweights.compare.plots import draw_groups  # noqa: E402
from fairseq_fastweights.compare.runs import Run  # noqa: E402
from fairseq_fastweights.compare.tables import Row, markdown, spread  # noqa: E402

USUAL = "examples/translation/multi30k"
NEW_LINES = "arch|encoder-layers|decoder-layers|encoder-normalize|criterion|optimizer|lr |max-tokens|validate-interval "
NEW_LINES += "|keep|eval-bleu |eval-bleu-detok|best|log-format|update-rule |save-dir|out"
BASELINE = "softmax"
SAMPLES = 1000
TITLES = (
    "row",
    "runs",
    "BLEU val",
    "BLEU test2016",
    "chrF test2016",
    f"to {BASELINE}",
    "p",
    "parameters",
    "tokens/s",
    "minutes",
)


def scores_in(folder: Path, split: str) -> dict:
    """What evaluate.py has written of a split; there is one setting of beam and length penalty."""
    return next(one for one in json.loads((folder / "scores.json").read_text()) if one["split"] == split)


def scores(run: Run, split: str) -> dict:
    return scores_in(run.path / "evaluation", split)


def hypotheses(run: Run) -> list[str]:
    return read_lines(run.path / "evaluation" / scores(run, "test")["hypotheses"])


def against_baseline(row: Row, baseline: Row | None, references: Sequence[str]) -> tuple[str, str]:
    """Difference of the test BLEU (mean over seeds) and p of every seed; empty without a baseline."""
    by_seed = {run.options.get("seed"): run for run in baseline.runs} if baseline else {}
    pairs = [
        (run, by_seed[run.options.get("seed")]) for run in row.runs if run.options.get("seed") in by_seed
    ]
    if not pairs or row is baseline:
        return "", ""
    differences = [scores(run, "test")["bleu"] - scores(other, "test")["bleu"] for run, other in pairs]
    values = [p_value(hypotheses(run), hypotheses(other), references) for run, other in pairs]
    return f"{mean(differences):+.2f}", ", ".join(f"{value:.3f}" for value in values)


def p_value(system: list[str], baseline: list[str], references: Sequence[str]) -> float:
    """Of sacreBLEU's paired bootstrap of BLEU, with its fixed seed."""
    named = [("baseline", baseline), ("system", system)]
    test = PairedTest(named, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=SAMPLES)
    return test()[1]["BLEU"][1].p_value


def cells(row: Row, baseline: Row | None, references: Sequence[str]) -> list[str]:
    """The cells below TITLES: means over the seeds, with deviations where there is more than one."""
    quality = [
        [scores(run, "valid")["bleu"] for run in row.runs],
        [scores(run, "test")["bleu"] for run in row.runs],
        [scores(run, "test")["chrf"] for run in row.runs],
    ]
    cost = [
        [run.parameters for run in row.runs],
        [run.tokens_per_second for run in row.runs],
        [run.seconds / 60 for run in row.runs],
    ]
    quality, cost = ([spread(column, len(column)) for column in columns] for columns in (quality, cost))
    return [row.label, str(len(row.runs)), *quality, *against_baseline(row, baseline, references), *cost]


def results(grid: Grid, rows: list[Row], references: Sequence[str]) -> str:
    """What stands between the marks of README.md."""
    baseline = next((row for row in rows if row.label == BASELINE), None)
    commands = [command_of(grid, "delta+elu", step, USUAL, NEW_LINES) for step in ("train", "evaluate")]
    best = max(rows[0].runs, key=lambda run: scores(run, "test")["bleu"])
    parts = [
        markdown(TITLES, [cells(row, baseline, references) for row in rows]),
        f"Trained on: {machine()}. `minutes` is the training with its validations.\n",
        f"Signature, here of a run of {rows[0].label}: `{scores(best, 'test')['bleu_line']}`\n",
        *unfinished(grid),
        "![validation BLEU by updates](multi30k.png)\n",
        "![test BLEU by source length](multi30k-lengths.png)\n",
        "One row by hand, from the folder of the clone:\n",
        f"```bash\n{commands[0]}\n{commands[1]}\n```\n",
        flags_of_rows(grid, USUAL),
    ]
    return "\n".join(parts)


def draw_lengths(rows: list[Row], folder: Path) -> None:
    """multi30k-lengths.png and .svg: test BLEU by source length, the mean over seeds."""
    buckets = [(name, sentences) for name, sentences, _ in scores(rows[0].runs[0], "test")["by_length"]]
    names = [f"{name}\n({sentences})" for name, sentences in buckets]
    curves = []
    for row in rows:
        by_run = [[bleu for *_, bleu in scores(run, "test")["by_length"]] for run in row.runs]
        values = [math.nan if None in bucket else mean(bucket) for bucket in zip(*by_run, strict=True)]
        curves.append((row.label, values))
    across = "words of the source (sentences)"
    draw_groups(curves, names, across, "test BLEU", folder / "multi30k-lengths")


def main() -> None:
    args = arguments(__doc__, HERE)
    grid = read_grid(args.work / "grid.yaml")
    rows = finished_rows(grid)
    data = read_data(args.work / "data")
    write_between_marks(args.into / "README.md", results(grid, rows, data.raw("test", data.target)))
    draw(rows, "bleu", args.into / "multi30k")
    draw_lengths(rows, args.into)
    print(f"{len(rows)} rows written into {args.into / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
