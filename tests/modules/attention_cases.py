"""Every rule and feature map that go together, and small attentions of them. Shared by the tests."""

from typing import NamedTuple

import torch

from fairseq_fastweights.modules import FastWeightAttention

EMBED_DIM, HEADS, SOURCE_DIM = (
    12,
    3,
    10,
)  # an odd number of heads; the source has a width of its own
SITES = ("causal", "bidirectional", "cross")
POSITIVE_MAPS = ("elu", "relu", "dpfp", "favor", "softmax")
SIGNED_MAPS = ("tanh", "identity")
MAP_OPTIONS = {"dpfp": {"dpfp_nu": 2}, "favor": {"favor_features": 6}}


class Case(NamedTuple):
    """One allowed combination; its str is the id of the test."""

    rule: str
    feature_map: str
    normalized: bool

    def __str__(self) -> str:
        kind = "normalized" if self.normalized else "plain"
        return f"{self.rule}-{self.feature_map}-{kind}"


CASES = [
    Case(rule, feature_map, normalized)
    for rule in ("sum", "delta", "gated-sum", "gated-delta", "gated-sum-peng")
    for feature_map in POSITIVE_MAPS + SIGNED_MAPS
    for normalized in (True, False)
    # refused: the normaliser of a signed map can vanish; a decayed delta rule has no normaliser
    if not (normalized and (feature_map in SIGNED_MAPS or rule == "gated-delta"))
]
FEW_CASES = [
    Case("sum", "elu", True),
    Case("sum", "identity", False),
    Case("delta", "dpfp", False),
    Case("delta", "elu", True),
    Case("gated-sum", "favor", True),
    Case("gated-delta", "tanh", False),
    Case("gated-sum-peng", "relu", True),
]


def build_attention(case: Case, site: str, **options) -> FastWeightAttention:
    """A float64 attention in eval mode whose parameters, biases included, are not zero."""
    torch.manual_seed(1)
    source = {"kdim": SOURCE_DIM, "vdim": SOURCE_DIM, "encoder_decoder_attention": True}
    attention = FastWeightAttention(
        EMBED_DIM,
        HEADS,
        **(source if site == "cross" else {"causal": site == "causal"}),
        update_rule=case.rule,
        feature_map=case.feature_map,
        attention_normalization=case.normalized,
        **{**MAP_OPTIONS.get(case.feature_map, {}), **options},
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention.double().eval()


def sentences(tokens: int, rows: int, width: int = EMBED_DIM) -> torch.Tensor:
    """Random inputs (T, B, width)."""
    return torch.randn(tokens, rows, width, dtype=torch.float64)


def attend(attention, x, source=None, **options) -> torch.Tensor:
    """The output of any site: self-attention of x, or x reading ``source``."""
    other = x if source is None else source
    return attention(x, other, other, **options)[0]


def buffer_of(attention, incremental_state) -> dict:
    """What the attention keeps between decoding steps."""
    return attention._get_input_buffer(incremental_state)


def assert_same(result, expected, tolerance: float = 1e-9) -> None:
    """Equal to ``tolerance`` times the largest magnitude; NaN is never equal."""
    assert result.shape == expected.shape
    error = (result.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"error {error}"
