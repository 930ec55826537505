"""Multi-query associative recall (MQAR): key-value pairs first, then each key comes again and its value is asked for.

    fairseq-train --user-dir fairseq_fastweights --task multi_query_recall --arch fast_weight_lm_tiny \\
        --tokens-per-sample 128 --num-pairs 8 --update-rule delta --optimizer adam --lr 1e-3 --batch-size 64

The usual settings (Arora et al. 2023, "Zoology", section 4): 8192 words; 64, 128, 256 and 512 tokens with 4, 8, 16 and
64 pairs; 100,000 sequences to train on and 3,000 to test; two layers, widths of 64 to 512, rates of 1e-4 to 1e-2.
"""

from dataclasses import dataclass, field
from typing import List, Tuple

import numpy as np
from fairseq.tasks import register_task

from ..errors import FastWeightError
from .synthetic_tokens import SyntheticTokensConfig, SyntheticTokensTask


@dataclass
class MultiQueryRecallConfig(SyntheticTokensConfig):
    num_pairs: int = field(default=8, metadata={"help": "pairs of a sequence, each asked for once"})
    num_words: int = field(default=8192, metadata={"help": "half of them keys, half values"})
    gap_power: float = field(
        default=0.01,
        metadata={"help": "queries come at places x with density x^(power - 1): 1 is uniform, near 0 soon"},
    )


@register_task("multi_query_recall", dataclass=MultiQueryRecallConfig)
class MultiQueryRecallTask(SyntheticTokensTask):
    """k1 v1 k2 v2 ...; then the keys in another order at random places, other words between them."""

    def __init__(self, cfg: MultiQueryRecallConfig):
        if cfg.num_pairs < 1 or 4 * cfg.num_pairs > cfg.tokens_per_sample:
            raise FastWeightError(
                f"--num-pairs must be from 1 to a quarter of --tokens-per-sample ({cfg.tokens_per_sample // 4}), "
                f"got {cfg.num_pairs}"
            )
        if cfg.num_words < 2 * cfg.num_pairs:
            raise FastWeightError(
                f"--num-words must be at least twice --num-pairs ({2 * cfg.num_pairs}), got {cfg.num_words}"
            )
        super().__init__(cfg)

    def symbols(self) -> List[str]:
        return [f"w{number}" for number in range(self.cfg.num_words)]

    def draw(self, random: np.random.Generator, count: int) -> Tuple[np.ndarray, np.ndarray]:
        length, pairs, half = self.cfg.tokens_per_sample, self.cfg.num_pairs, self.cfg.num_words // 2
        tokens = random.integers(self.cfg.num_words, size=(count, length))
        labels = np.full((count, length), -1)
        # (a key and its value take two places, so a query has every second one)
        places = np.arange(1, (length - 2 * pairs) // 2 + 1)
        density = places ** (self.cfg.gap_power - 1.0)
        density /= density.sum()
        for row, row_labels in zip(tokens, labels):
            keys = random.choice(half, pairs, replace=False)
            values = half + random.choice(half, pairs, replace=False)
            row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
            at = 2 * pairs + 2 * (random.choice(places, pairs, replace=False, p=density) - 1)
            row[at], row_labels[at] = keys, values
        return tokens, labels
