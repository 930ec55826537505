"""Prints a grid with its data and runs in another folder, and perhaps fewer rows, for run_rows.sh.

    python grid_in.py wikitext2.yaml WORK [--rows softmax delta+elu] [--updates 60] [--smoke]

WORK takes the place of the folder in which the grid's own ``out`` lies. --updates: trainings end there, to see how fast
they are. --smoke: two updates, to see that everything starts.
"""

import argparse
import shlex
from pathlib import Path
from typing import Optional

import yaml

# the last value of a flag counts
SMOKE = "--max-update 2 --warmup-updates 1 --validate-interval-updates 2 --log-interval 1"


def grid_in(grid: Path, work: Path, rows: list[str], smoke: bool, updates: Optional[int] = None) -> dict:
    """The grid as it is to be run. ValueError if a row is asked for that it does not have."""
    usual = Path(yaml.safe_load(grid.read_text())["out"]).parent
    described = yaml.safe_load(grid.read_text().replace(f"{usual}/", f"{shlex.quote(str(work))}/"))
    described["out"] = str(work / Path(described["out"]).name)  # not split into words, as commands are
    unknown = [row for row in rows if row not in described["rows"]]
    if unknown:
        raise ValueError(f"no row {unknown[0]!r} in {grid.name}: it has {' '.join(described['rows'])}")
    if rows:
        described["rows"] = {row: described["rows"][row] for row in rows}
    if updates is not None:
        described["command"] += f"--max-update {updates} "
    if smoke:
        described["command"] += SMOKE
    return described


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--updates", type=int)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    try:
        print(yaml.safe_dump(grid_in(**vars(args)), sort_keys=False))
    except ValueError as error:
        parser.exit(1, f"grid_in.py: {error}\n")


if __name__ == "__main__":
    main()
