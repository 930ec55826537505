"""What makes no sense is refused with one line that names the argument."""

import pytest
import torch
from attention_cases import POSITIVE_MAPS, SIGNED_MAPS, Case, build_attention, sentences

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.modules import FastWeightAttention

RULES = ("sum", "delta", "gated-sum", "gated-delta", "gated-sum-peng")


def assert_one_line(error, *words):
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "options, words",
    [
        ({"update_rule": "dleta"}, ["update rule", "delta", "gated-sum", "'dleta'"]),
        ({"update_rule": "softmax"}, ["update rule", "softmax"]),
        ({"feature_map": "elus"}, ["feature map", "dpfp", "'elus'"]),
        ({"feature_map": "dpfp", "dpfp_nu": 0}, ["dpfp nu", "0"]),
        ({"feature_map": "dpfp", "dpfp_nu": 8}, ["dpfp nu", "7", "8"]),
        ({"feature_map": "dpfp", "dpfp_nu": 1.5}, ["dpfp nu", "1.5"]),
        ({"feature_map": "favor"}, ["favor", "features", "None"]),
        ({"feature_map": "favor", "favor_features": 0}, ["favor", "features", "0"]),
        (
            {"feature_map": "favor", "favor_features": 4, "favor_redraw_interval": -1},
            ["redraw_interval", "-1"],
        ),
        (
            {
                "feature_map": "favor",
                "favor_features": 4,
                "favor_stabilizer": True,
                "update_rule": "sum",
            },
            ["favor_stabilizer", "key_normalization"],
        ),
        ({"key_normalization": "softmax"}, ["key_normalization", "sum", "'softmax'"]),
        ({"attention_normalization": "yes"}, ["attention_normalization", "true", "'yes'"]),
        ({"update_rule": "gated-delta", "attention_normalization": "true"}, ["gated-delta"]),
        ({"kappa_clamp": True}, ["kappa_clamp", "attention_normalization"]),
        ({"kappa_clamp": True, "update_rule": "sum"}, ["kappa_clamp", "delta"]),
        ({"chunk_size": 0}, ["chunk_size", "0"]),
        ({"backend": "fast"}, ["backend", "chunked", "fast"]),
        ({"num_heads": 5}, ["embed_dim", "num_heads"]),
        (
            {"self_attention": True, "encoder_decoder_attention": True},
            ["self_attention", "encoder_decoder_attention"],
        ),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_wrong_option_is_named(options, words):
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(**{"embed_dim": 12, "num_heads": 3, **options})
    assert_one_line(error, *words)


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
@pytest.mark.parametrize("rule", ["sum", "delta", "gated-sum", "gated-sum-peng"])
def test_signed_map_has_no_attention_normalization(rule, feature_map):
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(12, 3, update_rule=rule, feature_map=feature_map, attention_normalization="true")
    assert_one_line(error, feature_map, "attention_normalization")


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
def test_signed_map_with_the_paper_s_sum_rule_is_refused(feature_map):
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(12, 3, update_rule="sum", feature_map=feature_map)
    assert_one_line(error, feature_map, "attention_normalization")


@pytest.mark.parametrize("feature_map", SIGNED_MAPS)
@pytest.mark.parametrize("rule", RULES)
def test_signed_map_has_no_sum_normalization(rule, feature_map):
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(
            12,
            3,
            update_rule=rule,
            feature_map=feature_map,
            attention_normalization="false",
            key_normalization="sum",
        )
    assert_one_line(error, feature_map, "key_normalization")


@pytest.mark.parametrize("feature_map", POSITIVE_MAPS)
@pytest.mark.parametrize("rule", RULES)
def test_what_the_paper_used_is_the_default(rule, feature_map):
    attention = FastWeightAttention(12, 3, update_rule=rule, feature_map=feature_map, favor_features=4)
    delta = "delta" in rule
    assert attention.key_normalization == ("sum" if delta else "none")
    assert attention.normalized == (not delta)


def test_options_of_other_maps_are_ignored():
    FastWeightAttention(12, 3, feature_map="elu", dpfp_nu=10**6, favor_features=None)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 12)])
def test_query_of_another_shape_is_named(shape):
    attention = build_attention(Case("delta", "elu", False), "causal")
    x = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(FastWeightError) as error:
        attention(x, x, x)
    assert_one_line(error, "query", "12", str(shape))


@pytest.mark.parametrize("site", ["causal", "bidirectional"])
def test_self_attention_of_source_and_target_is_refused(site):
    attention = build_attention(Case("delta", "elu", False), site)
    x, both = sentences(3, 2), sentences(7, 2)
    with pytest.raises(FastWeightError) as error:
        attention(x, both, both)
    assert_one_line(error, "cross_self_attention", "self-attention")


def test_before_softmax_is_refused():
    attention = build_attention(Case("delta", "elu", False), "causal")
    x = sentences(3, 2)
    with pytest.raises(FastWeightError) as error:
        attention(x, x, x, before_softmax=True)
    assert_one_line(error, "before_softmax")


def test_mask_in_the_encoder_is_refused():
    attention = build_attention(Case("delta", "elu", False), "bidirectional")
    x = sentences(3, 2)
    with pytest.raises(FastWeightError) as error:
        attention(x, x, x, attn_mask=torch.zeros(3, 3))
    assert_one_line(error, "attn_mask")
