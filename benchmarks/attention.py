"""Time and memory of the operators against softmax attention and the step-by-step reference.

    python benchmarks/attention.py                       # forward + backward, float32, all shapes; memory at T 4096
    python benchmarks/attention.py --shape 1,8,1024,64   # batch, heads, tokens, head width
    python benchmarks/attention.py --no-memory --rules delta

All candidates of a row run in turns in one process; the ratio columns compare medians.
"""

import argparse
import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, summary, timings, write_json, write_section

from fairseq_fastweights.ops import delta_rule, sum_rule
from fairseq_fastweights.ops.dispatch import refusals

SHAPES = [
    "32,8,32,64",
    "8,8,256,16",
    "8,8,256,32",
    "8,8,256,64",
    "4,8,1024,64",
    "1,8,4096,64",
]
BACKENDS = [name for name in ("numba", "chunked") if refusals(torch.device("cpu"))[name] is None]


def operands(batch: int, heads: int, tokens: int, width: int):
    """q, k (sum-normalised, as the models give them), v and beta, all requiring a gradient."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.rand(3, batch, heads, tokens, width, generator=g)
    q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    beta = torch.rand(batch, heads, tokens, generator=g)
    return [x.clone().requires_grad_() for x in (q, k, v, beta)]


def with_backward(attention, inputs):
    """One forward and backward of ``attention``."""

    d_out = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1))

    def run():
        torch.autograd.grad(attention(), inputs, d_out, allow_unused=True)

    return run


def candidates(shape, rule: str):
    """What is compared at one shape, by name: our backends, softmax attention twice, and the reference loop."""
    q, k, v, beta = operands(*shape)
    call = {
        "sum": lambda **o: sum_rule(q, k, v, return_state=False, **o)[0],
        "delta": lambda **o: delta_rule(q, k, v, beta, return_state=False, **o)[0],
    }[rule]
    mask = torch.full((shape[2], shape[2]), float("-inf")).triu(1)
    runs = {
        **{name: lambda name=name: call(backend=name) for name in BACKENDS},
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "softmax matrix": lambda: (q @ k.mT * shape[3] ** -0.5 + mask).softmax(-1) @ v,
        "reference": lambda: call(backend="reference"),
    }
    return {name: with_backward(run, [q, k, v, beta]) for name, run in runs.items()}


def row(shape, rule: str, repeats: int):
    """Timings of one rule at one shape. The reference takes seconds and is run 3 times only."""
    runs = candidates(shape, rule)
    runs.pop("softmax matrix")
    loop = runs.pop("reference")
    seconds = timings(runs, repeats)
    seconds.update(timings({"reference": loop}, 3))
    return {name: summary(times) for name, times in seconds.items()}


def peak_memory(shape, rule: str, name: str) -> int:
    """Bytes that one forward and backward need beyond their inputs, measured in a process of its own (Linux)."""
    command = [sys.executable, __file__, "--peak", f"{','.join(map(str, shape))};{rule};{name}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(shape, rule: str, name: str) -> None:
    candidates((1, 1, 40, 64), rule)[name]()  # compilers and libraries, before anything is counted
    run = candidates(shape, rule)[name]
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be counted as there
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="batch,heads,tokens,width; may be repeated")
    parser.add_argument("--rules", default="sum,delta")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory at T 4096 out")
    parser.add_argument("--json", default="attention.json")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        shape, rule, name = args.peak.split(";")
        print_peak([int(n) for n in shape.split(",")], rule, name)
        return

    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    print("forward + backward, float32, milliseconds (spread of the runs); ratios of medians")
    columns = [*BACKENDS, "softmax", "reference"]
    best = BACKENDS[0]
    header = ["B,H,T,d", "rule", *(f"{c}, ms" for c in columns), f"{best} / softmax", f"reference / {best}"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    print("\n".join(lines))
    results = []
    for shape, rule in itertools.product(args.shape or SHAPES, args.rules.split(",")):
        times = row([int(n) for n in shape.split(",")], rule, args.repeats)
        results.append({"shape": shape, "rule": rule, "best": best, **times})
        cells = [f"{1e3 * times[n]['median']:.1f} ({times[n]['spread']:.0%})" for n in columns]
        fast, soft, loop = (times[n]["median"] for n in (best, "softmax", "reference"))
        lines.append(
            "| " + " | ".join([shape, rule, *cells, f"{fast / soft:.2f}", f"{loop / fast:.0f}"]) + " |"
        )
        print(lines[-1], flush=True)
    memory = {}
    if not args.no_memory:
        for name in (*BACKENDS, "softmax", "softmax matrix", "reference"):
            memory[name] = peak_memory((1, 8, 4096, 64), "delta", name)
        lines += ["", "Peak memory beyond the inputs, 1,8,4096,64, delta, forward + backward, MB: "]
        lines[-1] += ", ".join(f"{name} {peak / 1e6:.0f}" for name, peak in memory.items()) + "."
        print(lines[-1])
    write_json(args.json, {"time": results, "memory": memory})
    if args.readme:
        write_section("attention", "python benchmarks/attention.py --readme", "\n".join(lines))


if __name__ == "__main__":
    main()
