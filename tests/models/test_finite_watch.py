"""--fast-weight-stats on whole models: the module is named in which the first value that is not finite comes up."""

import copy
import logging
import math

import pytest
import torch
from tiny_models import WORDS, lm_model, source_batch, translation_model

from fairseq_fastweights.modules.finite import watched_modules

MODELS = {
    "lm": lambda **options: lm_model(update_rule="delta", **options),
    "translation": translation_model,
}


def call(model):
    tokens, lengths = source_batch(left_pad=True)
    target, _ = source_batch(lengths=(3, 5, 2, 4), left_pad=False)
    if not hasattr(model, "encoder"):
        return model(target)[0]
    return model(tokens, lengths, target)[0]


def training(kind, update=7, **options):
    """A model that fairseq is about to train."""
    model = MODELS[kind](fast_weight_stats=1000, **{"decoder_layers": 2, **options}).train()
    model.set_num_updates(update - 1)
    return model


@pytest.fixture
def warned(caplog):
    def lines(model):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fairseq_fastweights"):
            call(model)
        return [record.getMessage() for record in caplog.records]

    return lines


def poison(model, name, value=math.nan):
    """A value in one parameter, in the row of a word that comes in every batch where it is an embedding."""
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.view(len(parameter), -1)[WORDS.eos() if "embed" in name else 0, 0] = value


PLACES = [
    ("lm", "decoder.embed_tokens.weight"),
    ("lm", "decoder.layers.0.self_attn.out_proj.weight"),
    ("lm", "decoder.layers.0.fc1.weight"),
    ("lm", "decoder.layers.1.fc2.bias"),
    ("lm", "decoder.layers.1.final_layer_norm.weight"),
    ("translation", "encoder.embed_tokens.weight"),
    ("translation", "encoder.layers.0.fc2.weight"),
    ("translation", "encoder.layers.0.self_attn_layer_norm.bias"),
    ("translation", "decoder.layers.0.encoder_attn.out_proj.weight"),
    ("translation", "decoder.layers.1.encoder_attn_layer_norm.weight"),
    ("translation", "decoder.output_projection.weight"),
]


@pytest.mark.parametrize("kind, parameter", PLACES, ids=lambda x: x.replace("decoder.", ""))
def test_the_module_is_named(warned, kind, parameter):
    model = training(kind)
    assert warned(model) == []
    poison(model, parameter)
    (line,) = warned(model)
    module = parameter.rpartition(".")[0]
    assert line == f"first non-finite value: {module}, tensor output (nan), update 7"


def test_an_overflow_of_a_residual_is_the_input_of_what_comes_next(warned):
    model = training("lm", decoder_layers=1)
    layer = model.decoder.layers[0]
    with torch.no_grad():
        for part in (layer.self_attn_layer_norm, layer.fc2):
            part.weight.zero_()
            part.bias.fill_(3e38)
        layer.fc1.weight.zero_()
    (line,) = warned(model)
    assert line == "first non-finite value: decoder.layers.0.final_layer_norm, tensor input (inf), update 7"


@pytest.mark.parametrize("layer", ["head", "tail.0.0"])
def test_an_adaptive_softmax_is_a_pass_of_its_own(warned, caplog, layer):
    """It runs in the criterion, after the model."""
    model = training("lm", adaptive_softmax_cutoff="8,12")
    softmax, target = model.decoder.adaptive_softmax, source_batch(left_pad=False)[0]
    softmax(call(model), target)
    assert model.finite_watch.trace.bounds is None
    poison(model, f"decoder.adaptive_softmax.{layer}.weight")
    assert warned(model) == []
    with caplog.at_level(logging.WARNING, "fairseq_fastweights"):
        softmax(call(model), target)
    (record,) = caplog.records
    place = f"decoder.adaptive_softmax.{layer}"
    assert record.getMessage() == f"first non-finite value: {place}, tensor output (nan), update 7"


def test_fast_weights_are_named_as_before_and_what_follows_is_not_blamed(warned):
    model = training("lm")
    poison(model, "decoder.layers.0.self_attn.v_proj.weight")
    (line,) = warned(model)
    assert "decoder layer 0 self-attention (decoder.layers.0.self_attn), tensor v (nan in" in line
    assert warned(model) == []  # once


def test_validation_says_so(warned):
    model = training("translation", update=4).eval()
    poison(model, "decoder.layers.1.fc1.weight")
    (line,) = warned(model)
    assert line.endswith("decoder.layers.1.fc1, tensor output (nan), validation after update 4")


@pytest.mark.parametrize("kind", MODELS)
def test_training_has_the_same_bits(kind):
    results = []
    for interval in (0, 1000):
        model = MODELS[kind](fast_weight_stats=interval, decoder_layers=2).train()
        model.set_num_updates(0)
        torch.manual_seed(3)
        out = call(model)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_copy_watches_itself(warned):
    """As fairseq's EMA makes one."""
    model = training("lm")
    other = copy.deepcopy(model)
    poison(other, "decoder.layers.0.fc1.weight")
    assert warned(model) == [] and len(warned(other)) == 1
    assert model.finite_watch.trace.bounds is None and other.finite_watch.watched == [other]


def test_a_model_that_is_not_trained_has_no_hooks():
    model = MODELS["translation"](fast_weight_stats=10).eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.jit.script(model.encoder.layers[0])


def test_decoding_during_training_keeps_nothing():
    """As --eval-bleu does: the decoder is called by itself."""
    model = training("lm").eval()
    for _ in range(3):
        model.decoder(source_batch(left_pad=False)[0])
    assert model.finite_watch.trace.bounds is None


def test_what_is_watched():
    names = {name for name, _ in watched_modules(training("lm", decoder_layers=1))}
    assert "decoder.layers.0.self_attn.out_proj" in names and "decoder.embed_tokens" in names
    assert not any("q_proj" in name or "beta_proj" in name for name in names)
