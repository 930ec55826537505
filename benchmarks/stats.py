"""What --fast-weight-stats costs in the updates that it does not measure: looking for values that are not finite.

    python benchmarks/stats.py            # half a minute

Forward and backward of a language model (4 layers of width 256, delta rule) on 8 x 256 tokens, one core. Medians; the
two take turns.
"""

import statistics
from argparse import Namespace

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from measure import machine, timings

import fairseq_fastweights  # noqa: F401  (registers the models)

NEVER = 10**9  # so that no update is measured
ARCH = "fast_weight_lm_tiny"


def model(interval: int):
    """As fairseq is about to train it."""
    words = Dictionary()
    for i in range(16):
        words.add_symbol(f"w{i}")
    args = Namespace(fast_weight_stats=interval, tokens_per_sample=256, max_target_positions=256, dropout=0.0)
    args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim = 4, 256, 1024
    ARCH_CONFIG_REGISTRY[ARCH](args)
    task = Namespace(source_dictionary=words, target_dictionary=words)
    built = ARCH_MODEL_REGISTRY[ARCH].build_model(args, task).train()
    built.set_num_updates(0)
    return built


def main() -> None:
    torch.set_num_threads(1)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    tokens = torch.randint(4, 20, (8, 256))
    models = {"off": model(0), "on": model(NEVER)}
    runs = {name: lambda m=m: m(tokens)[0].square().mean().backward() for name, m in models.items()}
    off, on = map(statistics.median, timings(runs, 12).values())
    print(f"an update: {off:.3f} s without, {on:.3f} s with --fast-weight-stats ({on / off - 1:+.1%})")


if __name__ == "__main__":
    main()
