"""All runs of the paper's figures 2 and 5 (associative retrieval), as many at a time as there are cores; resumable.

    python examples/associative_retrieval/grid.py                         # 20 to 600 keys, a day or more on 2 cores
    python examples/associative_retrieval/grid.py --sizes 20 60 100       # fewer keys
    python examples/associative_retrieval/grid.py --curves dpfp1-sum      # fewer curves
    python examples/associative_retrieval/grid.py --missing               # not what results.csv has already
    python examples/associative_retrieval/figures.py                      # draws what is there

A run is one fairseq-train command on one thread; its rows go to runs/CURVE-S.csv, its log to runs/CURVE-S.log. What is
finished is not run again; what was stopped starts anew.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "fairseq_fastweights"
RUNS = HERE / "runs"
RESULTS = HERE / "results.csv"  # of all runs so far, written by figures.py

CAPACITY, OVERWRITING = 1, 2  # --setting
CURVES = {
    # figure 2
    "softmax": (CAPACITY, "--update-rule softmax"),
    "elu-sum": (CAPACITY, "--update-rule sum --feature-map elu"),
    "favor64-sum": (CAPACITY, "--update-rule sum --feature-map favor --favor-features 64"),
    "favor128-sum": (CAPACITY, "--update-rule sum --feature-map favor --favor-features 128"),
    "favor512-sum": (CAPACITY, "--update-rule sum --feature-map favor --favor-features 512"),
    "dpfp1-sum": (CAPACITY, "--update-rule sum --feature-map dpfp --dpfp-nu 1"),
    "dpfp2-sum": (CAPACITY, "--update-rule sum --feature-map dpfp --dpfp-nu 2"),
    "dpfp3-sum": (CAPACITY, "--update-rule sum --feature-map dpfp --dpfp-nu 3"),
    # figure 5, and rows that the authors logged and did not plot
    "overwriting-dpfp1-sum": (OVERWRITING, "--update-rule sum --feature-map dpfp --dpfp-nu 1"),
    "overwriting-dpfp1-delta": (OVERWRITING, "--update-rule delta --feature-map dpfp --dpfp-nu 1"),
    "overwriting-dpfp2-delta": (OVERWRITING, "--update-rule delta --feature-map dpfp --dpfp-nu 2"),
    "overwriting-elu-delta": (OVERWRITING, "--update-rule delta --feature-map elu"),
    "overwriting-favor64-delta": (OVERWRITING, "--update-rule delta --feature-map favor --favor-features 64"),
    "overwriting-dpfp1-fwm": (OVERWRITING, "--update-rule fwm --feature-map dpfp --dpfp-nu 1"),
    "overwriting-tanh-fwm": (OVERWRITING, "--update-rule fwm --feature-map tanh"),
}


class Run(NamedTuple):
    curve: str
    size: int

    @property
    def csv(self) -> Path:
        return RUNS / f"{self.curve}-{self.size}.csv"

    @property
    def finished(self) -> Path:
        return self.csv.with_suffix(".finished")

    def command(self) -> List[str]:
        setting, flags = CURVES[self.curve]
        task = f"--task associative_retrieval --arch associative_memory --setting {setting} --num-keys {self.size}"
        main = [sys.executable, "-m", "fairseq_cli.train", "--user-dir", str(PLUGIN)]
        return [*main, *task.split(), *flags.split(), "--seed", "1", "--eval-csv", str(self.csv), "--cpu"]

    def last_row(self) -> str:
        step, loss = self.csv.read_text().split()[-1].split(",")
        return f"loss {float(loss):.5f} after {step} updates"


def read_rows(file: Path) -> List[Dict[str, str]]:
    """Of a CSV file with a header; none where there is no file."""
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def execute(run: Run) -> Optional[str]:
    """Run it; what went wrong, or None."""
    started = time.monotonic()
    with open(run.csv.with_suffix(".log"), "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(run.command(), stdout=log, stderr=log, env=environment).returncode
    if status:
        return f"exit status {status}, see {run.csv.with_suffix('.log')}"
    run.finished.write_text(f"{time.monotonic() - started:.0f} s\n")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=range(20, 601, 20), metavar="S", help="keys")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES), metavar="CURVE")
    parser.add_argument("--missing", action="store_true", help="leave out what results.csv has")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args()
    RUNS.mkdir(exist_ok=True)
    wanted = [Run(curve, size) for size in args.sizes for curve in args.curves]
    if args.missing:
        there = {Run(row["curve"], int(row["keys"])) for row in read_rows(RESULTS)}
        wanted = [run for run in wanted if run not in there]
    waiting = [run for run in wanted if not run.finished.exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them finished before", flush=True)
    failed = []
    pool = ThreadPoolExecutor(args.jobs)
    going = {pool.submit(execute, run): run for run in waiting}
    try:
        for n, done in enumerate(as_completed(going), len(wanted) - len(waiting) + 1):
            run, problem = going[done], done.result()
            said = problem or f"{run.last_row()}, {run.finished.read_text().strip()}"
            print(f"[{n}/{len(wanted)}] {run.curve}, {run.size} keys: {said}", flush=True)
            if problem:
                failed.append(f"{run.curve}-{run.size}")
    except KeyboardInterrupt:  # (the terminal has told the runs too)
        pool.shutdown(cancel_futures=True)
        sys.exit("stopped; the same command goes on from here")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
