"""Start-up: what the plugin adds to ``fairseq-train --help``.

    python benchmarks/startup.py

Both commands run in turns, 7 times each.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from measure import machine, summary, timings, write_json

PLUGIN = Path(__file__).resolve().parents[1] / "fairseq_fastweights"
HELP = [sys.executable, "-m", "fairseq_cli.train", "--help"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="startup.json")
    args = parser.parse_args()

    def command(*options: str):
        return lambda: subprocess.run([*HELP, *options], check=True, capture_output=True)

    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    runs = {"fairseq-train --help": command(), "with --user-dir": command("--user-dir", str(PLUGIN))}
    results = {name: summary(seconds) for name, seconds in timings(runs, args.repeats).items()}
    for name, result in results.items():
        print(f"{name}: {result['median']:.2f} s (spread {result['spread']:.0%})")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
