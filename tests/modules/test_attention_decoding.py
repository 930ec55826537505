"""Decoding token by token equals the full forward, also after beam search has reordered the rows."""

import pytest
import torch
from attention_cases import (
    CASES,
    FEW_CASES,
    Case,
    assert_same,
    attend,
    buffer_of,
    build_attention,
    sentences,
)


def decode(attention, x, incremental_state, lengths=None, padding=None):
    """x in pieces of the given lengths (one token each by default), as a decoder gets them."""
    outs, start = [], 0
    for length in lengths or [1] * len(x):
        piece = slice(start, start + length)
        mask = None if padding is None else padding[:, piece]
        outs.append(attend(attention, x[piece], incremental_state=incremental_state, key_padding_mask=mask))
        start += length
    return torch.cat(outs)


# "auto" keeps the pairs written lately (LazyState), "chunked" the matrices
PATHS = pytest.mark.parametrize("backend", ["auto", "chunked"])


@PATHS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_full(case, grad, backend):
    attention = build_attention(case, "causal", backend=backend)
    x = sentences(7, 3)
    with torch.set_grad_enabled(grad):
        assert_same(decode(attention, x, {}), attend(attention, x))


@PATHS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_at_once_then_single_tokens_equals_full(case, backend):
    attention = build_attention(case, "causal", backend=backend)
    x = sentences(9, 2)
    with torch.no_grad():
        assert_same(decode(attention, x, {}, lengths=[4, 1, 1, 2, 1]), attend(attention, x))


@PATHS
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_left_padded_prompts_decode_as_alone(case, backend):
    attention = build_attention(case, "causal", backend=backend)
    x = sentences(6, 2)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, :2] = True
    with torch.no_grad():
        for lengths in ([3, 1, 1, 1], [1] * 6):
            together = decode(attention, x, {}, lengths, padding)
            assert_same(together[2:, 1:], attend(attention, x[2:, 1:]))
            assert_same(together[:, :1], attend(attention, x[:, :1]))


@pytest.mark.parametrize("order", [[2, 0, 0], [1], [0, 0, 0, 0, 1, 2], [2, 1, 0]], ids=str)
@PATHS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_reordered_repeated_and_dropped(case, order, backend):
    attention = build_attention(case, "causal", backend=backend)
    before, after, state = sentences(4, 3), sentences(3, len(order)), {}
    with torch.no_grad():
        decode(attention, before, state)
        attention.reorder_incremental_state(state, torch.tensor(order))
        continued = decode(attention, after, state)
        whole = attend(attention, torch.cat([before[:, order], after]))
    assert_same(continued, whole[4:])


@PATHS
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_long_sentences_are_folded(case, backend):
    """Beyond the number of tokens at which pairs become a matrix, twice, with a reorder at every token."""
    attention = build_attention(case, "causal", backend=backend)
    x, state, outs = sentences(40, 3), {}, []
    rows = torch.arange(3)
    written = x[:0]
    with torch.no_grad():
        for t in range(40):
            written = torch.cat([written[:, rows], x[t : t + 1]])
            outs = decode(attention, x[t : t + 1], state)
            assert_same(outs[0], attend(attention, written)[-1])
            rows = torch.randint(3, (3,))
            attention.reorder_incremental_state(state, rows)
        kept = buffer_of(attention, state)
    if backend == "auto":
        assert kept["kept"].base is not None and kept["kept"].count < 40
    else:
        assert kept["state"].dim() == 4


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_repeated_rows_do_not_share_memory(case):
    attention = build_attention(case, "causal", backend="chunked")
    start, state = sentences(2, 1), {}
    after = sentences(1, 2)
    with torch.no_grad():
        decode(attention, start, state)
        attention.reorder_incremental_state(state, torch.tensor([0, 0]))
        decode(attention, after, state)
        kept = buffer_of(attention, state)["state"]
    assert (kept[0] - kept[1]).abs().max() > 1e-6


def test_two_searches_at_once_keep_their_own_states():
    attention = build_attention(Case("delta", "elu", False), "causal")
    one, two, x, y = {}, {}, sentences(3, 1), sentences(3, 1)
    with torch.no_grad():
        outs = [
            (decode(attention, x[t : t + 1], one), decode(attention, y[t : t + 1], two)) for t in range(3)
        ]
        assert_same(torch.cat([a for a, _ in outs]), attend(attention, x))
        assert_same(torch.cat([b for _, b in outs]), attend(attention, y))


def bytes_of(kept) -> int:
    tensors = [x for x in kept.values() if torch.is_tensor(x)]
    if "kept" in kept:
        tensors += [x for x in vars(kept["kept"]).values() if torch.is_tensor(x)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


@PATHS
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_state_size_does_not_depend_on_the_number_of_tokens(case, backend):
    """The matrices never grow; the pairs grow up to the same size again, and then start anew."""
    attention = build_attention(case, "causal", backend=backend)
    state, sizes = {}, []
    with torch.no_grad():
        for _ in range(150):
            decode(attention, sentences(1, 2), state)
            sizes.append(bytes_of(buffer_of(attention, state)))
    if backend == "chunked":
        assert len(set(sizes)) == 1
    else:
        assert max(sizes[100:]) == max(sizes[50:100])


def test_reorder_before_the_first_token_does_nothing():
    attention = build_attention(Case("delta", "elu", False), "causal")
    state = {}
    attention.reorder_incremental_state(state, torch.tensor([0]))
    assert buffer_of(attention, state) == {}
