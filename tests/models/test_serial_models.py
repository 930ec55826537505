"""Serial rules in whole models: beam search, padding, activation checkpointing, and what is refused."""

import pytest
import torch
from tiny_models import (
    lively,
    lm_model,
    single,
    source_batch,
    teacher_forced_scores,
    translate,
    translation_model,
)

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.inspection.record import recording
from fairseq_fastweights.update_rules import UPDATE_RULES

RULES = [name for name, rule in UPDATE_RULES.items() if rule.serial]


def options_of(rule):
    return {"update_rule": rule, "feature_map": "softmax" if rule == "recurrent-delta-net" else "elu"}


@pytest.mark.parametrize("rule", RULES)
def test_beam_search_scores_as_one_forward_pass_does(rule):
    model = lively(translation_model(**options_of(rule), delta_mlp_depth=2))
    tokens, lengths = source_batch()
    for (source, length), found in zip(
        single(tokens), translate(model, tokens, lengths, beam=3), strict=True
    ):
        for hypothesis in found:
            expected = teacher_forced_scores(model, hypothesis, source, length)
            assert (hypothesis["positional_scores"] - expected).abs().max() < 5e-5


@pytest.mark.parametrize("rule", RULES)
def test_language_model_is_trained_everywhere_and_checkpointing_changes_no_gradient(rule):
    tokens, _ = source_batch(left_pad=False)
    grads = []
    for saving in (False, True):
        model = lm_model(**options_of(rule), checkpoint_activations=saving).train()
        model(tokens)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name
        assert torch.equal(grads[1][name], grad), name


def test_depth_reaches_the_rule():
    assert lm_model(update_rule="delta-mlp", delta_mlp_depth=3).decoder.layers[0].self_attn.rule.depth == 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("site", ["update_rule_encoder", "update_rule_cross"])
def test_other_sites_are_refused_in_one_line(site, rule):
    with pytest.raises(FastWeightError, match=f"^update rule {rule} is for causal self-attention only.*$"):
        translation_model(**{**options_of(rule), "update_rule": "delta", site: rule})


@pytest.mark.parametrize("rule", RULES)
def test_torchscript_and_inspection_are_refused_in_one_line(rule):
    model = lm_model(**options_of(rule))
    with pytest.raises(FastWeightError, match=f"^update rule {rule} .*TorchScript.*$"):
        torch.jit.script(model.decoder)
    with pytest.raises(
        FastWeightError, match=f"^decoder.layers.0.self_attn has the serial update rule {rule}.*$"
    ):
        with recording(model):
            pass
