"""What a model's fast-weight heads write, erase and read, recorded in one forward pass.

    with recording(model.double()) as recordings:
        model(tokens)
    recordings[0].weights  # (B, H, T, S)

The modules are left as they are: forward hooks see what goes in and what comes out, and the operands are computed
once more by the modules' own methods.
"""

import contextlib
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Iterator, List, Optional

import torch
from torch import Tensor, nn

from ..errors import FastWeightError
from ..modules import FastWeightAttention
from ..modules.fast_weight_attention import alternate_heads
from ..modules.stats import erased_share, layer_of, site_of
from ..ops.chunked import erase_keys
from ..ops.reference import recurrence_step, reference_scan
from ..update_rules import UPDATE_RULES

SITES = ("decoder", "encoder", "cross")


@dataclass
class Recording:
    """The operands of one attention for one forward pass, in float64, with the source's tokens S in order of writing.

    Attributes:
        name: of the module in the model; layer: the number in it; site: decoder, encoder or cross.
        rule: its update rule.
        causal: whether every token is read right after it was written (T = S), or all after the last write.
        alternates: whether odd heads write from right to left.
        normalized, scale, eps: o = scale S^T q, or scale S^T q / (z . q + eps) if normalized. Where it is not,
            q holds the scale already and ``scale`` is 1.
        q (B, H, T, dk), k (B, H, S, dk), v (B, H, S, dv): queries, keys (after the feature map) and values.
        write (B, H, S), erase (B, H, S, dk), log_decay (B, H, S): None for 1, 0 and 0.
        z: (B, H, S, dk), the sum of the keys after every write, or None where it follows from S.
        read: (B, H, T, dv), what the module itself handed to its output projection.
    """

    name: str
    layer: int
    site: str
    rule: str
    causal: bool
    alternates: bool
    normalized: bool
    scale: float
    eps: float
    q: Tensor
    k: Tensor
    v: Tensor
    write: Optional[Tensor]
    erase: Optional[Tensor]
    log_decay: Optional[Tensor]
    z: Optional[Tensor]
    read: Tensor

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    def in_text_order(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) from the order of writing to that of the text."""
        return alternate_heads(x) if self.alternates else x

    def right_to_left(self, head: int) -> bool:
        """Whether ``head`` writes the last token first."""
        return self.alternates and head % 2 == 1

    @cached_property
    def weights(self) -> Tensor:
        """The implied attention map (B, H, T, S), S in the order of the text: read_t = sum over s of weights_ts v_s.

        The recurrence is linear in the values: with one-hot values, what is read is the row of weights. A weight
        can be negative, and a row need not sum to 1.
        """
        tokens = self.k.shape[2]
        one_hot = torch.eye(tokens, dtype=self.k.dtype).expand(*self.k.shape[:2], tokens, tokens)
        writes = (self.k, one_hot, self.write, self.erase, self.log_decay, None)
        if self.causal:
            weights, _ = reference_scan(self.q, *writes)
        else:
            _, state = reference_scan(None, *writes)
            weights = self.q @ state
        weights = self.scale * weights
        if self.normalized:
            weights = weights / (self.normalizer(weights) + self.eps)
        return self.in_text_order(weights.transpose(2, 3)).transpose(2, 3)

    def normalizer(self, weights: Tensor) -> Tensor:
        """z . q (B, H, T, 1), given the weights before the division."""
        if self.z is None:  # z is what S is for values that are all 1
            return weights.sum(-1, keepdim=True) / self.scale
        z = self.z if self.causal else self.z[:, :, -1:]
        return (self.q * z).sum(-1, keepdim=True)

    def error(self) -> float:
        """How far weights times values are from what the module read, over the largest number that it read."""
        again = self.weights @ self.in_text_order(self.v)
        largest = self.read.abs().max().clamp_min(torch.finfo(self.read.dtype).tiny)
        return float((again - self.read).abs().max() / largest)

    @cached_property
    def singular_values(self) -> Tensor:
        """Of S after every write (B, H, S, min(dk, dv)), largest first, each at the place of the token written."""
        state = self.k.new_zeros(*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        spectra = []
        for t in range(self.k.shape[2]):
            gates = (None if x is None else x[:, :, t] for x in (self.write, self.erase, self.log_decay))
            state = recurrence_step(self.k[:, :, t], self.v[:, :, t], *gates, state)
            spectra.append(torch.linalg.svdvals(state))
        return self.in_text_order(torch.stack(spectra, dim=2))

    @property
    def final_singular_values(self) -> Tensor:
        """Of S after the last write (B, H, min(dk, dv))."""
        return self.in_text_order(self.singular_values)[:, :, -1]

    @property
    def write_strength(self) -> Optional[Tensor]:
        """w (B, H, S), beta for the delta rules; None where every token is written with strength 1."""
        return None if self.write is None else self.in_text_order(self.write)

    @property
    def erased_share(self) -> Optional[Tensor]:
        """e . k (B, H, S), as the function of this name; None where nothing is erased."""
        return None if self.erase is None else self.in_text_order(erased_share(self.erase, self.k))

    @property
    def decay(self) -> Optional[Tensor]:
        """a (B, H, S), what is kept of S before a write; None where that is all of it."""
        return None if self.log_decay is None else self.in_text_order(self.log_decay.exp())


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[List[Recording]]:
    """Record every FastWeightAttention of ``model`` in every forward pass within the block, in the order of use.

    The weights are exact for a model in float64; for another they are those of its rounded operands.

    Raises:
        FastWeightError (a ValueError): a rule of the model is serial, or a forward pass has padding or an incremental
            state.
    """
    recordings: List[Recording] = []
    hooks = []
    for name, attention in model.named_modules():
        if isinstance(attention, FastWeightAttention):
            if attention.serial:
                raise FastWeightError(
                    f"{name} has the serial update rule {rule_name(attention)}, which is not linear in what it writes: "
                    "there is no map of weights to show"
                )
            hooks += _watch(name, attention, recordings)
    try:
        yield recordings
    finally:
        for hook in hooks:
            hook.remove()


def _watch(name: str, attention: FastWeightAttention, recordings: List[Recording]) -> list:
    """The hooks that append to ``recordings`` what ``attention`` does."""
    read: List[Tensor] = []
    parameters = inspect.signature(attention.forward)

    def after(_, args, kwargs, output):
        call = parameters.bind(*args, **kwargs).arguments
        _check_call(name, call)
        recordings.append(_record(name, attention, call["query"], call["key"], call["value"], read.pop()))

    return [
        attention.out_proj.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        attention.register_forward_hook(after, with_kwargs=True),
    ]


def _check_call(name: str, call: dict) -> None:
    padding = call.get("key_padding_mask")
    if padding is not None and padding.any():
        raise FastWeightError(
            f"{name} got padding: record sentences of one length, or one sentence at a time"
        )
    if call.get("incremental_state") is not None:
        raise FastWeightError(f"{name} got an incremental state: record whole sentences, not decoding steps")


@torch.no_grad()
def _record(name, attention: FastWeightAttention, query, key, value, read) -> Recording:
    """As ``FastWeightAttention.forward`` and ``_write_whole`` prepare the scan."""
    q = attention._address(attention.q_proj(query), 1.0 if attention.normalized else attention.scaling)
    source = (key, value) if attention.encoder_decoder_attention else (query, query)
    k, v, gates = attention._operands(*source, None)
    alternates = attention.order_matters and not attention.causal
    if alternates:
        k, v, gates = alternate_heads(k), alternate_heads(v), alternate_heads(gates)
    write, erase, log_decay, z = attention._rule_operands(k, gates, None, None)
    return Recording(
        name=name,
        layer=layer_of(name),
        site=site_of(attention),
        rule=rule_name(attention),
        causal=attention.causal,
        alternates=alternates,
        normalized=attention.normalized,
        scale=attention.scaling if attention.normalized else 1.0,
        eps=attention.eps,
        q=_exact(q),
        k=_exact(k),
        v=_exact(v[..., : attention.head_dim]),  # not the column of ones whose S is z
        write=_exact(write),
        erase=_exact(erase_keys(erase, k)),
        log_decay=_exact(log_decay),
        z=_exact(z),
        read=_exact(attention._heads(read)),
    )


def _exact(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.detach().cpu().double()


def rule_name(attention: FastWeightAttention) -> str:
    """The rule's name in ``UPDATE_RULES``."""
    kind = type(attention.rule)
    return next((name for name, rule in UPDATE_RULES.items() if rule is kind), kind.__name__)
