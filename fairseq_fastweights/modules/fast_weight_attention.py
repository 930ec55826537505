"""Multi-head attention whose heads are fast weights, behind the call contract of fairseq's MultiheadAttention."""

import math
from typing import Dict, Optional, Tuple

import torch
from fairseq.incremental_decoding_utils import with_incremental_state
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn

from ..errors import FastWeightError
from ..feature_maps import (
    NORMALIZATIONS,
    FeatureMap,
    address,
    at_least_float32,
    build_feature_map,
    exact_matmul,
    normalize,
    options_of,
)
from ..ops import fast_weight_scan
from ..ops.checks import check_chunk_size
from ..ops.chunked import scriptable_scan
from ..ops.decode import step
from ..ops.dispatch import check_backend, decoding_state
from ..rule_base import ATTENTION_EPS, Operands
from ..update_rules import build_update_rule, rule_class

IncrementalState = Optional[Dict[str, Dict[str, Optional[Tensor]]]]


@with_incremental_state
class FastWeightAttention(nn.Module):
    """Attention with a matrix per head instead of a key-value cache, at any of a transformer's three sites.

    * causal self-attention: every token is written, then read (``causal=True``, the default of self-attention);
    * bidirectional self-attention: the whole sentence is written, then every position reads. Where the order of
      writing matters, even heads write from left to right and odd heads from right to left;
    * cross-attention (``encoder_decoder_attention=True``): the source is written like a sentence above, once,
      and read by every target position; decoding keeps the result, one copy for all beams of a sentence.

    With phi the feature map followed by the key normalisation, and S and z as in ``update_rules``:

        o_t = head_dim^-1/2 S^T phi(q_t)                              or, attention-normalised,
        o_t = head_dim^-1/2 S^T phi(q_t) / (z . phi(q_t) + 1e-5)

    Args:
        embed_dim, num_heads, kdim, vdim, dropout, bias, self_attention, encoder_decoder_attention, q_noise,
            qn_block_size: as for fairseq's MultiheadAttention. ``dropout`` is accepted and has no effect: there
            are no attention weights to drop.
        causal: whether self-attention sees the past only.
        update_rule: sum, delta, gated-sum, gated-delta or gated-sum-peng; causal only, serial in time: delta-rnn,
            delta-lstm, recurrent-delta-net; causal only, serial in depth: delta-mlp, delta-delta-net.
        feature_map: elu, relu, dpfp, favor, tanh, identity or softmax.
        key_normalization: of phi(k) and phi(q): sum, l2, none, or auto: what the paper used for the rule
            (sum for delta; none for the sum rules), with l2 in place of sum where features can be negative.
        attention_normalization: true, false, or auto: what the paper used (true for the sum rules).
        kappa_clamp: for the attention-normalised delta rule, bound beta |k|^2 / kappa by 2.
        chunk_size, backend: as for ``ops.fast_weight_scan``.
        options: of the feature map, named MAP_OPTION as the flags are: dpfp_nu, favor_features,
            favor_redraw_interval, favor_stabilizer, favor_scale_input; and of a serial rule, named alike:
            delta_mlp_depth. Those of other maps and rules are ignored.

    Raises:
        FastWeightError (a ValueError): an argument or a combination that makes no sense.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: Optional[int] = None,
        vdim: Optional[int] = None,
        dropout: float = 0.0,
        bias: bool = True,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
        *,
        causal: bool = True,
        update_rule: str = "delta",
        feature_map: str = "elu",
        key_normalization: str = "auto",
        attention_normalization: object = "auto",
        kappa_clamp: bool = False,
        chunk_size: Optional[int] = None,
        backend: str = "auto",
        **options,
    ):
        super().__init__()
        if embed_dim % num_heads != 0:
            raise FastWeightError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
        if self_attention and encoder_decoder_attention:
            raise FastWeightError("self_attention and encoder_decoder_attention exclude each other")
        check_chunk_size(chunk_size)
        check_backend(backend)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.encoder_decoder_attention = encoder_decoder_attention
        self.self_attention = not encoder_decoder_attention
        self.causal = causal and self.self_attention
        self.scaling = self.head_dim**-0.5
        self.chunk_size = chunk_size
        self.backend = backend
        self.eps = ATTENTION_EPS
        self.beam_size = 1

        def projection(inputs: int) -> nn.Module:
            return quant_noise(nn.Linear(inputs, embed_dim, bias=bias), q_noise, qn_block_size)

        self.k_proj = projection(self.kdim)
        self.v_proj = projection(self.vdim)
        self.q_proj = projection(embed_dim)
        self.out_proj = projection(embed_dim)

        self.feature_map = build_feature_map(feature_map, self.head_dim, **options_of(feature_map, options))
        self.key_normalization, self.normalized = choose_normalization(
            update_rule, self.feature_map, key_normalization, attention_normalization
        )
        self.serial = rule_class(update_rule).serial
        rule_options = {}
        if self.serial:
            rule_class(update_rule).check_use(self.causal, feature_map, self.key_normalization)
            rule_options = options_of(update_rule.replace("-", "_"), options)
        self.rule = build_update_rule(
            update_rule, self.kdim, num_heads, self.normalized, kappa_clamp, **rule_options
        )
        # TorchScript sees attributes of the instance only
        self.order_matters = self.rule.order_matters
        self.sum_beside_state = self.normalized and self.rule.carries_sum  # z apart, not a column of S
        self.stats: Optional[nn.Module] = None  # set by stats.attach_stats
        self.stream = None  # a CarriedState while a model reads a segment of streams
        self.reset_parameters()
        self.init_incremental_state()

    def reset_parameters(self) -> None:
        """fairseq's initialisation of attention projections."""
        same = self.kdim == self.embed_dim and self.vdim == self.embed_dim
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2) if same else 1.0)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: IncrementalState = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """query (T, B, embed_dim), key (S, B, kdim), value (S, B, vdim); key_padding_mask (B, S), true at pads.

        Causal attention needs no ``attn_mask`` and ignores the one fairseq passes; with ``incremental_state`` it
        continues from the state kept there. There are no attention weights: the second result is None.
        """
        if not torch.jit.is_scripting():
            self._check_call(query, key, value, attn_mask, before_softmax)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.to(torch.bool)
        q = self._address(self.q_proj(query), 1.0 if self.normalized else self.scaling)  # (B, H, T, dk)
        if self.encoder_decoder_attention:
            out = self._read_source(q, key, value, key_padding_mask, incremental_state)
        elif self.causal:
            out = self._read_past(q, query, key_padding_mask, incremental_state)
        else:
            state, z = self._write_whole(query, query, key_padding_mask)
            out = self._read(q, state, z)
        out = out.to(query.dtype)
        if not torch.jit.is_scripting() and self.stats is not None:
            self._record(query, key, q, out, incremental_state)
        # (B, H, T, d) -> (T, B, C)
        out = out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], self.embed_dim)
        return self.out_proj(out), None

    @torch.jit.unused
    def _check_call(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        attn_mask: Optional[Tensor],
        before_softmax: bool,
    ) -> None:
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise FastWeightError(f"query must have shape (T, B, {self.embed_dim}), got {tuple(query.shape)}")
        if before_softmax:
            raise FastWeightError("before_softmax: fast-weight attention has no softmax")
        if self.self_attention:
            if key is not None and key is not query and key.shape != query.shape:
                raise FastWeightError(
                    f"self-attention needs key and query of one shape, got {tuple(key.shape)} and "
                    f"{tuple(query.shape)} (cross_self_attention is not supported)"
                )
            if attn_mask is not None and not self.causal:
                raise FastWeightError(
                    "attn_mask: bidirectional fast-weight attention writes the whole sentence and knows no mask"
                )

    @torch.jit.unused
    def _record(
        self,
        query: Tensor,
        key: Optional[Tensor],
        q: Tensor,
        out: Tensor,
        incremental_state: IncrementalState,
    ) -> None:
        if incremental_state is not None:
            self.stats.forget()
        else:
            source = key if self.encoder_decoder_attention else None
            self.stats.record(self, query, source, q, out)

    def make_generation_fast_(self, **unused) -> None:
        """Called by fairseq before it generates or evaluates: metrics of training have no reader there."""
        self.stats = None

    def _heads(self, x: Tensor) -> Tensor:
        """(T, B, C) -> (B, H, T, d)."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _address(self, x: Tensor, scale: float) -> Tensor:
        """A projected query or key (T, B, C) -> its normalised features (B, H, T, dk), float32 at least.

        A serial rule gets it as projected, (B, H, T, d): what goes through the feature map is in its formula.
        """
        if self.serial:
            return at_least_float32(self._heads(x))
        if torch.jit.is_scripting():
            return normalize(self.feature_map(self._heads(x)), self.key_normalization, scale)
        else:
            return address(self.feature_map, self._heads(x), self.key_normalization, scale, self.backend)

    def _operands(
        self, key: Tensor, value: Tensor, padding: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """What the tokens write: k (B, H, S, dk), v (B, H, S, dv), gates (B, H, S, gates).

        A padding token has k = 0, so that whatever the rule makes of it, its write is the identity.
        """
        k = self._address(self.k_proj(key), 1.0)
        v = self._heads(self.v_proj(value)).to(k.dtype)
        if padding is not None:
            k = k.masked_fill(padding[:, None, :, None], 0.0)
        if self.normalized and not self.sum_beside_state:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # column dv + 1 of S becomes z
        return k, v, self.rule.gates(key)

    def _scan(
        self,
        q: Optional[Tensor],
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        padding: Optional[Tensor],
        state: Optional[Tensor],
        z: Optional[Tensor],
        need_state: bool,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """Write the tokens, reading after each; padding (B, H or 1, T).

        Returns (out (B, H, T, dv), state, z); out is empty without q.
        """
        if self.serial and q is not None:
            return self._scan_serially(q, k, v, gates, padding, state)
        write, erase, log_decay, sums = self._rule_operands(k, gates, padding, z)
        if not torch.jit.is_scripting() and self.stats is not None:
            need_state = True
            self.stats.see(
                k=k, v=v, gates=gates, padding=padding, write=write, erase=erase, log_decay=log_decay, z=z
            )
        one_token = k.shape[2] == 1 and state is not None and not torch.is_grad_enabled()
        if one_token and q is not None and state is not None:
            read, state = step(
                q[:, :, 0],
                k[:, :, 0],
                v[:, :, 0],
                None if write is None else write[:, :, 0],
                None if erase is None else erase[:, :, 0],
                None if log_decay is None else log_decay[:, :, 0],
                state,
                None,
                state,
            )
            out = read[:, :, None]
        else:
            out, state = self._scan_tokens(q, k, v, write, erase, log_decay, state, need_state)
        if not torch.jit.is_scripting() and self.stats is not None:
            self.stats.see(state=state)
        out, z = self._finish(q, out, sums, need_state, z)
        return out, state, z

    @torch.jit.unused
    def _scan_serially(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        padding: Optional[Tensor],
        state: Optional[Tensor],
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """As ``_scan``, by the rule's own scan; all of its state is in one tensor, without a z."""

        def phi(x: Tensor) -> Tensor:
            return address(self.feature_map, x, self.key_normalization, backend=self.backend)

        def delta(q, k, v, beta, state):
            if q.shape[2] == 1 and not torch.is_grad_enabled():
                rows = (x[:, :, 0] for x in (q, k, v, beta, beta))
                out, state = step(*rows, None, state, None, None)
                return out[:, :, None], state
            options = {"chunk_size": self.chunk_size, "backend": self.backend}
            return fast_weight_scan(q, k, v, write=beta, erase=beta, state=state, **options)

        out, state = self.rule.scan(q, k, v, gates, padding, state, phi, delta)
        if self.stats is not None:
            self.stats.see(k=k, v=v, gates=gates, padding=padding, state=state)
        return out, state, None

    def _rule_operands(
        self, k: Tensor, gates: Tensor, padding: Optional[Tensor], z: Optional[Tensor]
    ) -> Operands:
        write, erase, log_decay, sums = self.rule(k, gates, z)
        if log_decay is not None and padding is not None:
            log_decay = log_decay.masked_fill(padding, 0.0)
        return write, erase, log_decay, sums

    def _finish(
        self, q: Optional[Tensor], out: Tensor, sums: Optional[Tensor], need_state: bool, z: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """What was read, normalised, and z after the tokens."""
        if sums is not None and need_state:
            z = sums[:, :, -1].clone()  # a view would keep the sums of all tokens alive
        if q is not None and self.normalized:
            denominator: Optional[Tensor] = None
            if sums is not None:
                denominator = (q * sums).sum(-1, keepdim=True)
            out = self._divide(out, denominator)
        return out, z

    def _scan_tokens(
        self,
        q: Optional[Tensor],
        k: Tensor,
        v: Tensor,
        write: Optional[Tensor],
        erase: Optional[Tensor],
        log_decay: Optional[Tensor],
        state: Optional[Tensor],
        need_state: bool,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        if torch.jit.is_scripting():
            out, end = scriptable_scan(q, k, v, write, erase, log_decay, state, self.chunk_size)
            return out, torch.jit.annotate(Optional[Tensor], end)
        else:
            read, kept = fast_weight_scan(
                q,
                k,
                v,
                write=write,
                erase=erase,
                log_decay=log_decay,
                state=state,
                return_state=need_state,
                chunk_size=self.chunk_size,
                backend=self.backend,
            )
            return k.new_empty(0) if read is None else read, kept

    def _divide(self, out: Tensor, denominator: Optional[Tensor]) -> Tensor:
        """The read, scaled, over z . q, which is the last column of ``out`` where z is a column of S."""
        if denominator is None:
            denominator = out[..., -1:]
            out = out[..., :-1]
        return out * (self.scaling / (denominator + self.eps))

    def _read_past(
        self, q: Tensor, x: Tensor, padding: Optional[Tensor], incremental_state: IncrementalState
    ) -> Tensor:
        k, v, gates = self._operands(x, x, padding)
        if padding is not None:
            padding = padding[:, None]  # for every head
        state: Optional[Tensor] = None
        z: Optional[Tensor] = None
        if incremental_state is None:
            if torch.jit.is_scripting():
                out, state, z = self._scan(q, k, v, gates, padding, state, z, False)
            else:
                out = self._read_segment(q, k, v, gates, padding)
        elif not torch.jit.is_scripting() and not self.serial and self._keeps_state(k):
            out = self._read_past_kept(q, k, v, gates, padding, incremental_state)
        else:
            saved = self._get_input_buffer(incremental_state)
            if "state" in saved:
                state, z = saved["state"], saved["z"]
            out, state, z = self._scan(q, k, v, gates, padding, state, z, True)
            self._set_input_buffer(incremental_state, {"state": state, "z": z})
        return out

    @torch.jit.unused
    def _read_segment(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, padding: Optional[Tensor]
    ) -> Tensor:
        """A text from its beginning or, where ``stream`` is set, the next segment of every stream."""
        stream = self.stream
        if stream is None:
            return self._scan(q, k, v, gates, padding, None, None, False)[0]
        state, z = (None, None) if stream.start is None else stream.start
        if state is not None and k.shape[2] == 1:
            state = state.clone()  # a single token is written in place
        out, state, z = self._scan(q, k, v, gates, padding, state, z, True)
        stream.finish(state, z)
        return out

    @torch.jit.unused
    def _keeps_state(self, k: Tensor) -> bool:
        """Whether decoding keeps an object that the kernels of this device read, in place of the plain matrices."""
        return not torch.is_grad_enabled() and decoding_state(self.backend, k) is not None

    @torch.jit.unused
    def _read_past_kept(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        padding: Optional[Tensor],
        incremental_state: IncrementalState,
    ) -> Tensor:
        saved = self._get_input_buffer(incremental_state)
        kept, z = saved.get("kept"), saved.get("z")
        new = decoding_state(self.backend, k)
        if kept is None:
            kept = new(saved.get("state"))
        if k.shape[2] == 1:
            write, erase, log_decay, sums = self._rule_operands(k, gates, padding, z)
            out = kept.step(q, k, v, write, erase, log_decay)
            out, z = self._finish(q, out, sums, True, z)
        else:  # a prompt, all at once
            out, end, z = self._scan(q, k, v, gates, padding, kept.dense(), z, True)
            kept = new(end)
        self._set_input_buffer(incremental_state, {"kept": kept, "z": z})
        return out

    def _write_whole(
        self, key: Tensor, value: Tensor, padding: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """The state (B, H, dk, dv) and, where it is apart, z (B, H, dk) after all tokens."""
        k, v, gates = self._operands(key, value, padding)
        if padding is not None:
            padding = padding[:, None].expand(-1, self.num_heads, -1)
        if self.order_matters:
            k, v, gates = alternate_heads(k), alternate_heads(v), alternate_heads(gates)
            padding = None if padding is None else alternate_heads(padding)
        _, state, z = self._scan(None, k, v, gates, padding, None, None, True)
        assert state is not None
        return state, z

    def _read(self, q: Tensor, state: Tensor, z: Optional[Tensor]) -> Tensor:
        out = exact_matmul(q, state)
        if self.normalized:
            out = self._divide(out, None if z is None else exact_matmul(q, z[..., None]))
        return out

    def _read_source(
        self,
        q: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor],
        incremental_state: IncrementalState,
    ) -> Tensor:
        saved: Dict[str, Optional[Tensor]] = {}
        if incremental_state is not None:
            saved = self._get_input_buffer(incremental_state)
        if "state" in saved:
            state, z = saved["state"], saved["z"]
            assert state is not None
        else:
            assert key is not None and value is not None
            beams = 1
            if incremental_state is not None:
                beams = self._shared_beams(key, padding)
            if beams > 1:
                key, value = key[:, ::beams], value[:, ::beams]
                padding = None if padding is None else padding[::beams]
            state, z = self._write_whole(key, value, padding)
            # (sentences, beams, ...): one state a sentence, seen by its beams through stride 0
            state = state[:, None].expand(-1, beams, -1, -1, -1)
            if z is not None:
                z = z[:, None].expand(-1, beams, -1, -1)
            if incremental_state is not None:
                self._set_input_buffer(incremental_state, {"state": state, "z": z})
        sentences, beams = state.shape[0], state.shape[1]
        heads, tokens = q.shape[1], q.shape[2]
        # the beams of a sentence become positions: (sentences, H, beams T, dk)
        q = q.reshape(sentences, beams, heads, tokens, -1).transpose(1, 2).flatten(2, 3)
        out = self._read(q, state[:, 0], None if z is None else z[:, 0])
        out = out.view(sentences, heads, beams, tokens, -1).transpose(1, 2)
        return out.reshape(sentences * beams, heads, tokens, -1)

    def _shared_beams(self, key: Tensor, padding: Optional[Tensor]) -> int:
        """How many neighbouring rows hold the same sentence: ``beam_size`` if they all do, else 1."""
        rows = key.shape[1]
        if self.beam_size < 2 or rows % self.beam_size != 0:
            return 1
        groups = key.view(key.shape[0], -1, self.beam_size, key.shape[2])
        same = bool((groups == groups[:, :, :1]).all())
        if same and padding is not None:
            pads = padding.view(-1, self.beam_size, padding.shape[1])
            same = bool((pads == pads[:, :1]).all())
        return self.beam_size if same else 1

    def set_beam_size(self, beam_size: int) -> None:
        """Tell cross-attention how many neighbouring rows beam search uses for a sentence."""
        self.beam_size = beam_size

    @torch.jit.export
    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor):
        """Row i continues from row new_order[i]; rows may repeat or vanish."""
        saved = self._get_input_buffer(incremental_state)
        if not torch.jit.is_scripting() and "kept" in saved:
            saved["kept"].reorder(new_order)
            if saved["z"] is not None:
                saved["z"] = saved["z"].index_select(0, new_order)
            incremental_state = self._set_input_buffer(incremental_state, saved)
        elif len(saved) > 0:
            for name in ["state", "z"]:
                x = saved[name]
                if x is not None:
                    if self.encoder_decoder_attention:
                        saved[name] = reorder_sentences(x, new_order)
                    else:
                        saved[name] = x.index_select(0, new_order)
            incremental_state = self._set_input_buffer(incremental_state, saved)
        return incremental_state

    def _get_input_buffer(self, incremental_state: IncrementalState) -> Dict[str, Optional[Tensor]]:
        result = self.get_incremental_state(incremental_state, "attn_state")
        if result is not None:
            return result
        empty: Dict[str, Optional[Tensor]] = {}
        return empty

    def _set_input_buffer(
        self, incremental_state: IncrementalState, buffer: Dict[str, Optional[Tensor]]
    ) -> IncrementalState:
        return self.set_incremental_state(incremental_state, "attn_state", buffer)


def choose_normalization(
    update_rule: str,
    feature_map: FeatureMap,
    key_normalization: str,
    attention_normalization: object,
) -> Tuple[str, bool]:
    """The key and attention normalisation that "auto" stands for; refuses what makes no sense."""
    rule = rule_class(update_rule)
    wanted = str(attention_normalization).lower()
    if wanted not in ("auto", "true", "false"):
        raise FastWeightError(
            f"attention_normalization must be auto, true or false, got {attention_normalization!r}"
        )
    if key_normalization not in ("auto", *NORMALIZATIONS):
        raise FastWeightError(
            f"key_normalization must be auto, {', '.join(NORMALIZATIONS)}, got {key_normalization!r}"
        )
    normalized = rule.default_attention_normalization if wanted == "auto" else wanted == "true"
    if key_normalization == "auto":
        key_normalization = rule.default_key_normalization
        if feature_map.signed and key_normalization == "sum":
            key_normalization = "l2"
    name = type(feature_map).__name__.lower()
    if feature_map.signed and normalized:
        raise FastWeightError(
            f"feature map {name} has negative features, whose sums can vanish: the attention-normalised "
            f"{update_rule} rule cannot use it; choose another map, or attention_normalization false"
        )
    if feature_map.signed and key_normalization == "sum":
        raise FastWeightError(
            f"feature map {name} has negative features, whose sums can vanish: key_normalization must be l2 or "
            "none, got 'sum'"
        )
    if getattr(feature_map, "stabilizer", False) and key_normalization != "sum":
        raise FastWeightError(
            "favor_stabilizer scales every key by a factor of its own, which only key_normalization 'sum' takes "
            f"out again, got {key_normalization!r}"
        )
    return key_normalization, normalized


def alternate_heads(x: Tensor) -> Tensor:
    """(B, H, T, ...) with the time of the odd heads reversed."""
    x = x.clone()
    x[:, 1::2] = x[:, 1::2].flip(2)
    return x


def reorder_sentences(x: Tensor, new_order: Tensor) -> Tensor:
    """Reorder (sentences, beams, ...) of identical beams by rows, one copy a sentence as long as beams stay together.

    They do not where rows only looked like beams: a search without them, after one with them, in equal sentences.
    """
    beams = x.shape[1]
    parents = torch.div(new_order, beams, rounding_mode="floor")
    if new_order.shape[0] % beams == 0:
        groups = parents.view(-1, beams)
        if bool((groups == groups[:, :1]).all()):
            sizes = [-1, beams] + [-1] * (x.dim() - 2)
            return x[:, :1].index_select(0, groups[:, 0]).expand(sizes)
    return x[:, 0].index_select(0, parents)[:, None]
