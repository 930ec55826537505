"""TorchScript equals eager in every call: the profiling executor recompiles at the second."""

import pytest
import torch
from attention_cases import (
    FEW_CASES,
    POSITIVE_MAPS,
    SIGNED_MAPS,
    SITES,
    SOURCE_DIM,
    Case,
    assert_same,
    attend,
    build_attention,
    sentences,
)
from torch import Tensor

MAPS = [Case("delta", name, False) for name in POSITIVE_MAPS + SIGNED_MAPS]
CALLS = 3


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_scripted_equals_eager(case, site, grad):
    attention = build_attention(case, site)
    scripted = torch.jit.script(attention)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, :2] = True
    with torch.set_grad_enabled(grad):
        for _ in range(CALLS):
            x = sentences(5, 2)
            source = sentences(5, 2, SOURCE_DIM) if site == "cross" else None
            eager = attend(attention, x, source, key_padding_mask=padding)
            assert_same(attend(scripted, x, source, key_padding_mask=padding), eager)


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_every_map_can_be_scripted(case):
    attention = build_attention(case, "causal", chunk_size=3)
    scripted = torch.jit.script(attention)
    for _ in range(CALLS):
        x = sentences(7, 2)
        assert_same(attend(scripted, x), attend(attention, x))


class Decoding(torch.nn.Module):
    """Token by token; from token ``turn`` on, row i continues row order[i].

    Scripted itself, because a dict from Python is copied on its way into scripted code.
    """

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, source: Tensor | None, turn: int, order: Tensor) -> tuple[Tensor, Tensor]:
        state: dict[str, dict[str, Tensor | None]] = {}
        first: list[Tensor] = []
        then: list[Tensor] = []
        for t in range(x.shape[0]):
            if t == turn:
                self.attention.reorder_incremental_state(state, order)
                x = x.index_select(1, order)
            key = x[t : t + 1] if source is None else source
            out = self.attention(x[t : t + 1], key, key, None, state)[0]
            if t < turn:
                first.append(out)
            else:
                then.append(out)
        return torch.cat(first), torch.cat(then)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_scripted_decoding_equals_full(case):
    attention = build_attention(case, "causal")
    scripted = torch.jit.script(Decoding(attention))
    order = torch.tensor([2, 0])
    with torch.no_grad():
        for _ in range(CALLS):
            x = sentences(6, 3)
            first, then = scripted(x, None, 3, order)
            full = attend(attention, x)
            assert_same(first, full[:3])
            assert_same(then, full[3:, order])


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_scripted_cross_attention_of_beams_equals_full(case):
    attention = build_attention(case, "cross")
    attention.set_beam_size(2)
    scripted = torch.jit.script(Decoding(attention))
    order = torch.tensor([3, 2])
    with torch.no_grad():
        for _ in range(CALLS):
            x, source = sentences(4, 4), sentences(4, 2, SOURCE_DIM).repeat_interleave(2, dim=1)
            first, then = scripted(x, source, 2, order)
            full = attend(attention, x, source)
            assert_same(first, full[:2])
            assert_same(then, full[2:, order])
