"""Evaluates two of compare_wikitext2.sh's models both ways, carried and not, and writes the table into README.md.

    python carried.py WORK [--into FOLDER]     # WORK as for compare_wikitext2.sh; FOLDER holds the README.md

Four evaluations of the test text, a minute or less each; what is evaluated is not done again. compare_wikitext2.sh
calls it; before both rows are finished it does nothing.
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
ROWS = {"delta+elu,no-positions": "from nothing", "delta+elu,carried": "carried"}
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


def text(grid: Grid, jobs: dict[str, Job], found: dict[tuple[str, str], float]) -> str:
    """What stands between the marks of README.md."""
    rows = [
        [f"trained {way} (`{row}`)", *(f"{found[row, reading]:.1f}" for reading in jobs)]
        for row, way in ROWS.items()
    ]
    titles = ["test perplexity per piece", *(f"read {way}" for way in ROWS.values())]
    by_hand = command_of(
        Grid(grid.out, [Job("", grid.out, {"evaluate": command(*jobs.values())})]),
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
    jobs = {row: job for row in ROWS for job in grid.jobs if job.name == f"{row},seed=1"}
    if len(jobs) < len(ROWS) or any(job.next_step() for job in jobs.values()):
        print(f"carried.py: {' and '.join(ROWS)} are not both finished")
        return
    found = {
        (row, reading): perplexity(
            command(jobs[row], jobs[reading]), args.work / "carried" / f"{row} {way}.log"
        )
        for row in ROWS
        for reading, way in ROWS.items()
    }
    write_between_marks(args.into / "README.md", text(grid, jobs, found), "carried")
    print(f"written into {args.into / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
