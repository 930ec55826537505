"""Cross-attention writes a source once, keeps one copy for all beams of a sentence, and reads it at every step."""

import pytest
import torch
from attention_cases import (
    CASES,
    FEW_CASES,
    SOURCE_DIM,
    assert_same,
    attend,
    buffer_of,
    build_attention,
    sentences,
)

BEAMS, SENTENCES = 3, 2


def source_of_beams():
    """Two sentences, the second left-padded, each repeated for its beams."""
    source = sentences(5, SENTENCES, SOURCE_DIM).repeat_interleave(BEAMS, dim=1)
    padding = torch.zeros(SENTENCES, 5, dtype=torch.bool)
    padding[1, :2] = True
    return source, padding.repeat_interleave(BEAMS, dim=0)


def decode(attention, query, source, padding, state):
    return torch.cat(
        [
            attend(
                attention,
                query[t : t + 1],
                source,
                key_padding_mask=padding,
                incremental_state=state,
                static_kv=True,
            )
            for t in range(len(query))
        ]
    )


@pytest.mark.parametrize("beams", [1, BEAMS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_full(case, beams):
    attention = build_attention(case, "cross")
    source, padding = source_of_beams()
    query, state = sentences(4, source.shape[1]), {}
    full = attend(attention, query, source, key_padding_mask=padding)
    attention.set_beam_size(beams)
    with torch.no_grad():
        assert_same(decode(attention, query, source, padding, state), full)
        assert_same(attend(attention, query, None, incremental_state=state), full)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_share_one_copy_also_after_a_sentence_has_finished(case):
    attention = build_attention(case, "cross")
    attention.set_beam_size(BEAMS)
    source, padding = source_of_beams()
    query, after, state = sentences(2, 6), sentences(2, BEAMS), {}
    with torch.no_grad():
        decode(attention, query, source, padding, state)
        for kept in buffer_of(attention, state).values():
            if kept is not None:
                one = kept[0, 0].numel() * kept.element_size()
                assert kept.shape[:2] == (SENTENCES, BEAMS)
                assert kept.untyped_storage().nbytes() == SENTENCES * one
        order = torch.tensor([4, 3, 4])  # the first sentence is done, the second goes on
        attention.reorder_incremental_state(state, order)
        kept = buffer_of(attention, state)["state"]
        assert kept.untyped_storage().nbytes() == kept[0, 0].numel() * kept.element_size()
        continued = decode(attention, after, source[:, 3:], padding[3:], state)
    full = attend(attention, after, source[:, 3:], key_padding_mask=padding[3:])
    assert_same(continued, full)


@pytest.mark.parametrize("what", ["source", "padding"])
def test_rows_that_differ_are_not_shared(what):
    attention = build_attention(FEW_CASES[3], "cross")
    attention.set_beam_size(BEAMS)
    source, padding = source_of_beams()
    if what == "source":
        source[0, 2] += 1
    else:
        padding[2, 0] = True
    query, state = sentences(2, 6), {}
    full = attend(attention, query, source, key_padding_mask=padding)
    with torch.no_grad():
        assert_same(decode(attention, query, source, padding, state), full)
        assert buffer_of(attention, state)["state"].shape[:2] == (6, 1)
        order = [5, 0, 0, 2]  # rows of their own may go anywhere
        attention.reorder_incremental_state(state, torch.tensor(order))
        continued = attend(attention, query[:, order], None, incremental_state=state)
    assert_same(continued, full[:, order])


@pytest.mark.parametrize("order", [[0, 4], [5, 0, 1, 2, 4, 3], [1, 1, 5]], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_rows_that_only_looked_like_beams_may_go_anywhere(case, order):
    # equal sentences, searched without beams after a search with them
    attention = build_attention(case, "cross")
    attention.set_beam_size(BEAMS)
    source, padding = source_of_beams()
    query, state = sentences(2, 6), {}
    with torch.no_grad():
        decode(attention, query, source, padding, state)
        attention.reorder_incremental_state(state, torch.tensor(order))
        continued = attend(attention, query[:, order], None, incremental_state=state)
    full = attend(attention, query, source, key_padding_mask=padding)
    assert_same(continued, full[:, order])


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_batch_that_is_no_multiple_of_the_beam_works(case):
    attention = build_attention(case, "cross")
    attention.set_beam_size(4)  # left over from an earlier search
    source, padding = source_of_beams()
    query, state = sentences(2, 6), {}
    full = attend(attention, query, source, key_padding_mask=padding)
    with torch.no_grad():
        assert_same(decode(attention, query, source, padding, state), full)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_training_ignores_the_beam_size(case):
    attention = build_attention(case, "cross").train()
    attention.set_beam_size(BEAMS)
    source, _ = source_of_beams()
    source.requires_grad_()
    query = sentences(2, 6)
    (grad,) = torch.autograd.grad(attend(attention, query, source).square().sum(), source)
    assert (grad.abs().sum((0, 2)) > 0).all()  # every row of the batch, not one a sentence


def test_source_is_projected_once():
    attention = build_attention(FEW_CASES[2], "cross")
    source, padding = source_of_beams()
    calls = []
    attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        decode(attention, sentences(5, 6), source, padding, {})
    assert len(calls) == 1
