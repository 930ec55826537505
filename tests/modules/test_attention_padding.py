"""Padding is invisible: a padded batch equals its sentences one by one."""

import pytest
import torch
from attention_cases import (
    CASES,
    FEW_CASES,
    SITES,
    SOURCE_DIM,
    assert_same,
    attend,
    build_attention,
    sentences,
)

LENGTHS = (5, 3, 1)


def pad(parts, left):
    """(length, 1, C) each -> (T, B, C), with large numbers at the pads, and the mask (B, T)."""
    longest = max(len(part) for part in parts)
    batch = torch.randn(longest, len(parts), parts[0].shape[2], dtype=torch.float64) * 30
    padding = torch.ones(len(parts), longest, dtype=torch.bool)
    for b, part in enumerate(parts):
        where = slice(longest - len(part), None) if left else slice(0, len(part))
        batch[where, b] = part[:, 0]
        padding[b, where] = False
    return batch, padding


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_batch_equals_its_sentences_one_by_one(case, site, left):
    attention = build_attention(case, site)
    width = SOURCE_DIM if site == "cross" else attention.embed_dim
    parts = [sentences(length, 1, width) for length in LENGTHS]
    batch, padding = pad(parts, left)
    query = sentences(4, len(parts)) if site == "cross" else batch
    source = batch if site == "cross" else None
    together = attend(attention, query, source, key_padding_mask=padding)
    for b, part in enumerate(parts):
        if site == "cross":
            alone = attend(attention, query[:, b : b + 1], part)
            assert_same(together[:, b : b + 1], alone)
        else:
            assert_same(together[~padding[b], b], attend(attention, part)[:, 0])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_padding_gets_no_gradient(case, site):
    attention = build_attention(case, site)
    width = SOURCE_DIM if site == "cross" else attention.embed_dim
    x, padding = pad([sentences(length, 1, width) for length in LENGTHS], left=True)
    x.requires_grad_()
    query = sentences(4, len(LENGTHS)) if site == "cross" else x
    out = attend(attention, query, x if site == "cross" else None, key_padding_mask=padding)
    if site != "cross":
        out = out[~padding.T]  # a pad's own output is thrown away
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (grad[padding.T] == 0).all()
    assert (grad[~padding.T] != 0).any()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sentence_of_pads_alone_gives_numbers_and_gradients(case, site):
    attention = build_attention(case, site)
    x = sentences(4, 2).requires_grad_()
    source = sentences(4, 2, SOURCE_DIM).requires_grad_() if site == "cross" else None
    padding = torch.tensor([[True] * 4, [False] * 4])
    out = attend(attention, x, source, key_padding_mask=padding)
    out.square().sum().backward()
    assert out.isfinite().all()
    written = x if source is None else source
    assert written.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_keys_give_numbers_and_gradients(case, site):
    # relu and dpfp map these keys and queries to zeros, whose sum and length are 0
    attention = build_attention(case, site)
    with torch.no_grad():
        for projection in (attention.k_proj, attention.q_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    x = sentences(5, 2).requires_grad_()
    source = sentences(4, 2, SOURCE_DIM) if site == "cross" else None
    out = attend(attention, x, source)
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())
