"""Checkpoints of fairseq 0.12.2 load; those of another model are refused in one line."""

import pytest
import torch
from tiny_models import lm_model, translation_model

from fairseq_fastweights import FastWeightError


def test_fused_copies_of_fairseq_0_12_2_are_dropped():
    model = translation_model(update_rule_encoder="softmax")
    state = model.state_dict()
    for part in ("in_proj", "out_proj", "fc1", "fc2"):
        for kind in ("weight", "bias"):
            state[f"encoder.layers.0.{part}_{kind}"] = torch.zeros(3)
    other = translation_model(update_rule_encoder="softmax")
    torch.nn.init.zeros_(other.encoder.layers[0].fc1.weight)
    other.load_state_dict(state)
    assert torch.equal(other.encoder.layers[0].fc1.weight, model.encoder.layers[0].fc1.weight)


def assert_one_clear_line(model, state, *words):
    with pytest.raises(FastWeightError) as error:
        model.load_state_dict(state)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for word in ("checkpoint", "--update-rule", *words):
        assert word in message, message


@pytest.mark.parametrize("build", [translation_model, lm_model])
def test_checkpoint_of_another_rule_is_one_line(build):
    name = "layers.0.self_attn.rule.beta_proj.weight"
    assert_one_clear_line(build(update_rule="delta"), build(update_rule="sum").state_dict(), name)
    assert_one_clear_line(build(update_rule="sum"), build(update_rule="delta").state_dict(), name)


@pytest.mark.parametrize("build", [translation_model, lm_model])
def test_checkpoint_of_another_shape_is_one_line(build):
    wide = build(decoder_ffn_embed_dim=20)
    assert_one_clear_line(build(), wide.state_dict(), "fc1", "20", "8")


def test_checkpoint_of_another_number_of_features_is_one_line():
    state = translation_model(feature_map="favor", favor_features=5).state_dict()
    model = translation_model(feature_map="favor", favor_features=4)
    assert_one_clear_line(model, state, "projection", "5", "4")


def test_what_fits_is_loaded_exactly():
    model, other = translation_model(feature_map="favor"), translation_model(feature_map="favor")
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(model.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
