"""Update rules that are no row of the recurrence's table: one fast matrix feeds another, or its own past.

They are the recurrent fast weight programmers of Irie, Schlag, Csordas and Schmidhuber (2021), arXiv 2106.06295, in the
variants named in the authors' code. Per head, with the delta rule

    W_t = W_{t-1} + beta_t k_t (v_t - W_{t-1}^T k_t)^T;  y_t = W_t^T q_t        written  y = delta(q, k, v, beta)

| rule                | serial in | formula                                                                    |
|---------------------|-----------|----------------------------------------------------------------------------|
| delta-rnn           | time      | h_t = W_t^T q_t + R_t^T softmax(h_{t-1})                                     |
| delta-lstm          | time      | c_t = i u + (1 - i) c_{t-1}, h_t = o c_t, each of i, u, o made like h above    |
| recurrent-delta-net | time      | delta(q, k, v, beta), all four seeing tanh(y_{t-1})                         |
| delta-mlp           | depth     | q + delta(phi(delta(phi(LN(q)), ...)), ...)                                  |
| delta-delta-net     | depth     | delta(delta(q, k, [v_q, v_k, v, v_beta], beta))                              |

Serial in time is a loop over the tokens, forward and backward. Serial in depth is one scan of the delta rule after
another, each parallel in time like any other. What a rule projects beside q, k and v has no biases, as in the authors'
code. Works without fairseq.
"""

import math
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import FastWeightError
from .feature_maps import at_least_float32
from .ops.chunked import no_autocast
from .ops.serial import LstmCell, RnnCell, Scan, recurrent_reads, recurrent_writes
from .rule_base import UpdateRule


class SerialRule(UpdateRule):
    """A rule with a ``scan`` of its own in place of ``forward``; causal self-attention only.

    Attributes:
        feature_maps: the maps that the rule's formula allows; None for all.
        key_normalizations: likewise.
        scales: whether what is read is multiplied by head_dim^-1/2, as the authors' code does for the rule.
    """

    serial = True
    default_key_normalization = "sum"
    default_attention_normalization = False
    feature_maps: Optional[Sequence[str]] = None
    key_normalizations: Optional[Sequence[str]] = None
    scales = True

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        if normalized:
            raise FastWeightError(
                f"update rule {name_of(type(self))} has no attention-normalised form: use attention_normalization false"
            )
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.head_dim = embed_dim // num_heads
        self.proj = nn.Linear(embed_dim, num_heads * sum(self.widths()), bias=False)

    @classmethod
    def check_use(cls, causal: bool, feature_map: str, key_normalization: str) -> None:
        """Raise FastWeightError where the rule has no meaning, or its formula asks for another map."""
        name = name_of(cls)
        if not causal:
            raise FastWeightError(
                f"update rule {name} is for causal self-attention only (--update-rule): the encoder and "
                "cross-attention need one of the others"
            )
        if cls.feature_maps is not None and feature_map not in cls.feature_maps:
            raise FastWeightError(
                f"update rule {name} needs feature_map {' or '.join(cls.feature_maps)} (--feature-map), which is in "
                f"its formula, got {feature_map!r}"
            )
        if cls.key_normalizations is not None and key_normalization not in cls.key_normalizations:
            raise FastWeightError(
                f"update rule {name} needs key_normalization auto or {' or '.join(cls.key_normalizations)}, got "
                f"{key_normalization!r}"
            )

    def widths(self) -> List[int]:
        """Of the parts of ``gates``, per head."""
        raise NotImplementedError

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        """Of the parts of the state, per head; ``dk`` is the number of features of a key."""
        raise NotImplementedError

    def gates(self, x: Tensor) -> Tensor:
        """x (T, B, embed_dim) -> (B, H, T, sum of widths) in float32: all that the rule needs beside q, k and v."""
        x = at_least_float32(self.proj(x))
        return x.view(*x.shape[:2], self.num_heads, sum(self.widths())).permute(1, 2, 0, 3)

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        padding: Optional[Tensor],
        state: Optional[Tensor],
        phi: Callable[[Tensor], Tensor],
        delta: Scan,
    ) -> Tuple[Tensor, Tensor]:
        """Write and read all tokens. A padding token leaves the whole state as it is, and its output is finite.

        Args:
            q, k, v: (B, H, T, head_dim), projected and without a feature map; gates as returned by ``gates``.
            padding: (B, 1, T), true at pads, or None.
            state: all that is carried from token to token, (B, H, numbers): the parts of ``state_shapes`` laid flat
                one behind another, matrices as (features, outputs); float32 (float64 for float64). None for zeros.
            phi: (..., n) -> features, normalised.
            delta: the delta rule's scan: q, k (B, H, T, dk), v (B, H, T, dv), beta (B, H, T), state -> (out, state).

        Returns:
            (out (B, H, T, head_dim), the state after the last token).
        """
        q, k, v, gates = (at_least_float32(x) for x in (q, k, v, gates))
        with no_autocast(q.device.type):
            parts = gates.split(self.widths(), dim=-1)
            out, *after = self.write_and_read(q, k, v, parts, padding, state, phi, delta)
            state = torch.cat([x.flatten(2) for x in after], dim=-1)
            return out * self.head_dim**-0.5 if self.scales else out, state

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta) -> Tuple[Tensor, ...]:
        """As ``scan``, in float32 at least, with the parts of gates; returns out and the parts of the state."""
        raise NotImplementedError

    def unpack(self, state: Optional[Tensor], k: Tensor) -> List[Tensor]:
        """The parts of the state, for keys k (B, H, T, dk); zeros for None."""
        shapes = self.state_shapes(k.shape[-1])
        if state is None:
            state = k.new_zeros(*k.shape[:2], sum(map(math.prod, shapes)))
        parts = state.split([math.prod(shape) for shape in shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes)]

    def forward(self, k: Tensor, gates: Tensor, z: Optional[Tensor]):
        raise NotImplementedError("a serial rule is no row of the recurrence: use scan")

    def __prepare_scriptable__(self):
        raise FastWeightError(
            f"update rule {name_of(type(self))} is serial and cannot be compiled by TorchScript: use the model as it is"
        )


def name_of(kind: type) -> str:
    """delta-rnn for DeltaRnn."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("-")


def without_pads(k: Tensor, padding: Optional[Tensor]) -> Tensor:
    """Keys (B, H, T, dk), zero at pads, where they write nothing."""
    return k if padding is None else k.masked_fill(padding[..., None], 0.0)


class DeltaRnn(SerialRule):
    """Delta RNN, version 2 of the authors' code (attention type 134, their main one).

        h_t = W_t^T q_t + R_t^T softmax(h_{t-1});  o_t = head_dim^-1/2 h_t

    W is written by (k, v, beta), R by (softmax(k^R), v^R, beta^R), both by the delta rule and before they are read;
    q = phi(q), k = phi(k), ELU+1 and sum-normalised. h_0 = 0, so the first recurrent query is uniform. The authors'
    softmax of h has 1e-6 in its denominator, which is at least 1; this one has not. State: W (dk, d), R (d, d), h (d).
    """

    def widths(self) -> List[int]:
        d = self.head_dim
        return [d, d, 1, 1]  # k^R, v^R, beta, beta^R

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        d = self.head_dim
        return [(dk, d), (d, d), (d,)]

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta):
        k_r, v_r, beta, beta_r = parts
        q, k = phi(q), without_pads(phi(k), padding)
        k_r = without_pads(k_r.softmax(-1), padding)
        w, r, h = self.unpack(state, k)
        z, w = delta(q, k, v, beta[..., 0].sigmoid(), w)
        one = (x[:, :, None] for x in (z, k_r, v_r, beta_r[..., 0].sigmoid(), r))  # matrix a head
        out, r, h, _ = recurrent_reads(RnnCell, *one, h, torch.zeros_like(h), padding, delta)
        return out, w, r, h


class DeltaLstm(SerialRule):
    """Delta LSTM, version 4 of the authors' code (attention type 254, their main one).

        p^g_t = W^g_t^T q^g_t + R^g_t^T softmax(h_{t-1})                for g = i, u, o
        i = sigmoid(p^i), u = p^u, o = sigmoid(p^o)
        c_t = i u + (1 - i) c_{t-1};  h_t = o c_t;  o_t = head_dim^-1/2 h_t

    Each g has a W and an R of its own, written as in ``DeltaRnn``. q, k and v of u are the attention's; those of i and
    o are projected here. c_0 = h_0 = 0. State: W (i, u, o; dk, d), R (i, u, o; d, d), h (d), c (d).
    """

    def widths(self) -> List[int]:
        d = self.head_dim
        # q, k and v of i and o; k^R, v^R, beta and beta^R of i, u and o
        return [2 * d] * 3 + [3 * d] * 2 + [3] * 2

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        d = self.head_dim
        return [(3, dk, d), (3, d, d), (d,), (d,)]

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta):
        # all with the gates i, u, o as dimension 2
        q, k, v = (self.with_gates(x, part) for x, part in zip((q, k, v), parts))
        k_r, v_r = (x.unflatten(-1, (3, -1)).movedim(3, 2) for x in parts[3:5])
        beta, beta_r = (x.sigmoid().movedim(3, 2) for x in parts[5:])
        pads = None if padding is None else padding[:, None]
        q, k, k_r = phi(q), without_pads(phi(k), pads), without_pads(k_r.softmax(-1), pads)
        w, r, h, c = self.unpack(state, k)
        z, w_end = delta(*(x.flatten(1, 2) for x in (q, k, v, beta, w)))
        out, r, h, c = recurrent_reads(LstmCell, z.view_as(v), k_r, v_r, beta_r, r, h, c, padding, delta)
        return out, w_end.view_as(w), r, h, c

    def with_gates(self, u: Tensor, others: Tensor) -> Tensor:
        """u (B, H, T, d) and those of i and o side by side -> (B, H, 3, T, d)."""
        i, o = others.chunk(2, dim=-1)
        return torch.stack([i, u, o], dim=2)


class RecurrentDeltaNet(SerialRule):
    """Recurrent Delta Net (attention type 934 of the authors' code).

        k_t = softmax(W_k x_t + R_k tanh(y_{t-1})), q_t likewise, v_t = W_v x_t + R_v tanh(y_{t-1})
        beta_t = sigmoid(W_beta x_t + r_beta . tanh(y_{t-1}));  y_t = delta(q, k, v, beta)_t;  o_t = head_dim^-1/2 y_t

    ``recurrent`` (H, d, 3 d + 1) holds R_q, R_k, R_v and r_beta side by side, for row vectors; they begin as N(0, 1/d).
    The softmax is the rule's, so the feature map must be softmax, whose features need no normalisation. y_0 = 0.
    State: W (d, d), y (d).
    """

    default_key_normalization = "none"
    feature_maps = ("softmax",)
    key_normalizations = ("none", "sum")  # the sum is 1

    def __init__(self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False):
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        d = self.head_dim
        self.recurrent = nn.Parameter(torch.randn(num_heads, d, 3 * d + 1) * d**-0.5)

    def widths(self) -> List[int]:
        return [1]  # beta

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        return [(dk, self.head_dim), (self.head_dim,)]

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta):
        w, y = self.unpack(state, k)
        x = torch.cat([q, k, v, parts[0]], dim=-1)
        return recurrent_writes(x, self.recurrent.to(x.dtype), w, y, padding)


class DeltaMlp(SerialRule):
    """Delta MLP (attention type 54 of the authors' code): a fast feed-forward network of ``depth`` blocks.

        q <- q + W2^T phi(W1^T phi(LN(q)))      a block, W1 (d, 4 d) and W2 (4 d, d) written by (phi(k), v, beta) each

    phi is ELU+1, sum-normalised. LN is slow: a LayerNorm(head_dim) of its own for every block, shared by the heads.
    What is read is not scaled. The first block's key of W1 and value of W2 are the attention's k and v; the rest, and
    all of the later blocks, are projected here. The authors add 1e-5 to the sums of features; these are divided as
    they are. State: W1, W2 of every block.
    """

    scales = False
    feature_maps = ("elu",)

    def __init__(
        self, embed_dim: int, num_heads: int, normalized: bool, kappa_clamp: bool = False, depth: int = 1
    ):
        if not isinstance(depth, int) or depth < 1:
            raise FastWeightError(f"delta_mlp_depth must be an int of at least 1, got {depth!r}")
        self.depth = depth
        super().__init__(embed_dim, num_heads, normalized, kappa_clamp)
        self.layer_norms = nn.ModuleList(nn.LayerNorm(self.head_dim) for _ in range(depth))

    def widths(self) -> List[int]:
        d = self.head_dim
        # v1, k2, beta1, beta2 of the first block; k1, v2 too of each later one
        return [4 * d, 4 * d, 1, 1] + [4 * d, 4 * d, 1, 1, d, d] * (self.depth - 1)

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        d = self.head_dim
        return [(d, 4 * d), (4 * d, d)] * self.depth

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta):
        before, after = self.unpack(state, k), []
        parts = [*parts[:4], k, v, *parts[4:]]
        for n, norm in enumerate(self.layer_norms):
            v1, k2, beta1, beta2, k1, v2 = parts[6 * n : 6 * n + 6]
            w1, w2 = before[2 * n : 2 * n + 2]
            k1, k2 = (without_pads(phi(x), padding) for x in (k1, k2))
            weight, bias = (x.to(q.dtype) for x in (norm.weight, norm.bias))
            hidden = phi(F.layer_norm(q, (self.head_dim,), weight, bias, norm.eps))
            hidden, w1 = delta(hidden, k1, v1, beta1[..., 0].sigmoid(), w1)
            read, w2 = delta(phi(hidden), k2, v2, beta2[..., 0].sigmoid(), w2)
            q = q + read
            after += [w1, w2]
        return q, *after


class DeltaDeltaNet(SerialRule):
    """Delta Delta Net (attention type 64 of the authors' code, without its slow base weights).

        [q', k', v', b']_t = delta(phi(q), phi(k), [v_q, v_k, v, v_beta], beta)_t
        o_t = delta(phi(q'), phi(k'), v', sigmoid(b'))_t

    phi is ELU+1, sum-normalised, unless the flags say otherwise; the authors add 1e-5 to the sums, and here they are
    divided as they are. What is read is not scaled. v is the attention's; v_q, v_k and v_beta are projected here.
    State: the outer matrix (dk, 3 d + 1), the inner one (dk, d).
    """

    scales = False

    def widths(self) -> List[int]:
        d = self.head_dim
        return [d, d, 1, 1]  # v_q, v_k, v_beta, beta

    def state_shapes(self, dk: int) -> List[Tuple[int, ...]]:
        d = self.head_dim
        return [(dk, 3 * d + 1), (dk, d)]

    def write_and_read(self, q, k, v, parts, padding, state, phi, delta):
        v_q, v_k, v_beta, beta = parts
        q, k = phi(q), without_pads(phi(k), padding)
        outer, inner = self.unpack(state, k)
        fast, outer = delta(q, k, torch.cat([v_q, v_k, v, v_beta], dim=-1), beta[..., 0].sigmoid(), outer)
        q, k, v, beta = fast.split([self.head_dim] * 3 + [1], dim=-1)
        out, inner = delta(phi(q), without_pads(phi(k), padding), v, beta[..., 0].sigmoid(), inner)
        return out, outer, inner
