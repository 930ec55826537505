"""Language models whose state goes on from one segment of a text to the next."""

from typing import Dict, List, Optional, Tuple

from torch import Tensor, is_grad_enabled

from ..errors import FastWeightError
from ..modules import FastWeightAttention
from ..modules.carried_state import CarriedState, State


class CarriesStates:
    """Mixin before a fairseq language model: ``forward`` takes ``stream_start`` and then carries states.

    Training and evaluation mode have streams of their own. They are no part of the model's parameters or buffers,
    so they keep their dtype (float32 at least) under --fp16, and fairseq's checkpoints of the model do not hold them.
    """

    streams: Optional[Dict[bool, List[CarriedState]]] = None  # by ``training``, one an attention
    state_gradient = False

    def forward(self, src_tokens, stream_start: Optional[Tensor] = None, **kwargs):
        """As fairseq's. stream_start (B,), bool: the rows whose state begins anew; in the others it goes on from
        where the last call in this mode (training or evaluation) left it. Without it every row is a whole text.

        Raises:
            FastWeightError: the number of rows is another than in the last call, and they do not all begin anew.
        """
        if stream_start is not None:
            self._next_segment(stream_start)
        elif self.streams is not None:
            self._read_streams(False)
        output = super().forward(src_tokens, **kwargs)
        if not is_grad_enabled():  # else activation checkpointing may read the segment again
            self._read_streams(False)
        return output

    def carried_states(self) -> List[Optional[State]]:
        """Where the training streams are: (state, z) of every attention, None for zeros."""
        return [carried.present() for carried in self._streams()[True]]

    def restore_states(self, states: List[Optional[State]]) -> None:
        """Let the training streams go on from ``states``, a value of ``carried_states()``."""
        for carried, state in zip(self._streams()[True], states, strict=True):
            carried.restore(state)

    def detach_states(self) -> None:
        """Let no gradient flow from later segments into those so far."""
        for carried in self._streams()[True]:
            carried.detach()

    def read_text(self, tokens: Tensor) -> Tuple[Tensor, List[State]]:
        """What the decoder makes of tokens (B, T) from their beginning: features (B, T, D), and the states behind
        them, of every attention. No stream is moved."""
        attentions = self.attentions()
        for attention in attentions:
            attention.stream = CarriedState()
        features = self.decoder.extract_features(tokens, None)[0]
        states = [attention.stream.present() for attention in attentions]
        for attention in attentions:
            attention.stream = None
        return features, states

    def has_states_only(self) -> bool:
        """Whether all self-attention is fast weights."""
        found = [m for name, m in self.decoder.named_modules() if name.endswith("self_attn")]
        return all(isinstance(m, FastWeightAttention) for m in found)

    def attentions(self) -> List[FastWeightAttention]:
        """The attentions that carry a state, from the first layer to the last."""
        # not through decoder.layers, which under LayerDrop leaves out some at random
        return [m for m in self.decoder.modules() if isinstance(m, FastWeightAttention) and m.causal]

    def _streams(self) -> Dict[bool, List[CarriedState]]:
        if self.streams is None:
            count = len(self.attentions())
            self.streams = {mode: [CarriedState() for _ in range(count)] for mode in (True, False)}
            for carried in self.streams[True]:
                carried.with_gradient = self.state_gradient
        return self.streams

    def _next_segment(self, stream_start: Tensor) -> None:
        for carried in self._streams()[self.training]:
            last = carried.present()
            if last is not None and len(last[0]) != len(stream_start):
                if not stream_start.all():
                    raise FastWeightError(
                        f"stream_start: the states of {len(last[0])} streams are carried, the batch has "
                        f"{len(stream_start)} rows; then all of them must begin anew"
                    )
                carried.restore(None)
            carried.next_segment(stream_start)
        self._read_streams(True)

    def _read_streams(self, wanted: bool) -> None:
        for i, attention in enumerate(self.attentions()):
            attention.stream = self._streams()[self.training][i] if wanted else None
