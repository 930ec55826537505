"""What fairseq's transformers can be besides plain: shared, adaptive, checkpointed, scripted, ..."""

from argparse import Namespace

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import (
    WORDS,
    build,
    lively,
    lm_model,
    source_batch,
    translate,
    translation_model,
)

from fairseq_fastweights import FastWeightError

EVERYWHERE = {
    rule: {"update_rule": rule, "update_rule_encoder": rule, "update_rule_cross": rule}
    for rule in ("sum", "delta", "gated-delta")
}


def translation_input():
    tokens, lengths = source_batch()
    target, _ = source_batch(lengths=(3, 5, 1, 4), left_pad=False)
    return tokens, lengths, target.roll(1, 1)


def gradients(model, inputs):
    torch.manual_seed(3)
    model.zero_grad()
    model.train()(*inputs)[0].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_every_parameter_is_trained(rule):
    model = translation_model(**EVERYWHERE[rule])
    found = gradients(model, translation_input())
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, grad in found.items():
        # a key's bias moves every score alike in softmax only, so here nothing is without effect
        assert grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_activation_checkpointing_changes_no_gradient(rule):
    plain = translation_model(**EVERYWHERE[rule], dropout=0.2)
    saving = translation_model(**EVERYWHERE[rule], dropout=0.2, checkpoint_activations=True)
    expected = gradients(plain, translation_input())
    for name, grad in gradients(saving, translation_input()).items():
        assert torch.equal(grad, expected[name]), name


def test_activation_checkpointing_recomputes_the_layers():
    model = translation_model(checkpoint_activations=True)
    calls = []
    model.decoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, translation_input())
    assert len(calls) == 2


def test_quant_noise_reaches_every_projection():
    model = translation_model(**EVERYWHERE["delta"], quant_noise_pq=0.5, quant_noise_pq_block_size=4)
    for attention in (model.decoder.layers[0].self_attn, model.encoder.layers[0].self_attn):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            assert getattr(attention, name)._forward_pre_hooks, name


def test_layerdrop_drops_whole_layers_in_training():
    model = translation_model(**EVERYWHERE["delta"], decoder_layers=4, decoder_layerdrop=0.5)
    model.train()
    calls = []
    for layer in model.decoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(8):
        model(*translation_input())
    assert 0 < len(calls) < 32


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_half_precision_model_is_close(rule):
    model = translation_model(**EVERYWHERE[rule]).eval()
    expected = model(*translation_input())[0]
    out = model.bfloat16()(*translation_input())[0]
    assert out.dtype == torch.bfloat16
    real = translation_input()[2] != WORDS.pad()
    assert (out.float() - expected)[real].abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_scripted_translation_model_equals_eager(rule):
    model = lively(translation_model(**EVERYWHERE[rule]))
    scripted = torch.jit.script(model)
    for _ in range(3):  # the second call recompiles
        torch.testing.assert_close(
            scripted(*translation_input())[0], model(*translation_input())[0], rtol=0, atol=1e-9
        )


def test_scripted_decoder_of_a_language_model_equals_eager():
    model = lively(lm_model(update_rule="delta")).decoder  # fairseq's model around it takes **kwargs
    scripted = torch.jit.script(model)
    tokens, _ = source_batch(left_pad=False)
    for _ in range(3):
        torch.testing.assert_close(scripted(tokens)[0], model(tokens)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_scripted_beam_search_equals_eager(rule):
    model = lively(translation_model(**EVERYWHERE[rule]))
    tokens, lengths = source_batch()
    scripted = torch.jit.script(SequenceGenerator([model], WORDS, beam_size=4, max_len_b=9))
    expected = translate(model, tokens, lengths)
    for _ in range(2):
        found = scripted({"net_input": {"src_tokens": tokens, "src_lengths": lengths}})
        for hypotheses, others in zip(found, expected, strict=True):
            for one, other in zip(hypotheses, others, strict=True):
                assert one["tokens"].tolist() == other["tokens"].tolist()
                assert (one["positional_scores"] - other["positional_scores"]).abs().max() < 1e-5


def test_shared_embeddings_are_one_parameter():
    model = translation_model(share_all_embeddings=True)
    shared = model.decoder.output_projection.weight
    assert shared is model.decoder.embed_tokens.weight is model.encoder.embed_tokens.weight


def test_positions_can_be_left_out():
    model = translation_model(no_token_positional_embeddings=True)
    assert model.encoder.embed_positions is None and model.decoder.embed_positions is None


def test_without_positions_the_delta_rule_still_knows_the_order():
    model = lively(lm_model(update_rule="delta", no_token_positional_embeddings=True))
    words = torch.tensor([[5, 6, 7, 8]])
    swapped = torch.tensor([[6, 5, 7, 8]])
    assert (model(words)[0] - model(swapped)[0])[0, -1].abs().max() > 1e-3


WIKITEXT = {
    "decoder_layers": 2,
    "adaptive_input_cutoff": "8,12",
    "adaptive_softmax_cutoff": "8,12",
    "decoder_ffn_embed_dim": 16,
    "tokens_per_sample": 32,
    "max_target_positions": 32,
}


@pytest.mark.parametrize("arch, width", [("small", 128), ("medium", 256)])
def test_wikitext_models_tie_one_adaptive_embedding(arch, width):
    model = build(f"fast_weight_lm_wt103_{arch}", **WIKITEXT)
    embedding, softmax = model.decoder.embed_tokens, model.decoder.adaptive_softmax
    assert len(softmax.tail) == len(embedding.embeddings) - 1 == 2
    assert softmax.head.word_proj.weight is embedding.embeddings[0][0].weight
    assert embedding.embeddings[0][0].weight.shape[1] == width


@pytest.mark.parametrize("arch, width", [("small", 128), ("medium", 256)])
def test_wikitext_attention_has_8_heads_and_no_biases(arch, width):
    model = build(f"fast_weight_lm_wt103_{arch}", **WIKITEXT)
    attention = model.decoder.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim) == (8, width // 8)
    assert not [name for name, _ in attention.named_parameters() if name.endswith("bias")]
    assert model.decoder.layer_norm is None  # post-norm


@pytest.mark.parametrize("build_model", [translation_model, lm_model])
def test_other_models_have_fairseq_s_biases(build_model):
    attention = build_model().decoder.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert getattr(attention, name).bias is not None


def test_adaptive_language_model_is_trained_everywhere():
    from fairseq.criterions.adaptive_loss import AdaptiveLoss

    model = build("fast_weight_lm_wt103_small", **WIKITEXT).train()
    task = Namespace(target_dictionary=WORDS)
    tokens, lengths = source_batch(lengths=(12, 9, 15), left_pad=False)
    sample = {"net_input": {"src_tokens": tokens}, "target": tokens.roll(-1, 1), "ntokens": 36}
    loss, *_ = AdaptiveLoss(task, sentence_avg=False)(model, sample)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert missing == []


def test_cross_self_attention_is_refused_in_one_line():
    with pytest.raises(FastWeightError, match="^--cross-self-attention .*") as error:
        translation_model(cross_self_attention=True)
    assert "\n" not in str(error.value)


def test_cross_self_attention_works_where_the_decoder_is_stock():
    translation_model(cross_self_attention=True, no_cross_attention=True, update_rule="softmax")


@pytest.mark.parametrize("rule, refused", [("delta", True), ("softmax", False)])
def test_alignment_is_refused_without_attention_weights(rule, refused):
    model = translation_model(update_rule_cross=rule)
    generation = Namespace(print_alignment="hard", no_beamable_mm=True, beam=4)
    cfg = Namespace(generation=generation, common=Namespace(fp16=False))
    if not refused:
        model.prepare_for_inference_(cfg)
        return
    with pytest.raises(FastWeightError, match="--print-alignment"):
        model.prepare_for_inference_(cfg)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"update_rule": "dleta"}, ["update rule", "dleta"]),
        ({"update_rule_encoder": "dleta"}, ["update rule", "dleta"]),
        ({"update_rule_cross": "dleta"}, ["update rule", "dleta"]),
        ({"feature_map": "dpfp", "dpfp_nu": 8}, ["dpfp nu", "7"]),
        ({"feature_map": "favor", "favor_features": None}, ["favor", "--favor-features"]),
        ({"update_rule": "sum", "feature_map": "tanh"}, ["tanh", "attention_normalization"]),
        ({"fast_weight_backend": "fast"}, ["backend", "fast"]),
        ({"fast_weight_chunk_size": -1}, ["chunk_size", "-1"]),
    ],
)
def test_wrong_option_is_named_in_one_line(options, words):
    with pytest.raises(FastWeightError) as error:
        translation_model(**options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
