"""Time of the fast-weight operators against the step-by-step reference and torch's softmax attention.

    python benchmarks/attention.py                       # forward + backward, float32, all shapes
    python benchmarks/attention.py --shape 1,8,1024,64   # batch, heads, tokens, head width

All candidates of a row run in turns in one process; the ratio columns compare medians.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from measure import machine, summary, timings, write_json, write_section

from fairseq_fastweights.ops import delta_rule, sum_rule

SHAPES = [
    "32,8,32,64",
    "8,8,256,16",
    "8,8,256,32",
    "8,8,256,64",
    "1,8,1024,64",
    "4,8,1024,64",
    "1,8,4096,64",
]


def operands(batch: int, heads: int, tokens: int, width: int):
    """q, k (sum-normalised, as the models give them), v and beta, all requiring a gradient."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.rand(3, batch, heads, tokens, width, generator=g)
    q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    beta = torch.rand(batch, heads, tokens, generator=g)
    return [x.clone().requires_grad_() for x in (q, k, v, beta)]


def with_backward(attention, inputs):
    """One forward and backward of ``attention``."""

    def run():
        out = attention()
        torch.autograd.grad(out.sum(), inputs, allow_unused=True)

    return run


def row(shape, rule: str, repeats: int, reference_tokens: int):
    """Timings of one rule at one shape: reference (unless too long), chunked, softmax."""
    q, k, v, beta = operands(*shape)
    call = {
        "sum": lambda **o: sum_rule(q, k, v, **o),
        "delta": lambda **o: delta_rule(q, k, v, beta, **o),
    }[rule]
    candidates = {
        "chunked": lambda: call(backend="chunked", return_state=False)[0],
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    candidates = {name: with_backward(run, [q, k, v, beta]) for name, run in candidates.items()}
    seconds = timings(candidates, repeats)
    if shape[2] <= reference_tokens:
        loop = with_backward(lambda: call(backend="reference", return_state=False)[0], [q, k, v, beta])
        seconds.update(timings({"reference": loop, **candidates}, 3))
    return {name: summary(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="batch,heads,tokens,width; may be repeated")
    parser.add_argument("--rules", default="sum,delta")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--reference-tokens", type=int, default=1024, help="longest run of the reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="attention.json")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    print("forward + backward, float32, milliseconds (spread of the runs); ratios of medians")
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    print("\n".join(lines))
    results = []
    for shape, rule in itertools.product(args.shape or SHAPES, args.rules.split(",")):
        times = row([int(n) for n in shape.split(",")], rule, args.repeats, args.reference_tokens)
        results.append({"shape": shape, "rule": rule, **times})
        lines.append(format_row(shape, rule, times))
        print(lines[-1], flush=True)
    write_json(args.json, results)
    if args.readme:
        write_section("attention", "python benchmarks/attention.py --readme", "\n".join(lines))


HEADER = (
    "| B,H,T,d | rule | chunked, ms | softmax, ms | reference, ms | chunked / softmax | reference / chunked |"
)


def format_row(shape: str, rule: str, times) -> str:
    """One line of the table; '-' where the reference was not run."""
    cells = [
        f"{1e3 * times[n]['median']:.1f} ({times[n]['spread']:.0%})" if n in times else "-"
        for n in ("chunked", "softmax", "reference")
    ]
    chunked = times["chunked"]["median"]
    over_softmax = f"{chunked / times['softmax']['median']:.2f}"
    speed_up = f"{times['reference']['median'] / chunked:.0f}" if "reference" in times else "-"
    return "| " + " | ".join([shape, rule, *cells, over_softmax, speed_up]) + " |"


if __name__ == "__main__":
    main()
