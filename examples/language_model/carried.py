"""Evaluates models of compare_wikitext2.sh both ways, carried and not, and writes the table into README.md.

    python carried.py WORK [--into FOLDER]     # WORK as for compare_wikitext2.sh; FOLDER holds the README.md

Of each rule of RULES whose rows are both finished, trained carried and not: four evaluations of the test text, a minute
or less each; what is evaluated is not done again. compare_wikitext2.sh calls it.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "compare"))

from results_in_readme import arguments, command_of, machine, write_between_marks  # noqa: E402

from fairseq_fastweights.compare.grid import Grid, Job, program, read_grid  # noqa: E402
from fairseq_fastweights.compare.tables import markdown  # noqa: E402

USUAL = "examples/language_model/wikitext2"
RULES = ("delta+elu", "gated-delta+elu")
WAYS = {"no-positions": "from nothing", "carried": "carried"}  # by the end of a row's name
PERPLEXITY = re.compile(r"\bPerplexity: ([\d.]+)")


def command(weights: Job, reading: Job) -> list[str]:
    """That evaluates the model of one row as the other row is evaluated."""
    return [word.replace(str(reading.folder), str(weights.folder)) for word in reading.commands["evaluate"]]


def perplexity(words: list[str], log: Path) -> float:
    """Of fairseq-eval-lm; from its log where this very command has ended well."""
    mark = log.with_suffix(".finished")
    if not mark.is_file() or mark.read_text() != shlex.join(words):
        print(f"evaluating: {log.stem}", flush=True)
        log.parent.mkdir(exist_ok=True)
        with open(log, "w") as out:
            status = subprocess.run([program(words[0]), *words[1:]], stdout=out, stderr=out).returncode
        if status:
            raise SystemExit(f"carried.py: exit status {status}, see {log}")
        mark.write_text(shlex.join(words))
    return float(PERPLEXITY.findall(log.read_text())[-1])


def finished_pairs(grid: Grid) -> list[list[Job]]:
    """Of each rule that is ready, its jobs in the order of WAYS."""
    jobs = {job.name: job for job in grid.jobs}
    pairs = [[jobs.get(f"{rule},{end},seed=1") for end in WAYS] for rule in RULES]
    return [pair for pair in pairs if all(job and not job.next_step() for job in pair)]


def row_of(job: Job) -> str:
    return job.name.removesuffix(",seed=1")


def text(grid: Grid, pairs: list[list[Job]], found: dict[tuple[str, str], float]) -> str:
    """What stands between the marks of README.md; found: by row and way of reading."""
    rows = [
        [
            f"trained {trained} (`{row_of(job)}`)",
            *(f"{found[row_of(job), read]:.1f}" for read in WAYS.values()),
        ]
        for pair in pairs
        for job, trained in zip(pair, WAYS.values(), strict=True)
    ]
    titles = ["test perplexity per piece", *(f"read {way}" for way in WAYS.values())]
    by_hand = command_of(
        Grid(grid.out, [Job("", grid.out, {"evaluate": command(*pairs[0])})]),
        "",
        "evaluate",
        USUAL,
        "path|task",
    )
    return (
        f"{markdown(titles, rows)}\nTrained on: {machine()}. The first row's second number is\n\n"
        f"```bash\n{by_hand}\n```\n"
    )


def main() -> None:
    args = arguments(__doc__, HERE)
    grid = read_grid(args.work / "grid.yaml")
    pairs = finished_pairs(grid)
    if not pairs:
        ends = " and ".join(WAYS)
        print(f"carried.py: of none of {', '.join(RULES)} are both {ends} finished")
        return
    found = {
        (row_of(job), way): perplexity(
            command(job, reading), args.work / "carried" / f"{row_of(job)} {way}.log"
        )
        for pair in pairs
        for job in pair
        for reading, way in zip(pair, WAYS.values(), strict=True)
    }
    write_between_marks(args.into / "README.md", text(grid, pairs, found), "carried")
    print(f"written into {args.into / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
