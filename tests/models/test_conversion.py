"""Where a converted attention starts: as near to softmax attention as its kernel allows."""

import pytest
import torch
from fairseq.modules import MultiheadAttention

from fairseq_fastweights.convert import start_near_softmax
from fairseq_fastweights.convert.checkpoint import current_names
from fairseq_fastweights.modules import FastWeightAttention

WIDTH, HEADS = 16, 2
D = WIDTH // HEADS


def swapped(old, **options):
    """A fast-weight attention with the projections of ``old``, started as in a conversion."""
    torch.manual_seed(4)
    new = FastWeightAttention(WIDTH, HEADS, self_attention=True, backend="reference", **options)
    factors = start_near_softmax(new)
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            factor = factors.get(name.split(".")[0], 1.0)
            new.get_parameter(name).copy_(parameter * factor)
    return new.eval()


def softmax_attention():
    torch.manual_seed(3)
    old = MultiheadAttention(WIDTH, HEADS, self_attention=True).eval()
    torch.nn.init.normal_(old.k_proj.bias)
    return old


def distance(old, new):
    """|new - old|^2 / |old|^2 over 12 causal reads."""
    x = torch.randn(12, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    mask = torch.full((12, 12), float("-inf")).triu(1)
    with torch.no_grad():
        expected = old(x, x, x, attn_mask=mask, need_weights=False)[0]
        got = new(x, x, x, need_weights=False)[0]
    return float((got - expected).pow(2).sum() / expected.pow(2).sum())


@pytest.mark.parametrize("scaled", [False, True])
def test_favor_with_many_features_is_softmax_attention(scaled):
    old = softmax_attention()
    options = {"update_rule": "sum", "feature_map": "favor", "favor_scale_input": scaled}
    few, many = (distance(old, swapped(old, favor_features=m, **options)) for m in (8, 512))
    assert many < 0.03 and many < few / 4


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_sum_rule_starts_nearer_than_with_the_projections_as_they_are(feature_map):
    old = softmax_attention()
    new = swapped(old, update_rule="sum", feature_map=feature_map)
    plain = FastWeightAttention(
        WIDTH, HEADS, self_attention=True, update_rule="sum", feature_map=feature_map, backend="reference"
    )
    plain.load_state_dict(old.state_dict())
    assert distance(old, new) < 0.5 * distance(old, plain)


@pytest.mark.parametrize(
    "options, doubled",
    [
        ({"key_normalization": "sum"}, 2),
        ({"key_normalization": "l2"}, 1),
        ({"attention_normalization": True}, 2),
        ({"update_rule": "gated-delta"}, 2),
        ({"update_rule": "gated-sum"}, 1),
    ],
)
def test_beta_is_one_half_and_the_values_make_up_for_it(options, doubled):
    new = FastWeightAttention(WIDTH, HEADS, self_attention=True, **{"update_rule": "delta", **options})
    factors = start_near_softmax(new)
    assert factors["v_proj"] == pytest.approx(doubled * D**0.5)
    assert factors["q_proj"] == factors["k_proj"] == pytest.approx(D**0.25)
    if new.rule.__class__.__name__ != "GatedSumRule":
        beta = new.rule.gates(torch.randn(5, 2, WIDTH))[..., 0]
        assert torch.equal(beta, torch.full_like(beta, 0.5))


def test_constant_values_are_read_back_by_an_attention_normalised_sum():
    """What softmax makes of equal values is that value, whatever the weights."""
    old = softmax_attention()
    torch.nn.init.zeros_(old.v_proj.weight)
    torch.nn.init.normal_(old.v_proj.bias)
    for feature_map in ("elu", "softmax"):  # never orthogonal, as features that can be 0 are
        assert distance(old, swapped(old, update_rule="sum", feature_map=feature_map)) < 1e-3


def test_serial_rules_keep_their_projections_and_start():
    new = FastWeightAttention(WIDTH, HEADS, self_attention=True, update_rule="delta-rnn")
    assert start_near_softmax(new) == {}


def test_names_of_older_checkpoints():
    weight, bias = torch.randn(6, 2), torch.randn(6)
    old = {
        "decoder.layers.0.self_attn.in_proj_weight": weight,
        "decoder.layers.0.self_attn.in_proj_bias": bias,
        "encoder.layers.0.in_proj_weight": weight,  # the fused copy of 0.12.2
        "encoder.layers.0.fc1.weight": weight,
    }
    names, dropped = current_names(old)
    parts = [names.pop(f"decoder.layers.0.self_attn.{x}_proj.weight") for x in "qkv"]
    assert torch.equal(torch.cat(parts), weight)
    parts = [names.pop(f"decoder.layers.0.self_attn.{x}_proj.bias") for x in "qkv"]
    assert torch.equal(torch.cat(parts), bias)
    assert list(names) == ["encoder.layers.0.fc1.weight"]
    assert list(dropped) == ["encoder.layers.0.in_proj_weight"]
    assert len(old) == 4
