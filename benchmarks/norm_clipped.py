"""The fwm rule of the synthetic experiments: its CPU kernel against the same loop in PyTorch.

    python benchmarks/norm_clipped.py            # a minute

Writes one batch of the overwriting experiment, forward and backward: 32 sequences of 2 S pairs, DPFP-1 keys of width
128, values one-hot of width S, on one core. Medians; the two take turns.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from measure import machine, timings

from fairseq_fastweights.feature_maps import build_feature_map
from fairseq_fastweights.ops.norm_clipped import norm_clipped_reference, norm_clipped_write


def operands(keys: int, batch: int = 32) -> list[torch.Tensor]:
    """k, v, beta of a batch, as an untrained model has them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 2 * keys, 64, generator=generator)
    k = build_feature_map("dpfp", 64, nu=1)(x)
    v = F.one_hot(torch.randint(keys, (batch, 1, 2 * keys), generator=generator), keys).float()
    beta = torch.rand(batch, 1, 2 * keys, generator=generator)
    return [k.requires_grad_(), v, beta.requires_grad_()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[20, 100, 200])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    print("| keys | kernel | loop in PyTorch | times faster |\n|---:|---:|---:|---:|")
    for keys in args.keys:
        inputs = operands(keys)
        writes = {"kernel": norm_clipped_write, "loop": norm_clipped_reference}
        runs = {name: lambda write=write: write(*inputs).sum().backward() for name, write in writes.items()}
        kernel, loop = map(statistics.median, timings(runs, args.repeats).values())
        print(f"| {keys} | {kernel:.3f} s | {loop:.2f} s | {loop / kernel:.0f} |", flush=True)


if __name__ == "__main__":
    main()
