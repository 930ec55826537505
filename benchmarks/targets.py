"""The table of targets: what was measured by the other scripts, and whether it passes.

    python benchmarks/targets.py --readme   # after the others; benchmarks/run_all.sh does all of it

Reads the JSON files that attention.py, training.py, decoding.py and startup.py wrote into this folder.
"""

import argparse
import json
from pathlib import Path

from measure import write_json, write_section

HERE = Path(__file__).parent
SHAPES = {
    "32,8,32,64": ("B32 H8 T32 d64", 0.45, 1.0),
    "8,8,256,16": ("B8 H8 T256 d16", 0.18, 0.9),
    "8,8,256,32": ("B8 H8 T256 d32", 0.30, 1.0),
    "8,8,256,64": ("B8 H8 T256 d64", 0.45, 1.1),
    "4,8,1024,64": ("B4 H8 T1024 d64", 0.20, 0.50),
    "1,8,4096,64": ("B1 H8 T4096 d64", 0.08, 0.20),
}
TRAINING = {
    "lm-256": ("fairseq-train, language model 6 layers d512, T 256", "transformer_lm", 0.95),
    "lm-1024": ("the same, T 1024", "transformer_lm", 1.1),
    "lm-4096": ("the same, T 4096", "transformer_lm", 1.8),
    "translation-iwslt": ("fairseq-train, translation, iwslt sizes", "transformer", 0.95),
}


def read(name: str):
    return json.loads((HERE / f"{name}.json").read_text())["results"]


def rows():
    """(work, against, measured, target, whether more is better)"""
    attention = read("attention")
    for rule, which in (("sum", 1), ("delta", 2)):
        for result in attention["time"]:
            if result["rule"] == rule:
                label, *targets = SHAPES[result["shape"]]
                ratio = result[result["best"]]["median"] / result["softmax"]["median"]
                yield f"{rule} rule, {label}", "softmax attention, time", ratio, targets[which - 1], False
    slowest = max(
        r[r["best"]]["median"] / r["reference"]["median"] for r in attention["time"] if r["rule"] == "delta"
    )
    yield "delta rule, slowest of these", "step-by-step loop, time", slowest, 1 / 15, False
    memory, best = attention["memory"], attention["time"][0]["best"]
    yield (
        "delta rule, T4096, peak memory",
        "step-by-step loop",
        memory[best] / memory["reference"],
        1 / 20,
        False,
    )
    yield (
        "delta rule, T4096, peak memory",
        "softmax with its matrix",
        memory[best] / memory["softmax matrix"],
        1 / 10,
        False,
    )
    for result in read("training"):
        label, against, target = TRAINING[result["row"]]
        yield label, f"{against}, words/s", result["ratio"], target, True
    decoding = read("decoding")
    rates = decoding["translation"]
    speed = rates["delta"]["tokens_per_second"] / rates["softmax"]["tokens_per_second"]
    yield "fairseq-generate, beam 5, WMT lengths", "transformer, tokens/s", speed, 1.0, True
    worst = rates["hypotheses"]["largest score difference of those"]
    yield "hypotheses other than those of the plain path", "largest score difference", worst, 1e-4, False
    model = decoding["language-model"]
    at, early, soft = (model["delta"]["4096"], model["delta"]["256"], model["softmax"]["4096"])
    yield (
        "generation, a token at position 4096",
        "transformer_lm, time",
        at["median"] / soft["median"],
        1 / 8,
        False,
    )
    yield "the same", "position 256, time", at["median"] / early["median"], 1.1, False
    yield "decode memory a hypothesis at 4096", "transformer_lm", at["bytes"] / soft["bytes"], 1 / 10, False
    startup = read("startup")
    more = startup["with --user-dir"]["median"] - startup["fairseq-train --help"]["median"]
    yield "fairseq-train --help, seconds more", "without the plugin", more, 0.3, False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    lines = ["| work | against | measured | target | |", "|---|---|---|---|---|"]
    results = []
    for work, against, measured, target, more in rows():
        passed = measured >= target if more else measured <= target
        bound = f"{'at least' if more else 'at most'} {target:.3g}"
        lines.append(
            f"| {work} | {against} | {measured:.3g} | {bound} | {'pass' if passed else '**fail**'} |"
        )
        results.append(
            {"work": work, "against": against, "measured": measured, "target": target, "pass": passed}
        )
    print("\n".join(lines))
    print(f"{sum(r['pass'] for r in results)} of {len(results)} pass")
    write_json(str(HERE / "targets.json"), results)
    if args.readme:
        write_section("targets", "bash benchmarks/run_all.sh", "\n".join(lines))


if __name__ == "__main__":
    main()
