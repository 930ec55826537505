"""Averages the weights of checkpoints into one that fairseq-generate reads.

    python average_checkpoints.py SAVE_DIR --last 5 --out averaged.pt   # epochs, or those of --save-interval-updates
    python average_checkpoints.py SAVE_DIR --best 5 --out averaged.pt   # of --keep-best-checkpoints
    python average_checkpoints.py ONE.pt OTHER.pt --out averaged.pt     # these

Checkpoints are read as data, without running code in them. Weights are averaged in float64 and stored in their own
type. What is no weight comes from the last of them: whole numbers, and the directions that FAVOR+ draws, whose mean
would be too short. The state of the optimizer is left out.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from fairseq_fastweights.compare.runs import load_checkpoint
from fairseq_fastweights.errors import FastWeightError, user_mistake

EPOCH = re.compile(r"checkpoint(\d+)\.pt")
UPDATES = re.compile(r"checkpoint_\d+_(\d+)\.pt")
BEST = re.compile(r"checkpoint\.best_.*_(\d+\.\d+)\.pt")
DRAWN = re.compile(r"(^|\.)projection$")


def numbered(folder: Path, pattern: re.Pattern) -> list[Path]:
    """The checkpoints whose name has this form, by the number in it."""
    found = [
        (float(match[1]), path) for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def last(folder: Path, count: int) -> list[Path]:
    return enough(numbered(folder, EPOCH) or numbered(folder, UPDATES), count, folder)[-count:]


def best(folder: Path, count: int) -> list[Path]:
    """The best one last. Which end is best is written in the checkpoints."""
    paths = enough(numbered(folder, BEST), count, folder)
    options = load_checkpoint(paths[0])["cfg"]["checkpoint"]
    return paths[-count:] if options["maximize_best_checkpoint_metric"] else paths[:count][::-1]


def enough(paths: list[Path], count: int, folder: Path) -> list[Path]:
    if len(paths) < count:
        raise FastWeightError(f"{folder} has {len(paths)} checkpoints of this kind, asked for were {count}")
    return paths


def average(paths: list[Path]) -> dict:
    """The last checkpoint with the mean of all weights. One at a time is in memory, beside the sum."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        state = load_checkpoint(path)
        check_same(total, state["model"], path)
        for name, value in weights(state["model"]).items():
            total[name] = total[name] + value.double() if name in total else value.double()
    for name, value in weights(state["model"]).items():
        state["model"][name] = (total[name] / len(paths)).to(value.dtype)
    state["last_optimizer_state"] = None
    return state


def weights(model: dict) -> dict[str, torch.Tensor]:
    """What is averaged."""
    return {name: x for name, x in model.items() if x.is_floating_point() and not DRAWN.search(name)}


def check_same(total: dict, model: dict, path: Path) -> None:
    other = {name: x.shape for name, x in weights(model).items()}
    known = {name: x.shape for name, x in total.items()}
    if total and other != known:
        differing = sorted(name for name in {*known, *other} if known.get(name) != other.get(name))
        raise FastWeightError(
            f"{path} is of another model than the checkpoints before it: {differing[0]} differs"
        )


def save(state: dict, out: Path) -> None:
    part = out.with_name(out.name + ".part")
    torch.save(state, part)
    part.replace(out)


def choose(args: argparse.Namespace) -> list[Path]:
    if args.last is None and args.best is None:
        return args.paths
    count = args.last if args.best is None else args.best
    if len(args.paths) != 1 or not args.paths[0].is_dir():
        raise FastWeightError("--last and --best take the checkpoints of one folder: give its name alone")
    if count < 1:
        raise FastWeightError(f"--last and --best must be at least 1, got {count}")
    return (last if args.best is None else best)(args.paths[0], count)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", type=Path, required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N")
    which.add_argument("--best", type=int, metavar="N")
    args = parser.parse_args()
    try:
        paths = choose(args)
        save(average(paths), args.out)
    except FastWeightError as error:
        line = user_mistake(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 1
    print(f"{args.out}: mean of {', '.join(path.name for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
