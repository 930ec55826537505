"""FastWeightAttention against a float64 loop over heads and tokens, written from the formulas."""

import pytest
import torch
from attention_cases import (
    CASES,
    EMBED_DIM,
    FEW_CASES,
    SITES,
    SOURCE_DIM,
    Case,
    assert_same,
    attend,
    build_attention,
    sentences,
)
from attention_loop import loop_attention

from fairseq_fastweights.modules import FastWeightAttention


def example(site, tokens=6, rows=3):
    x = sentences(tokens, rows)
    source = sentences(tokens + 1, rows, SOURCE_DIM) if site == "cross" else None
    length = tokens + (site == "cross")
    padding = torch.zeros(rows, length, dtype=torch.bool)
    padding[1, -2:] = True
    padding[-1, :3] = True
    return x, source, padding


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_equals_the_formulas(case, site):
    attention = build_attention(case, site)
    x, source, padding = example(site)
    result = attend(attention, x, source, key_padding_mask=padding)
    expected = loop_attention(attention, case, site, x, source, padding)
    if site == "causal":  # what stands at padding positions is nobody's business
        result, expected = result[~padding.T], expected[~padding.T]
    assert_same(result, expected)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_several_chunks_equal_the_formulas(case, site):
    attention = build_attention(case, site, chunk_size=4)
    x, source, _ = example(site, tokens=11, rows=2)
    assert_same(attend(attention, x, source), loop_attention(attention, case, site, x, source))


@pytest.mark.parametrize("key_norm", ["sum", "l2", "none"])
@pytest.mark.parametrize("case", [Case("sum", "elu", True), Case("delta", "elu", False)], ids=str)
def test_key_normalization_is_of_keys_and_queries(case, key_norm):
    attention = build_attention(case, "causal", key_normalization=key_norm)
    x = sentences(3, 2)
    expected = loop_attention(attention, case, "causal", x, key_norm=key_norm)
    assert_same(attend(attention, x), expected)


def test_kappa_clamp_bounds_the_erase_strength():
    case = Case("delta", "dpfp", True)
    x = sentences(12, 2)
    clamped = build_attention(case, "causal", kappa_clamp=True)
    free = build_attention(case, "causal")
    assert_same(attend(clamped, x), loop_attention(clamped, case, "causal", x))
    assert (attend(clamped, x) - attend(free, x)).abs().max() > 1e-3  # it was needed here


def test_odd_heads_write_from_right_to_left():
    # the last word overwrites the first where both have one key: even heads end with it, odd ones
    # with the first
    attention = build_attention(Case("delta", "softmax", False), "bidirectional")
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.copy_(torch.tensor([50.0, 0, 0, 0]).repeat(3))
        attention.rule.beta_proj.weight.fill_(1e3)
        attention.v_proj.weight.copy_(torch.eye(EMBED_DIM))
        attention.out_proj.weight.copy_(torch.eye(EMBED_DIM))
        attention.v_proj.bias.zero_()
        attention.out_proj.bias.zero_()
    x = sentences(5, 1).abs() + 1
    head = attend(attention, x)[0, 0].view(3, 4) / attention.scaling
    first, last = x[0, 0].view(3, 4), x[-1, 0].view(3, 4)
    assert_same(head, torch.stack([last[0], first[1], last[2]]))


def test_order_does_not_matter_to_the_sum_rule():
    attention = build_attention(Case("sum", "elu", True), "bidirectional")
    x = sentences(5, 2)
    assert_same(attend(attention, x.flip(0)), attend(attention, x).flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_half_precision_is_close_to_the_formulas(case, site, dtype):
    attention = build_attention(case, site).to(dtype)
    x, source, padding = example(site)
    x, source = x.to(dtype), None if source is None else source.to(dtype)
    result = attend(attention, x, source, key_padding_mask=padding)
    assert result.dtype == dtype
    expected = loop_attention(attention, case, site, x, source, padding)
    if site == "causal":
        result, expected = result[~padding.T], expected[~padding.T]
    assert_same(result, expected, tolerance={torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype])


@pytest.mark.parametrize("bias", [True, False])
def test_projections_have_the_parameters_of_fairseq_s_attention(bias):
    from fairseq.modules import MultiheadAttention

    ours = FastWeightAttention(8, 2, bias=bias, update_rule="sum", self_attention=True)
    stock = MultiheadAttention(8, 2, bias=bias, self_attention=True)
    shapes = {name: x.shape for name, x in stock.named_parameters()}
    assert {name: x.shape for name, x in ours.named_parameters()} == shapes


def test_projections_start_as_fairseq_s_attention():
    from fairseq.modules import MultiheadAttention

    torch.manual_seed(3)
    stock = MultiheadAttention(8, 2, self_attention=True)
    torch.manual_seed(3)
    ours = FastWeightAttention(8, 2, update_rule="sum", self_attention=True)
    # the seed gives both the same numbers only if gains and order are the same
    for name, parameter in stock.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(ours.get_parameter(name), parameter), name
