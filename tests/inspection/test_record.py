"""Recordings against what the module computes with other values, prefixes and formulas."""

import pytest
import torch
from attention_cases import CASES, SITES, SOURCE_DIM, Case, assert_same, attend, build_attention, sentences

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.inspection import Recording, recording

TARGET, SOURCE = 5, 6
SITE_NAMES = {"causal": "decoder", "bidirectional": "encoder", "cross": "cross"}


def inputs(site, rows=2):
    """(x, source or None) for an attention of ``site``."""
    torch.manual_seed(2)
    x = sentences(TARGET, rows)
    return (x, sentences(SOURCE, rows, SOURCE_DIM)) if site == "cross" else (x, None)


def record(attention, *tensors, **options):
    """(recording, what was handed to out_proj (B, H, T, dv)) of one call."""
    handed = []
    hook = attention.out_proj.register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    with recording(attention) as recordings:
        attend(attention, *tensors, **options)
    hook.remove()
    (only,) = recordings
    (read,) = handed
    tokens, rows, _ = read.shape
    return only, read.view(tokens, rows, attention.num_heads, attention.head_dim).permute(1, 2, 0, 3)


def values_in_text_order(attention, x, source):
    v = attention.v_proj(x if source is None else source)  # (S, B, C)
    return v.view(*v.shape[:2], attention.num_heads, attention.head_dim).permute(1, 2, 0, 3)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_those_of_any_values(case, site):
    """No rule looks at the values: the weights of one call hold for values of any other projection.

    Three draws of heads of width 4 are 12 equations for the at most 6 weights of a row: no other weights fit.
    """
    attention = build_attention(case, site)
    tensors = inputs(site)
    weights = record(attention, *tensors)[0].weights
    for _ in range(3):
        torch.nn.init.normal_(attention.v_proj.weight)
        torch.nn.init.normal_(attention.v_proj.bias)
        found, read = record(attention, *tensors)
        with torch.no_grad():
            assert_same(weights @ values_in_text_order(attention, *tensors), read)
        assert found.error() < 1e-9


@pytest.mark.parametrize("backend", ["reference", "chunked", "numba"])
def test_weights_hold_for_every_backend(backend):
    attention = build_attention(Case("delta", "elu", True), "causal", backend=backend)
    assert record(attention, *inputs("causal"))[0].error() < 1e-9


def test_clamped_kappa():
    attention = build_attention(Case("delta", "elu", True), "causal", kappa_clamp=True)
    assert record(attention, *inputs("causal"))[0].error() < 1e-9


def by_hand(**operands) -> Recording:
    """One head that writes two tokens."""
    one = {"q": None, "k": None, "write": None, "erase": None, "log_decay": None, "z": None, **operands}
    tensors = {name: None if x is None else torch.tensor(x).double()[None, None] for name, x in one.items()}
    v = torch.ones(1, 1, 2, 1).double()
    flags = {"causal": True, "alternates": False, "normalized": False, "scale": 1.0, "eps": 1e-5}
    return Recording("x", 0, "decoder", "delta", **{**flags, **tensors}, v=v, read=v)


def test_two_tokens_of_the_delta_rule_by_hand():
    """o_2 = (b_1 k_1.q - b_2 k_2.q b_1 k_1.k_2) v_1 + b_2 k_2.q v_2: what token 2 erases is taken from token 1."""
    k, q, beta = [[1.0, 2.0], [3.0, 1.0]], [[1.0, 1.0], [2.0, -1.0]], [0.5, 0.25]
    found = by_hand(k=k, q=q, write=beta, erase=[[0.5, 1.0], [0.75, 0.25]])
    # row 1: .5 * (k1.q1 = 3);  row 2: .5 * (k1.q2 = 0) - .25 * (k2.q2 = 5) * .5 * (k1.k2 = 5), .25 * 5
    expected = torch.tensor([[1.5, 0.0], [-3.125, 1.25]]).double()
    assert_same(found.weights[0, 0], expected, 1e-12)
    assert_same(found.erased_share[0, 0], torch.tensor([2.5, 2.5]).double(), 1e-12)


@pytest.mark.parametrize("site", SITES)
def test_normalised_sum_rule_is_an_average(site):
    """Positive weights that sum to head_dim^-1/2 (up to the 1e-5 beside the normaliser)."""
    attention = build_attention(Case("sum", "elu", True), site)
    weights = record(attention, *inputs(site))[0].weights
    assert (weights >= 0).all()
    assert_same(weights.sum(-1), torch.full(weights.shape[:3], 0.5).double(), 1e-4)


def test_causal_weights_have_no_future():
    weights = record(build_attention(Case("gated-delta", "tanh", False), "causal"), *inputs("causal"))[
        0
    ].weights
    assert torch.equal(weights, weights.tril())
    assert (weights.diagonal(dim1=2, dim2=3) != 0).all()


def state_of(attention, x):
    """The module's own fast weights after writing all of x."""
    with torch.no_grad():
        state = attention._write_whole(x, x, None)[0]
    return state[..., : attention.head_dim]  # without z


@pytest.mark.parametrize("rule, normalized", [("sum", True), ("gated-sum", True), ("delta", False)])
def test_singular_values_are_those_of_prefixes(rule, normalized):
    """Of the causal state after t tokens: that of a sentence of t tokens, written by a module that reads it last."""
    case = Case(rule, "elu", normalized)
    attention, whole = build_attention(case, "causal"), build_attention(case, "bidirectional")
    whole.order_matters = False  # all heads from left to right
    x, _ = inputs("causal")
    found = record(attention, x)[0]
    for t in range(TARGET):
        state = state_of(whole, x[: t + 1])
        gram = torch.linalg.eigvalsh(state.transpose(2, 3) @ state).flip(-1).clamp_min(0)
        assert_same(found.singular_values[:, :, t].square(), gram)
        assert_same(found.singular_values[:, :, t].norm(dim=-1), state.flatten(2).norm(dim=-1))
    assert torch.equal(found.final_singular_values, found.singular_values[:, :, -1])


def test_odd_heads_of_the_encoder_write_from_right_to_left():
    """Their state is complete at the first token of the text, that of even heads at the last."""
    attention = build_attention(Case("delta", "elu", False), "bidirectional")
    x, _ = inputs("bidirectional")
    found = record(attention, x)[0]
    end = torch.linalg.svdvals(state_of(attention, x))
    for head, place in ((0, -1), (1, 0), (2, -1)):
        assert_same(found.singular_values[:, head, place], end[:, head])
        assert found.right_to_left(head) == (head == 1)
    assert_same(found.final_singular_values, end)
    alone = (found.singular_values[:, :, :, 1] < 1e-12).sum(2)  # states of rank 1: after the first write only
    assert (alone == 1).all() and (found.singular_values[:, 1, -1, 1] < 1e-12).all()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rule", ["gated-delta", "gated-sum-peng"])
def test_gates_in_the_order_of_the_text(rule, site):
    attention = build_attention(Case(rule, "elu", False), site)
    x, source = inputs(site)
    found = record(attention, x, source)[0]
    written = x if source is None else source
    beta = torch.sigmoid(written @ attention.rule.beta_proj.weight.T).permute(1, 2, 0)  # (B, H, S)
    assert_same(found.write_strength, beta)
    if rule == "gated-sum-peng":
        assert found.erased_share is None
        assert_same(found.decay, 1 - beta)
    else:
        k = attention._address(attention.k_proj(written), 1.0)
        assert_same(found.erased_share, beta * k.square().sum(-1))
        decay = attention.rule.decay
        rate = decay.log_rate.exp() * torch.log1p(decay.proj(written).exp())
        assert_same(found.decay, torch.exp(-rate).permute(1, 2, 0))


def test_the_sum_rule_has_no_gates():
    found = record(build_attention(Case("sum", "elu", True), "causal"), *inputs("causal"))[0]
    assert (found.write_strength, found.erased_share, found.decay) == (None, None, None)


@pytest.mark.parametrize("site", SITES)
def test_what_a_recording_names(site):
    case = Case("gated-sum", "elu", True)
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([build_attention(case, site) for _ in range(3)])}
    )
    model["layers"][2] = torch.nn.ModuleDict({"attention": model["layers"][2]})
    with recording(model) as recordings:
        attend(model["layers"][2]["attention"], *inputs(site))
    (found,) = recordings
    assert (found.name, found.layer) == ("layers.2.attention", 2)
    assert (found.site, found.rule) == (SITE_NAMES[site], "gated-sum")


def test_nothing_is_left_in_the_module():
    attention = build_attention(Case("delta", "elu", False), "causal")
    x, _ = inputs("causal")
    before = attend(attention, x)
    with recording(attention) as recordings:
        within = attend(attention, x)
        attend(attention, x)
    assert torch.equal(before, within) and len(recordings) == 2
    attend(attention, x)
    assert len(recordings) == 2
    with pytest.raises(RuntimeError), recording(attention):
        raise RuntimeError
    assert not attention._forward_hooks and not attention.out_proj._forward_pre_hooks


def test_refuses_what_it_would_show_wrongly():
    attention = build_attention(Case("delta", "elu", False), "causal")
    x, _ = inputs("causal")
    padding = torch.zeros(2, TARGET, dtype=torch.bool)
    record(attention, x, key_padding_mask=padding)
    padding[0, -1] = True
    with pytest.raises(FastWeightError, match="padding"):
        record(attention, x, key_padding_mask=padding)
    with pytest.raises(FastWeightError, match="incremental"), torch.no_grad():
        record(attention, x, incremental_state={})
