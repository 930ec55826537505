"""Update rules: how a token's key and gates become the operands of the one recurrence in ``ops``.

    r_t = w_t v_t - a_t S_{t-1}^T e_t ;  S_t = a_t S_{t-1} + k_t r_t^T ;  o_t = S_t^T q_t

| rule           | erase e            | write w | decay a            |
|----------------|--------------------|---------|--------------------|
| sum            | 0                  | 1       | 1                  |
| delta          | beta k             | beta    | 1                  |
| delta, attention-normalised | (beta / kappa) k | beta | 1        |
| gated-sum      | 0                  | 1       | learned, in (0, 1] |
| gated-delta    | beta k             | beta    | learned, in (0, 1] |
| gated-sum-peng | 0                  | beta    | 1 - beta           |

with kappa_t = z_{t-1} . k_t and z the sum of the keys so far. Rules that are no row of it are in ``serial_rules``.
A new rule is one class and one line in ``UPDATE_RULES``. Works without fairseq.
"""

from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import FastWeightError
from .feature_maps import at_least_float32
from .rule_base import Operands, UpdateRule, heads_first
from .serial_rules import DeltaDeltaNet, DeltaLstm, DeltaMlp, DeltaRnn, RecurrentDeltaNet


class SumRule(UpdateRule):
    """W(i) = W(i-1) + v(i) k(i)^T, the paper's eq. 17; normalised: eq. 18 and 19."""

    order_matters = False

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        return None, None, None, None


class DeltaRule(UpdateRule):
    """W(i) = W(i-1) + beta (v - W(i-1) k) k^T, the paper's eq. 20 to 25; attention-normalised: eq. 26 to 28.

    beta = sigmoid of one bias-free linear output per head. ``kappa_clamp`` keeps beta |k|^2 / kappa <= 2,
    without which the normalised rule is no contraction while z is small.
    """

    carries_sum = True
    default_key_normalization = "sum"
    default_attention_normalization = False

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.beta_proj = nn.Linear(embed_dim, num_heads, bias=False)

    def gates(self, x: Tensor) -> Tensor:
        return heads_first(self.beta_proj(x)).sigmoid()

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        beta = gates[..., 0].to(k.dtype)  # (B, H, T)
        strength = beta
        sums: Optional[Tensor] = None
        if self.normalized:
            kappa, sums = self.kappa(k, z)
            if self.kappa_clamp:
                kappa = torch.maximum(kappa, beta * (k * k).sum(-1) / 2)
            strength = beta / (kappa + self.eps)
        return beta, strength, None, sums

    def kappa(self, k: Tensor, z: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """kappa_t = z_{t-1} . k_t (B, H, T), 1 while nothing was written; and z_t (B, H, T, dk)."""
        if z is None:
            z = k.new_zeros(k.shape[0], k.shape[1], k.shape[3])
        sums = torch.cat([z[:, :, None], k], dim=2).cumsum(2)  # (B, H, T + 1, dk)
        before = sums[:, :, :-1]
        kappa = (before * k).sum(-1)
        return torch.where((before == 0).all(-1), torch.ones_like(kappa), kappa), sums[:, :, 1:]


class Decay(nn.Module):
    """log a = -exp(A_h) softplus(W_a x + b_h), one scalar a head and token.

    A_h starts at 0 and b_h so that the heads begin with memories of about 10 to 1000 tokens.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.proj = nn.Linear(embed_dim, num_heads)
        self.log_rate = nn.Parameter(torch.zeros(num_heads))  # A_h
        rates = torch.logspace(-1, -3, num_heads)
        with torch.no_grad():
            self.proj.weight.mul_(0.1)
            self.proj.bias.copy_(rates.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        return -at_least_float32(self.log_rate).exp()[:, None, None] * F.softplus(heads_first(self.proj(x)))


class GatedSumRule(UpdateRule):
    """S_t = a_t S_{t-1} + k_t v_t^T with a learned decay; its normaliser z decays alike."""

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.decay = Decay(embed_dim, num_heads)

    def gates(self, x: Tensor) -> Tensor:
        return self.decay(x)

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        return None, None, gates[..., 0].to(k.dtype), None


class GatedDeltaRule(DeltaRule):
    """S_t = a_t S_{t-1} + beta k (v - a_t S_{t-1}^T k)^T: the delta rule with a learned decay (Yang et al. 2025)."""

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        if normalized:
            raise FastWeightError(
                "update rule gated-delta has no attention-normalised form (its normaliser would have to be "
                "divided by the decay): use attention_normalization false"
            )
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.decay = Decay(embed_dim, num_heads)

    def gates(self, x: Tensor) -> Tensor:
        return torch.cat([heads_first(self.beta_proj(x)).sigmoid(), self.decay(x)], dim=-1)

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        beta = gates[..., 0].to(k.dtype)
        return beta, beta, gates[..., 1].to(k.dtype), None


class PengRule(UpdateRule):
    """W(i) = (1 - beta) W(i-1) + beta v k^T (Peng et al. 2021; the paper's appendix B)."""

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.beta_proj = nn.Linear(embed_dim, num_heads, bias=False)

    def gates(self, x: Tensor) -> Tensor:
        logit = heads_first(self.beta_proj(x))
        return torch.cat([logit.sigmoid(), F.logsigmoid(-logit)], dim=-1)  # beta, log(1 - beta)

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]) -> Operands:
        return gates[..., 0].to(k.dtype), None, gates[..., 1].to(k.dtype), None


UPDATE_RULES: Dict[str, Callable[..., UpdateRule]] = {
    "sum": SumRule,
    "delta": DeltaRule,
    "gated-sum": GatedSumRule,
    "gated-delta": GatedDeltaRule,
    "gated-sum-peng": PengRule,
    "delta-rnn": DeltaRnn,
    "delta-lstm": DeltaLstm,
    "recurrent-delta-net": RecurrentDeltaNet,
    "delta-mlp": DeltaMlp,
    "delta-delta-net": DeltaDeltaNet,
}


def rule_class(name: str) -> Callable[..., UpdateRule]:
    """The class of rule ``name``; FastWeightError (a ValueError) if there is none."""
    if name not in UPDATE_RULES:
        raise FastWeightError(
            f"update rule must be one of {', '.join(UPDATE_RULES)} (or, as a flag of the models, softmax: "
            f"fairseq's own attention), got {name!r}"
        )
    return UPDATE_RULES[name]


def build_update_rule(
    name: str, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False, **options
) -> UpdateRule:
    """The rule ``name`` for ``num_heads`` heads that read their gates from ``embed_dim`` inputs.

    ``options`` are the rule's own: depth of delta-mlp.
    """
    return rule_class(name)(embed_dim, num_heads, normalized, kappa_clamp, **options)
