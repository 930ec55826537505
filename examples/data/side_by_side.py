"""Prints some lines of parallel files under each other.

python side_by_side.py --samples 10 source=test.en reference=test.de translation=out.de
"""

import argparse
from pathlib import Path


def samples(lines: int, wanted: int) -> list[int]:
    """Indices spread evenly over the file."""
    return [i * lines // wanted for i in range(min(wanted, lines))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--samples", type=int, default=10)
    args = parser.parse_args()
    named = [item.partition("=")[::2] for item in args.files]
    columns = {name: Path(file).read_text(encoding="utf-8").splitlines() for name, file in named}
    width = max(map(len, columns))
    lengths = {len(lines) for lines in columns.values()}
    if len(lengths) != 1:
        parser.error(f"the files must have the same number of lines, got {sorted(lengths)}")
    for i in samples(lengths.pop(), args.samples):
        print()
        for name, lines in columns.items():
            print(f"  {name:>{width}}  {lines[i]}")


if __name__ == "__main__":
    main()
