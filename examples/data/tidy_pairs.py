"""Sentence pairs as one line each, without odd ones in the training text if asked.

    python tidy_pairs.py --languages en de --train TRAIN --valid VALID --test TEST [--clean 250:1.5] OUT

TRAIN, VALID and TEST are prefixes of .en and .de; OUT gets {train,valid,test}.{en,de}. Runs of blanks become one, and
whatever else Unicode calls a blank or the end of a line becomes a blank, since the next program may take it for the end
of a line. --clean LENGTH:RATIO leaves out training pairs with an empty side, more than LENGTH words in one, or more
than RATIO times as many in one as in the other.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

Pair = tuple[str, str]


def read_pairs(prefix: str, languages: list[str]) -> Iterator[Pair]:
    """The pairs of two files. A line ends with a line feed and nothing else."""
    names = [f"{prefix}.{language}" for language in languages]
    with (
        open(names[0], encoding="utf-8", newline="\n") as one,
        open(names[1], encoding="utf-8", newline="\n") as other,
    ):
        for lines in zip(one, other, strict=True):
            source, target = (" ".join(line.split()) for line in lines)
            yield source, target


def is_odd(pair: Pair, longest: int, ratio: float) -> bool:
    lengths = sorted(len(side.split()) for side in pair)
    return lengths[0] == 0 or lengths[1] > longest or lengths[1] > ratio * lengths[0]


def write_pairs(pairs: Iterator[Pair], prefix: Path, languages: list[str]) -> int:
    """Returns how many."""
    count = 0
    names = [f"{prefix}.{language}" for language in languages]
    with open(names[0], "w", encoding="utf-8") as one, open(names[1], "w", encoding="utf-8") as other:
        for count, (source, target) in enumerate(pairs, start=1):
            print(source, file=one)
            print(target, file=other)
    return count


def length_and_ratio(text: str) -> tuple[int, float]:
    length, _, ratio = text.partition(":")
    return int(length), float(ratio)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--languages", nargs=2, required=True)
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}", required=True)
    parser.add_argument("--clean", type=length_and_ratio, metavar="LENGTH:RATIO")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("valid", "test"):
        write_pairs(read_pairs(getattr(args, split), args.languages), args.out / split, args.languages)
    pairs = read_pairs(args.train, args.languages)
    if args.clean is not None:
        pairs = (pair for pair in pairs if not is_odd(pair, *args.clean))
    kept = write_pairs(pairs, args.out / "train", args.languages)
    print(f"   {kept} training pairs")


if __name__ == "__main__":
    main()
