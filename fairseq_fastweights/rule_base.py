"""What every update rule is: the class that ``update_rules`` and ``serial_rules`` build upon."""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .errors import FastWeightError
from .feature_maps import at_least_float32

ATTENTION_EPS = 1e-5  # added to the normalisers kappa_t and z_t . q_t, as in the authors' code

Operands = Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]


class UpdateRule(nn.Module):
    """One row of the table in ``update_rules``, or, if ``serial``, a rule with a ``scan`` of its own.

    Two steps, because the encoder's heads may write from right to left: ``gates`` looks at each token alone,
    ``forward`` at the sequence in the order of writing.

    Attributes:
        serial: whether the rule is none of the recurrence's rows (``serial_rules.SerialRule``).
        order_matters: whether writing the same tokens in another order gives another state.
        carries_sum: whether the attention-normalised rule needs z, the sum of its keys, beside S. Where it
            does not erase, z is column dv + 1 of S (its values are 1) and costs no second scan.
        default_key_normalization, default_attention_normalization: what the paper used for the rule.
    """

    serial = False
    order_matters = True
    carries_sum = False
    default_key_normalization = "none"
    default_attention_normalization = True

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.normalized = normalized
        self.kappa_clamp = kappa_clamp
        self.eps = ATTENTION_EPS
        if kappa_clamp and not (normalized and self.carries_sum):
            raise FastWeightError(
                "kappa_clamp bounds the attention-normalised delta rule: it needs update rule delta with "
                "attention_normalization true"
            )

    def gates(self, x: Tensor) -> Tensor:
        """x (T, B, embed_dim) -> (B, H, T, gates), in float32; no gates by default."""
        return x.new_empty(x.shape[1], self.num_heads, x.shape[0], 0, dtype=torch.float32)

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        """k (B, H, T, dk), gates (B, H, T, gates), z (B, H, dk) the sum of the keys before the first of these.

        Returns (write, erase, log_decay, z after every key). erase is (B, H, T) where the erase keys are that
        much of k, or (B, H, T, dk); z is (B, H, T, dk), or None if not carried. A zero key must erase nothing.
        """
        raise NotImplementedError


def heads_first(x: Tensor) -> Tensor:
    """(T, B, H) -> (B, H, T, 1) in float32 (float64 for float64)."""
    return at_least_float32(x).permute(1, 2, 0)[..., None]
