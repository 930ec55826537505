"""What fast weights do in training, as fairseq metrics; and what they name of a value that is not finite (``finite``).

    attach_stats(model, interval=100)

From then on every forward pass of a ``FastWeightAttention`` hands its tensors to the ``LayerStats`` attached to it.
The numbers go into whatever fairseq is aggregating (train_inner, train, valid); results do not change.
"""

import logging
import re
from typing import Dict, Optional, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from ..errors import FastWeightError
from .fast_weight_attention import FastWeightAttention
from .finite import Instrument, Trace, Watch

logger = logging.getLogger(__name__)

RANK_ROWS = 4  # rows of a batch whose singular values are computed: they are the expensive part
AFTER_FAIRSEQ = 2000  # priority in the log: fairseq's own metrics come first
SITE_NAMES = {
    "decoder": "decoder layer {} self-attention",
    "encoder": "encoder layer {} self-attention",
    "cross": "decoder layer {} cross-attention",
}

Number = Tuple[Tensor, int]  # a scalar, and the tokens or rows that it is the mean over


class LayerStats(Instrument):
    """The instruments of one attention.

    Args:
        name: of the attention in its model; layer, site: see ``layer_of`` and ``site_of``.
        prefix: of its metrics.
        interval: training updates between measurements; in evaluation every batch is measured.
        trace: that the instruments of a model share.
    """

    def __init__(self, name: str, layer: int, site: str, prefix: str, interval: int, trace: Trace):
        super().__init__(trace)
        self.layer_name = f"{SITE_NAMES[site].format(layer)} ({name})"
        self.prefix = prefix
        self.interval = interval
        self.seen: Dict[str, Optional[Tensor]] = {}

    def see(self, **tensors: Optional[Tensor]) -> None:
        """Keep tensors of this forward pass, in the order in which they were computed."""
        self.seen.update(tensors)

    def forget(self) -> None:
        """Drop what was seen (in incremental decoding, which is not measured)."""
        self.seen = {}

    @torch.no_grad()
    def record(
        self, attention: FastWeightAttention, query: Tensor, source: Optional[Tensor], q: Tensor, out: Tensor
    ) -> None:
        """At the end of a forward pass: check what was seen, and measure it if it is time.

        Args:
            attention: that this is attached to.
            query, source: what it was called with; source is None in self-attention.
            q, out: (B, H, T, dk or dv), the features of its queries, and what it hands to its output projection.
        """
        seen = {"input": query, "source": source, "q": q, **self.seen, "out": out}
        self.forget()
        with torch.autocast(out.device.type, enabled=False):
            self.check_finite(seen)
            if not self.training or self.update % self.interval == 0:
                self.log(measure(attention, seen))

    def log(self, numbers: Dict[str, Number]) -> None:
        if not numbers:
            return
        values = torch.stack(
            [value.float() for value, _ in numbers.values()]
        ).tolist()  # one wait for the device
        for (name, (_, weight)), value in zip(numbers.items(), values):
            metrics.log_scalar(f"{self.prefix}_{name}", value, weight, priority=AFTER_FAIRSEQ)

    def check_finite(self, seen: Dict[str, Optional[Tensor]]) -> None:
        """Warn of the first tensor that is not finite, or of the module before this attention that it came from."""
        # a value that is not finite reaches one of these; sums of finite ones can overflow too
        total = seen["out"].sum(dtype=torch.float32) + seen["state"].sum()
        if bool(total.isfinite()):
            return
        where = next((name for name, x in seen.items() if not is_finite(x)), None)
        if where is None:
            return
        earlier = self.trace.first_wrong() if where in ("input", "source") else None
        self.warn(*(earlier or (self.layer_name, where, census(seen[where]))))


def is_finite(x: Optional[Tensor]) -> bool:
    """Whether every number of x is; nothing is finite."""
    return x is None or bool(x.isfinite().all())


def census(x: Tensor) -> str:
    """Such as "inf in 2, nan in 12 of 4096 numbers"."""
    counts = {"inf": int(x.isinf().sum()), "nan": int(x.isnan().sum())}
    return ", ".join(f"{kind} in {n}" for kind, n in counts.items() if n) + f" of {x.numel()} numbers"


def measure(attention: FastWeightAttention, seen: Dict[str, Optional[Tensor]]) -> Dict[str, Number]:
    """The numbers of one forward pass, means over the tokens that are no padding, or over rows; and over heads.

    Args:
        attention: whose rule and head_dim are used.
        seen: k (B, H, T, dk); gates; padding (B, 1 or H, T) or None; write, log_decay (B, H, T), erase (B, H, T) or
            like k: None as in ``Operands``; z (B, H, dk), the sum of the keys before, or None; state (B, H, dk, >= dv),
            or as a serial rule has it.

    Returns:
        state_norm: Frobenius norm of S after the last token; effective_rank: of S, of the first rows only. For a
        serial rule these two alone.
        write: the write strength w; erased, erased_max: e . k, see ``erased_share``; decay: a; kappa, kappa_min:
        z . k before each write. Those that the rule does not have are missing.
    """
    k, padding = seen["k"], seen["padding"]
    real = k.new_ones(k.shape[:3], dtype=torch.bool) if padding is None else ~padding.expand(k.shape[:3])
    tokens = int(real[:, 0].sum())
    if tokens == 0:
        return {}
    state = fast_matrix(attention, seen["state"])
    rows = len(state)
    numbers = {
        "state_norm": (state.flatten(2).norm(dim=-1).mean(), rows),
        "effective_rank": (mean_rank(state[:RANK_ROWS]).to(state.device), rows),
    }
    if attention.serial:
        return numbers
    if seen["write"] is not None:
        numbers["write"] = (seen["write"][real].mean(), tokens)
    if seen["erase"] is not None:
        erased = erased_share(seen["erase"], k)[real]
        numbers["erased"] = (erased.mean(), tokens)
        numbers["erased_max"] = (erased.max(), tokens)
    if seen["log_decay"] is not None:
        numbers["decay"] = (seen["log_decay"][real].exp().mean(), tokens)
    if attention.sum_beside_state:
        kappa = attention.rule.kappa(k, seen["z"])[0][real]
        numbers["kappa"] = (kappa.mean(), tokens)
        numbers["kappa_min"] = (kappa.min(), tokens)
    return numbers


def fast_matrix(attention: FastWeightAttention, state: Tensor) -> Tensor:
    """S (B, H, dk, dv) in the state as the attention keeps it; of a serial rule the first part, (B, H, ..., dk, dv)."""
    if attention.serial:
        features = state.new_empty(0, 0, 0, attention.feature_map.output_dim)  # as keys have
        return attention.rule.unpack(state, features)[0]
    return state[..., : attention.head_dim]  # without the column that is z


def mean_rank(state: Tensor) -> Tensor:
    """Mean effective rank of matrices (..., dk, dv); NaN if they are not finite. On the CPU, which is faster at it."""
    state = state.cpu()
    if not bool(state.isfinite().all()):
        return torch.tensor(float("nan"))
    return effective_rank(torch.linalg.svdvals(state)).mean()


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of the singular values (..., n) over their sum (Roy and Vetterli 2007); 0 for a zero matrix.

    n equal singular values have effective rank n, however small they are.
    """
    total = singular_values.sum(-1)
    shares = ratio(singular_values, total[..., None])
    return torch.special.entr(shares).sum(-1).exp() * (total > 0)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, torch.ones_like(whole)), 0.0)


def erased_share(erase: Tensor, k: Tensor) -> Tensor:
    """e . k (B, H, T): how much of what k (B, H, T, dk) would have read is gone after the write.

    1 erases it all, 2 turns its sign; beta |k|^2 for the delta rules. erase as k, or (B, H, T) times k.
    """
    if erase.dim() < k.dim():
        return erase * (k * k).sum(-1)
    return (erase * k).sum(-1)


def site_of(attention: FastWeightAttention) -> str:
    """decoder, encoder or cross."""
    if attention.encoder_decoder_attention:
        return "cross"
    return "decoder" if attention.causal else "encoder"


def layer_of(name: str) -> int:
    """The number of the layer in the name of a module, such as decoder.layers.3.self_attn; 0 if it has none."""
    number = re.search(r"layers\.(\d+)\.", name)
    return int(number[1]) if number else 0


def attach_stats(model: nn.Module, interval: int) -> None:
    """Measure every fast-weight attention of ``model`` each ``interval`` training updates; 0: do nothing.

    Metrics are named fw_LAYER_NUMBER, or fw_SITE_LAYER_NUMBER if the model has fast weights at several sites.

    Raises:
        FastWeightError (a ValueError): interval is not an int of at least 0.
    """
    if not isinstance(interval, int) or interval < 0:
        raise FastWeightError(
            f"fast_weight_stats must be a number of updates, or 0 for off, got {interval!r}"
        )
    if interval == 0:
        return
    found = [(name, x) for name, x in model.named_modules() if isinstance(x, FastWeightAttention)]
    if not found:
        logger.info("fast_weight_stats has no effect: the model has no fast-weight attention")
        return
    several = len({site_of(attention) for _, attention in found}) > 1
    trace = Trace()
    for name, attention in found:
        layer, site = layer_of(name), site_of(attention)
        prefix = f"fw_{site}_{layer}" if several else f"fw_{layer}"
        attention.stats = LayerStats(name, layer, site, prefix, interval, trace)
    model.finite_watch = Watch(model, trace)
