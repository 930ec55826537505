"""State tracking: permutations are read one by one, and after each their product so far is asked for.

    fairseq-train --user-dir fairseq_fastweights --task state_tracking --arch fast_weight_lm_tiny \\
        --num-items 3 --tokens-per-sample 32 --update-rule delta --optimizer adam --lr 1e-3 --batch-size 64

The usual settings: the word problem of S5 (``--num-items 5``, all 120 permutations; Merrill et al. 2024, "The Illusion
of State"), S3, swaps only (``--swaps``), and parity (``--num-items 2``; Grazzi et al. 2024), for which a linear
recurrence needs eigenvalues below zero: write strengths in (0, 1), the paper's, give none.
"""

from dataclasses import dataclass, field
from itertools import permutations
from typing import List, Tuple

import numpy as np
from fairseq.tasks import register_task

from ..errors import FastWeightError
from .synthetic_tokens import SyntheticTokensConfig, SyntheticTokensTask


@dataclass
class StateTrackingConfig(SyntheticTokensConfig):
    tokens_per_sample: int = field(default=32, metadata={"help": "permutations of a sequence"})
    num_items: int = field(default=5, metadata={"help": "how many things are permuted, 2 (parity) to 6"})
    swaps: bool = field(
        default=False, metadata={"help": "read the identity and exchanges of two things only"}
    )


@register_task("state_tracking", dataclass=StateTrackingConfig)
class StateTrackingTask(SyntheticTokensTask):
    """A token is a permutation p_t of ``items`` things; its label is p_t after ... after p_1."""

    def __init__(self, cfg: StateTrackingConfig):
        if not 2 <= cfg.num_items <= 6:
            raise FastWeightError(f"--num-items must be from 2 to 6, got {cfg.num_items}")
        self.permutations = np.array(list(permutations(range(cfg.num_items))))  # (items!, items)
        super().__init__(cfg)

    def symbols(self) -> List[str]:
        return ["".join(map(str, permutation)) for permutation in self.permutations]

    def products(self) -> np.ndarray:
        """(items!, items!): the number of p after q."""
        after = self.permutations[:, self.permutations]  # (p, q, items): p[q[i]]
        return numbers(after)

    def readable(self) -> np.ndarray:
        """Numbers of the permutations that can be tokens."""
        moved = (self.permutations != np.arange(self.cfg.num_items)).sum(1)
        return np.flatnonzero(moved <= 2) if self.cfg.swaps else np.arange(len(moved))

    def draw(self, random: np.random.Generator, count: int) -> Tuple[np.ndarray, np.ndarray]:
        tokens = random.choice(self.readable(), size=(count, self.cfg.tokens_per_sample))
        labels, products = tokens.copy(), self.products()
        for t in range(1, tokens.shape[1]):
            labels[:, t] = products[tokens[:, t], labels[:, t - 1]]
        return tokens, labels


def numbers(rows: np.ndarray) -> np.ndarray:
    """Places of permutations (..., items) in lexicographic order."""
    items = rows.shape[-1]
    smaller_later = [(rows[..., i, None] > rows[..., i + 1 :]).sum(-1) for i in range(items)]
    return sum(count * int(np.prod(range(1, items - i))) for i, count in enumerate(smaller_later))
