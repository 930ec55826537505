"""A language model reads a prompt at once before fairseq's generator goes on token by token."""

import contextlib
import functools
from typing import Iterable, Iterator, Optional

import torch
from torch import Tensor, nn

from .streams import CarriesStates


@contextlib.contextmanager
def prompts_read_at_once(
    models: Iterable[nn.Module], prompts: Optional[Tensor], bos: int, eos: int, pad: int, beam: int
) -> Iterator[None]:
    """Inside, the decoders of fast-weight language models read what is common to ``prompts`` in one scan.

    fairseq's SequenceGenerator feeds prompts (B, P), padded on the right, one token a step in ``beam`` rows each. Here
    the first step scans the prompts up to where the shortest ends, the next ones return what that gave, and the
    first one behind it finds the states in the incremental state. Beams may be reordered in between: those of a
    sentence whose score is above -inf hold the same prompt.
    """
    prompted = []
    common = 0 if prompts is None else common_length(prompts, eos, pad)
    for model in models:
        if isinstance(model, CarriesStates) and model.has_states_only():
            read = min(common, model.max_positions())  # fairseq reads no more of it either
            if read > 1:  # one token is no gain
                tokens = torch.cat([prompts.new_full((len(prompts), 1), bos), prompts[:, :read]], dim=1)
                model.decoder.forward = functools.partial(prompted_forward, Prompt(model, tokens, beam))
                prompted.append(model.decoder)
    try:
        yield
    finally:
        for decoder in prompted:
            del decoder.forward  # the class's again


def common_length(prompts: Tensor, eos: int, pad: int) -> int:
    """How many tokens come before the first eos or pad of any row; until then no sentence ends."""
    ended = ((prompts == eos) | (prompts == pad)).any(0)
    return int(ended.int().argmax()) if bool(ended.any()) else prompts.shape[1]


class Prompt:
    """tokens (B, C + 1) with bos. What the model makes of all but the last is read at the first step."""

    def __init__(self, model: CarriesStates, tokens: Tensor, beam: int):
        self.model, self.beam = model, beam
        self.tokens = tokens[:, :-1]  # (B, C); the last one is the first that is read in a step of its own
        self.features: Optional[Tensor] = None  # (B, C, D)
        self.states: list = []

    def read(self) -> None:
        self.features, self.states = self.model.read_text(self.tokens)

    def output(self, step: int) -> Tensor:
        """What the decoder returns in ``step``: (B beam, 1, V)."""
        return self.model.decoder.output_layer(self.beams(self.features[:, step : step + 1]))

    def beams(self, x: Optional[Tensor]) -> Optional[Tensor]:
        """(B, ...) -> (B beam, ...)."""
        return None if x is None else x.repeat_interleave(self.beam, dim=0)

    def leave_states(self, incremental_state) -> None:
        """As if the prompt had been read step by step."""
        for attention, (state, z) in zip(self.model.attentions(), self.states, strict=True):
            buffer = {"state": self.beams(state), "z": self.beams(z)}
            attention._set_input_buffer(incremental_state, buffer)


def prompted_forward(prompt: Prompt, prev_output_tokens, encoder_out=None, incremental_state=None, **kwargs):
    """A decoder's ``forward`` while ``prompt`` is read; ``prev_output_tokens`` (B beam, step + 1)."""
    step, steps = prev_output_tokens.shape[1] - 1, prompt.tokens.shape[1]
    if step < steps:
        if step == 0:
            prompt.read()
        return prompt.output(step), {"attn": [None]}
    if step == steps:
        prompt.leave_states(incremental_state)
    decoder = prompt.model.decoder
    return type(decoder).forward(
        decoder, prev_output_tokens, encoder_out, incremental_state=incremental_state, **kwargs
    )
