"""Bytes that the CUDA kernels move, counted without a GPU, against the least possible, and what that takes at best.

    python benchmarks/kernel_traffic.py            # 1 minute; --readme puts the table into benchmarks/README.md

The kernels run in the executor of tests/cuda_on_cpu, which counts every access to global memory, for one head; all
heads do the same. (In the decoding step, whose threads read the same numbers of q and k together, a byte counts once a
block.) The least possible is every input, output, saved tensor and gradient once. The roofline time is the
longer of bytes over bandwidth and products over float32 throughput, for all heads, from the data sheets below.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

import torch
from measure import write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/cuda_on_cpu")]

import cuda_executor  # noqa: E402
from cuda_stand_in import instead_of_gpu  # noqa: E402

from fairseq_fastweights.ops import cuda, cuda_scan, fast_weight_scan, fast_weight_step  # noqa: E402


class Device(NamedTuple):
    """Data sheet: bytes a second, float32 operations a second (2 a fused multiply-add), and what a block may use."""

    bandwidth: float
    float32: float
    limits: cuda.Limits


DEVICES = {
    "H100": Device(3.35e12, 67e12, cuda.Limits(227 * 1024, 132)),  # SXM
    "A100": Device(2.04e12, 19.5e12, cuda.Limits(163 * 1024, 108)),  # SXM, 80 GB
}


class Shape(NamedTuple):
    """A layer's work: batch x heads, tokens (0: one decoding step), widths of keys and values, rule."""

    heads: int
    tokens: int
    dk: int
    dv: int
    rule: str


SHAPES = {
    "WikiText-103 small: B96 T256 H8, delta, DPFP-1, d16": Shape(96 * 8, 256, 32, 16, "delta"),
    "WikiText-103 medium: B56 T384 H8, delta, DPFP-1, d32": Shape(56 * 8, 384, 64, 32, "delta"),
    "WMT decoder: 8k tokens, T32 H8, sum, DPFP-3, d64": Shape(256 * 8, 32, 384, 64, "sum"),
    "decoding: 1024 rows H8, delta, DPFP-1, d64": Shape(1024 * 8, 0, 128, 64, "delta"),
}
ALLOWED = {"scan_forward": 1.2, "scan_backward": 1.5, "step": 1.1}


def operands(shape: Shape, heads: int) -> Dict[str, torch.Tensor]:
    """Random operands of ``heads`` heads; a decoding step has no token axis."""
    rows = (heads, 1, shape.tokens) if shape.tokens else (1, heads)
    x = {"q": torch.rand(*rows, shape.dk), "k": torch.rand(*rows, shape.dk) / shape.dk}
    x["v"] = torch.rand(*rows, shape.dv)
    if shape.rule == "delta":
        x["write"] = torch.rand(rows)
        x["erase"] = x["write"].clone()
    return x


def traffic(shape: Shape, limits: cuda.Limits) -> List[dict]:
    """A row for each kernel of a shape."""
    return (scan_traffic if shape.tokens else step_traffic)(shape, limits)


def scan_traffic(shape: Shape, limits: cuda.Limits) -> List[dict]:
    """Bytes of forward and backward and the least possible, for all heads."""
    whole = cuda.Limits(
        limits.shared, 1
    )  # as with all heads there are enough blocks without splitting the values
    x = {n: y.requires_grad_() for n, y in operands(shape, 1).items()}
    with instead_of_gpu(whole), cuda_executor.running(count=True) as launches:
        out, _ = fast_weight_scan(**x, return_state=False, backend="cuda")
        out.backward(torch.rand_like(out))
    kind = 1 if shape.rule == "delta" else 0
    cut = cuda_scan.plan(shape.heads, shape.tokens, shape.dk, shape.dv, kind, False, False, 0, whole)
    inputs = 4 * sum(y.numel() for y in x.values())
    output = 4 * out.numel()
    builds = shape.tokens > cut.chunk
    saved = 4 * (builds * shape.dk * shape.dv + (out.numel() if kind else 0))  # the final state, R
    # the backward needs v for dw only, and R in its place where nothing is erased
    least = [inputs + output + saved, 2 * inputs + output + saved]
    products = scan_products(shape, cut.chunk, kind, builds)
    return [row(x.name, shape, x.traffic, least[n], products[n]) for n, x in enumerate(launches)]


def scan_products(shape: Shape, chunk: int, erases: int, builds: bool) -> List[float]:
    """Multiply-adds of forward and backward of one head, as the kernels do them (triangles in full)."""
    pairs, state = shape.tokens * chunk, shape.tokens * builds
    dk, dv, uses = shape.dk, shape.dv, 1 + erases
    forward = uses * pairs * dk + pairs * dv + (uses + 1) * state * dk * dv + erases * pairs * dv / 2
    backward = (
        uses * pairs * (3 * dk + dv) + pairs * dv + (2 * uses + 3) * state * dk * dv + erases * pairs * dv / 2
    )
    return [forward, backward]


def step_traffic(shape: Shape, limits: cuda.Limits) -> List[dict]:
    """Bytes of one decoding token of reordered rows."""
    heads = 8
    x = operands(shape, heads)
    state = torch.rand(2, heads, shape.dk, shape.dv)
    x = {n: y.expand(2, *y.shape[1:]).contiguous() for n, y in x.items()}
    with instead_of_gpu(limits), cuda_executor.running(count=True) as launches:
        out, new = fast_weight_step(**x, state=state, parent=torch.tensor([1, 0]))
    least = 8 * state.numel() + 4 * sum(y.numel() for y in (*x.values(), out)) + 8 * 2
    count = 2 * heads
    products = 3 * shape.dk * shape.dv
    return [row(launch.name, shape, launch.traffic, least, products, count) for launch in launches]


def row(name: str, shape: Shape, counted_bytes, least: int, products: float, counted: int = 1) -> dict:
    """One line of the table, for all heads of ``shape`` when ``counted`` of them ran."""
    times = shape.heads / counted
    moved = counted_bytes.read_bytes + counted_bytes.written_bytes
    if not shape.tokens:  # threads of a warp share the numbers of q and k that they read, in one transaction
        moved = counted_bytes.read_per_block + counted_bytes.written_per_block
    return {
        "kernel": name,
        "moved": moved * times,
        "least": least * times,
        "products": products * shape.heads,
        "shared accesses": counted_bytes.shared_accesses * times,
        "barriers": counted_bytes.barriers / counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="kernel_traffic.json")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    header = ["work", "kernel", "MB moved", "least, MB", "moved / least", "allowed", "barriers a head"]
    header += [f"{name}: memory, float32, us" for name in DEVICES]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    print("\n".join(lines))
    results = []
    for work, shape in SHAPES.items():
        limits = DEVICES["H100"].limits
        for found in traffic(shape, limits):
            ratio, allowed = found["moved"] / found["least"], ALLOWED[found["kernel"]]
            times = [
                f"{1e6 * found['moved'] / d.bandwidth:.1f}, {1e6 * 2 * found['products'] / d.float32:.1f}"
                for d in DEVICES.values()
            ]
            verdict = "" if ratio <= allowed else " **exceeded**"
            cells = [work, found["kernel"], f"{found['moved'] / 1e6:.1f}", f"{found['least'] / 1e6:.1f}"]
            cells += [f"{ratio:.2f}", f"{allowed}{verdict}", f"{found['barriers']:.0f}", *times]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            results.append({"work": work, "ratio": ratio, "allowed": allowed, **found})
    write_json(args.json, results)
    if args.readme:
        write_section("traffic", "python benchmarks/kernel_traffic.py --readme", "\n".join(lines))


if __name__ == "__main__":
    main()
