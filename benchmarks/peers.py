"""Operators side by side with public code for linear attention on the CPU, at whatever of it is installed.

    pip install --no-deps performer-pytorch local-attention axial-positional-embedding fla-core einops
    git clone https://github.com/idiap/fast-transformers
    python benchmarks/peers.py --fast-transformers fast-transformers   # needs a C++ compiler

fast-transformers: causal_dot_product, C++ with OpenMP, compiled here for this machine (-O3 -march=native), against our
sum rule. performer-pytorch: causal_linear_attention_noncuda (PyTorch), normalised, against our sum rule. fla: its
delta rule in chunks for CPUs (ops/delta_rule/naive.py, PyTorch) against our delta rule. Forward + backward, float32,
all in turns in one process; a peer's own numbers are checked against ours first.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from attention import SHAPES, operands, with_backward
from measure import machine, summary, timings, write_json, write_section

from fairseq_fastweights.ops import delta_rule, sum_rule


def fast_transformers(checkout: str):
    from torch.utils.cpp_extension import load

    source = Path(checkout) / "fast_transformers/causal_product/causal_product_cpu.cpp"
    flags = ["-O3", "-march=native", "-fopenmp", "-ffast-math"]
    cpp = load("causal_product_cpu", [str(source)], extra_cflags=flags, extra_ldflags=["-fopenmp"])

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            out = torch.zeros_like(v)
            cpp.causal_dot_product(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx, d_out):
            grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
            cpp.causal_dot_backward(*ctx.saved_tensors, d_out.contiguous(), *grads)
            return tuple(grads)

    return lambda q, k, v, beta: Product.apply(q, k, v)


def performer():
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    return lambda q, k, v, beta: causal_linear_attention_noncuda(q, k, v)


def fla():
    """The file alone: the package itself imports Triton."""
    folder = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("fla_naive", folder / "ops/delta_rule/naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(q, k, v, beta):
        return module.delta_rule_chunkwise(q, k, v, beta)[0] * q.shape[-1] ** 0.5

    return run


def installed(args):
    """(peer, rule, function) of what is there."""
    if args.fast_transformers:
        yield "fast-transformers", "sum", fast_transformers(args.fast_transformers)
    for name, rule, load, module in (
        ("performer-pytorch", "normalised sum", performer, "performer_pytorch"),
        ("fla", "delta", fla, "fla"),
    ):
        if importlib.util.find_spec(module):
            yield name, rule, load()
        else:
            print(f"{name} is not installed", file=sys.stderr)


def ours(rule: str):
    if rule == "delta":
        return lambda q, k, v, beta: delta_rule(q, k, v, beta, return_state=False)[0]
    if rule == "sum":
        return lambda q, k, v, beta: sum_rule(q, k, v, return_state=False)[0]

    def normalised(q, k, v, beta):  # z is read as a column of ones
        out = sum_rule(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), return_state=False)[0]
        return out[..., :-1] / (out[..., -1:] + 1e-6)

    return normalised


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="batch,heads,tokens,width; may be repeated")
    parser.add_argument("--fast-transformers", help="a checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="peers.json")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    lines = ["| B,H,T,d | rule | peer | peer, ms | ours, ms | peer / ours |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    results = []
    for peer, rule, function in installed(args):
        for shape in args.shape or SHAPES:
            x = operands(*[int(n) for n in shape.split(",")])
            with torch.no_grad():
                torch.testing.assert_close(function(*x), ours(rule)(*x), atol=1e-4, rtol=1e-3)
            runs = {"peer": lambda: function(*x), "ours": lambda: ours(rule)(*x)}  # noqa: B023
            times = timings({name: with_backward(run, x) for name, run in runs.items()}, args.repeats)
            times = {name: summary(seconds) for name, seconds in times.items()}
            results.append({"shape": shape, "rule": rule, "peer": peer, **times})
            cells = [f"{1e3 * times[n]['median']:.1f} ({times[n]['spread']:.0%})" for n in ("peer", "ours")]
            ratio = times["peer"]["median"] / times["ours"]["median"]
            lines.append("| " + " | ".join([shape, rule, peer, *cells, f"{ratio:.1f}"]) + " |")
            print(lines[-1], flush=True)
    write_json(args.json, results)
    if args.readme:
        write_section("peers", "python benchmarks/peers.py --readme", "\n".join(lines))


if __name__ == "__main__":
    main()
