"""Beam search scores every word as one forward pass over the finished hypothesis does."""

import pytest
import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import (
    SOFTMAX,
    WORDS,
    lively,
    lm_model,
    search,
    single,
    source_batch,
    teacher_forced_scores,
    translate,
    translation_model,
)

# float64 models, but fairseq takes each score as the difference of two float32 sums of up to a few 100
TOLERANCE = 5e-5
SITES = {"decoder": "update_rule", "encoder": "update_rule_encoder", "cross": "update_rule_cross"}
MAPS = ("elu", "relu", "dpfp", "favor", "softmax", "tanh", "identity")
CASES = [
    (rule, feature_map, normalization)
    for rule in ("sum", "delta", "gated-sum", "gated-delta", "gated-sum-peng")
    for feature_map in MAPS
    for normalization in ("true", "false")
    if not (normalization == "true" and (feature_map in MAPS[-2:] or rule == "gated-delta"))
]
ALL_SITES = {
    f"{rule}-{feature_map}": {
        "update_rule": rule,
        "update_rule_encoder": rule,
        "update_rule_cross": rule,
        "feature_map": feature_map,
    }
    for rule, feature_map in [("sum", "elu"), ("delta", "dpfp"), ("gated-delta", "tanh")]
}
VARIANTS = {
    "pre-norm": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "two layers": {"encoder_layers": 2, "decoder_layers": 2},
    "no positions": {"no_token_positional_embeddings": True},
    "shared embeddings": {"share_all_embeddings": True},
    "learned positions": {
        "encoder_learned_pos": True,
        "decoder_learned_pos": True,
        "max_source_positions": 32,
        "max_target_positions": 32,
    },
    "adaptive softmax": {"adaptive_softmax_cutoff": "8,12"},
    "layerdrop": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    "quant noise": {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 4},
    "checkpointing": {"checkpoint_activations": True},
    "no biases": {"no_projection_bias": True},
    "other source width": {"encoder_embed_dim": 8, "encoder_attention_heads": 2},
    "no cross-attention": {"no_cross_attention": True},
}


def assert_exact(model, tokens, lengths, beam=4):
    hypotheses = translate(model, tokens, lengths, beam=beam)
    for (source, length), found in zip(single(tokens), hypotheses, strict=True):
        assert len(found) == beam
        for hypothesis in found:
            expected = teacher_forced_scores(model, hypothesis, source, length)
            error = (hypothesis["positional_scores"] - expected).abs().max()
            assert error < TOLERANCE, f"error {error}"
    return hypotheses


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_rule_and_map_is_exact_at_every_site(case, site):
    rule, feature_map, normalization = case
    options = {**SOFTMAX, SITES[site]: rule, "feature_map": feature_map}
    model = translation_model(**options, attention_normalization=normalization)
    for seed in range(10):
        hypotheses = assert_exact(lively(model, seed), *source_batch(), beam=3)
        ends = {max(len(h["tokens"]) for h in found) for found in hypotheses}
        if len(ends) > 1:  # some sentence left the batch before the others
            return
    pytest.fail("no search was worth the name")


@pytest.mark.parametrize("rules", ALL_SITES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_is_exact(variant, rules):
    model = lively(translation_model(**{**ALL_SITES[rules], **VARIANTS[variant]}))
    if variant == "adaptive softmax":  # has no logits of its own to score by
        assert_batch_equals_singles(model, *source_batch())
    else:
        assert_exact(model, *source_batch(), beam=5)


def assert_batch_equals_singles(model, tokens, lengths):
    together = translate(model, tokens, lengths)
    for found, (source, length) in zip(together, single(tokens), strict=True):
        (alone,) = translate(model, source, length)
        for one, other in zip(found, alone, strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(
                one["positional_scores"], other["positional_scores"], rtol=0, atol=TOLERANCE
            )


@pytest.mark.parametrize("rules", ALL_SITES)
@pytest.mark.parametrize("left_pad", [True, False], ids=["left", "right"])
def test_ragged_batch_finds_what_its_sentences_find_alone(rules, left_pad):
    model = lively(translation_model(**ALL_SITES[rules]))
    assert_batch_equals_singles(model, *source_batch(left_pad=left_pad))


@pytest.mark.parametrize("rules", ALL_SITES)
def test_identical_sentences_find_the_same(rules):
    model = lively(translation_model(**ALL_SITES[rules]))
    tokens, lengths = source_batch()
    together = translate(model, tokens[:1].expand(3, -1), lengths[:1].expand(3))
    assert len({str([h["tokens"].tolist() for h in found]) for found in together}) == 1


@pytest.mark.parametrize("rules", ALL_SITES)
def test_greedy_search_after_a_beam_search_is_exact(rules):
    # the beam size of the first search must not be taken for that of the second
    model = lively(translation_model(**ALL_SITES[rules]))
    tokens, lengths = source_batch()
    assert_exact(model, tokens, lengths, beam=4)
    assert_exact(model, tokens, lengths, beam=1)
    assert_exact(model, tokens[:1].expand(4, -1), lengths[:1].expand(4), beam=1)


def test_sampling_equal_sentences_after_a_beam_search_is_exact():
    # rows that look like the beams of the search before, and end at different times
    model = lively(translation_model(**ALL_SITES["delta-dpfp"]))
    tokens, lengths = source_batch()
    translate(model, tokens, lengths, beam=4)
    generator = SequenceGenerator([model], WORDS, beam_size=1, max_len_b=9, search_strategy=Sampling(WORDS))
    net_input = {"src_tokens": tokens[:1].expand(8, -1), "src_lengths": lengths[:1].expand(8)}
    found = generator.generate([model], {"net_input": net_input})
    assert len({len(hypothesis["tokens"]) for (hypothesis,) in found}) > 1
    for (hypothesis,) in found:
        expected = teacher_forced_scores(model, hypothesis, tokens[:1], lengths[:1])
        assert (hypothesis["positional_scores"] - expected).abs().max() < TOLERANCE


def test_search_is_exact_in_float32():
    model = lively(translation_model(**ALL_SITES["delta-dpfp"])).float()
    tokens, lengths = source_batch()
    for (source, length), found in zip(single(tokens), translate(model, tokens, lengths), strict=True):
        for hypothesis in found:
            expected = teacher_forced_scores(model, hypothesis, source, length)
            assert (hypothesis["positional_scores"] - expected).abs().max() < 1e-4


def test_given_first_words_are_followed_exactly():
    model = lively(translation_model(**ALL_SITES["delta-dpfp"]))
    tokens, lengths = source_batch()
    prefix = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    found = translate(model, tokens, lengths, prefix_tokens=prefix)
    for (source, length), words, hypotheses in zip(single(tokens), prefix, found, strict=True):
        for hypothesis in hypotheses:
            assert hypothesis["tokens"][:2].tolist() == words.tolist()
            expected = teacher_forced_scores(model, hypothesis, source, length)
            # fairseq scores given words apart
            assert (hypothesis["positional_scores"] - expected)[2:].abs().max() < TOLERANCE


def test_ensemble_of_a_fast_weight_and_a_stock_model_is_exact():
    fast = lively(translation_model(**ALL_SITES["delta-dpfp"]))
    stock = lively(translation_model(**SOFTMAX))
    tokens, lengths = source_batch()
    generator = SequenceGenerator([fast, stock], WORDS, beam_size=3, max_len_b=9)
    net_input = {"src_tokens": tokens, "src_lengths": lengths}
    found = generator.generate([fast, stock], {"net_input": net_input})
    for (source, length), hypotheses in zip(single(tokens), found, strict=True):
        for hypothesis in hypotheses:
            scores = [teacher_forced_scores(m, hypothesis, source, length) for m in (fast, stock)]
            mean = torch.stack(scores).logsumexp(0) - torch.tensor(2.0).log()
            assert (hypothesis["positional_scores"] - mean).abs().max() < TOLERANCE


@pytest.mark.parametrize("options", ALL_SITES.values(), ids=ALL_SITES)
def test_language_model_continues_ragged_prompts_exactly(options):
    model = lively(lm_model(update_rule=options["update_rule"], feature_map=options["feature_map"]))
    prompts, lengths = source_batch(lengths=(4, 1, 2), left_pad=False)
    prompts = prompts.masked_fill(prompts == WORDS.eos(), WORDS.pad())[:, :-1]
    net_input = {"src_tokens": prompts, "src_lengths": lengths - 1}
    found = search(model, net_input, prefix_tokens=prompts)
    for prompt, length, hypotheses in zip(prompts, lengths - 1, found, strict=True):
        for hypothesis in hypotheses:
            assert hypothesis["tokens"][:length].tolist() == prompt[:length].tolist()
            expected = teacher_forced_scores(model, hypothesis)
            error = (hypothesis["positional_scores"] - expected)[length:].abs().max()
            assert error < TOLERANCE


def test_search_keeps_one_cross_attention_state_per_sentence():
    model = lively(translation_model(**ALL_SITES["delta-dpfp"]))
    attention = model.decoder.layers[0].encoder_attn
    kept = []
    keep = attention._set_input_buffer
    attention._set_input_buffer = lambda state, buffer: kept.append(buffer) or keep(state, buffer)
    translate(model, *source_batch(), beam=4)
    assert kept[0]["state"].shape[:2] == (4, 4)
    for buffer in kept:
        state = buffer["state"]
        one = state[0, 0].numel() * state.element_size()
        assert state.untyped_storage().nbytes() == state.shape[0] * one
