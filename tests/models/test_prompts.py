"""A prompt that is read at once gives the tokens and scores of one read step by step."""

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import WORDS, lively, lm_model

from fairseq_fastweights.models import prompts as prompts_module
from fairseq_fastweights.models.prompts import common_length

RULES = {
    "delta": {},
    "delta-normalized": {"attention_normalization": "true"},
    "sum": {},
    "gated-delta": {},
    "gated-sum-peng": {},
    "delta-lstm": {},
}
EOS, PAD = WORDS.eos(), WORDS.pad()
PROMPTS = {
    "equal": [[5, 6, 7, 8, 9, 10], [9, 5, 6, 4, 4, 7]],
    "ragged": [[5, 6, 7, PAD, PAD, PAD], [9, 5, 6, 4, 4, 7], [4, 4, 8, 9, PAD, PAD]],
    "eos inside": [[5, 6, 7, EOS, 8], [9, 5, 6, 4, 4]],
    "eos at the end": [[5, 6, 7, 8, EOS], [9, 5, 6, EOS, PAD]],
    "one token": [[5], [6]],
    "longer than allowed": [[5, 6, 7, 8, 9, 10, 4, 5, 6, 7, 8, 9, 10, 11, 12]] * 2,
}


def search(models, prompt, beam, **options):
    generator = SequenceGenerator(models, WORDS, beam_size=beam, max_len_b=11, **options)
    sample = {"net_input": {"src_tokens": prompt, "src_lengths": (prompt != PAD).sum(1)}}
    return generator.generate(models, sample, prefix_tokens=prompt, bos_token=EOS)


@pytest.fixture
def lengths_scanned(monkeypatch):
    """The length of every scan of prompts."""
    lengths, read = [], prompts_module.Prompt.read

    def noted(prompt):
        lengths.append(prompt.tokens.shape[1])
        read(prompt)

    monkeypatch.setattr(prompts_module.Prompt, "read", noted)
    return lengths


def stepwise(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(prompts_module, "common_length", lambda *_: 0)
        return search(*arguments, **options)


def assert_same_hypotheses(found, expected):
    assert len(found) == len(expected)
    for sentence, truth in zip(found, expected, strict=True):
        assert len(sentence) == len(truth)
        for a, b in zip(sentence, truth, strict=True):
            if torch.isfinite(b["score"]):
                assert a["tokens"].tolist() == b["tokens"].tolist()
                torch.testing.assert_close(a["positional_scores"], b["positional_scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_prompts_read_at_once(monkeypatch, lengths_scanned, rule, positions):
    options = {"update_rule": rule.partition("-normalized")[0], **RULES[rule]}
    model = lively(lm_model(**options, no_token_positional_embeddings=not positions))
    scanned = {"equal": 6, "ragged": 3, "eos inside": 3, "eos at the end": 3, "longer than allowed": 15}
    for name, rows in PROMPTS.items():
        for beam in (1, 3):
            prompt = torch.tensor(rows)
            expected = stepwise(monkeypatch, [model], prompt, beam)
            assert lengths_scanned == []
            assert_same_hypotheses(search([model], prompt, beam), expected)
            assert lengths_scanned == ([scanned[name]] if name in scanned else []), name
            lengths_scanned.clear()
    assert "forward" not in vars(model.decoder)


def test_a_prompt_longer_than_the_models_positions_is_cut_as_fairseq_cuts_it(monkeypatch, lengths_scanned):
    model = lively(lm_model(update_rule="delta", decoder_learned_pos=True))
    longest = model.max_positions()
    prompt = torch.arange(2 * (longest + 6)).view(2, -1) % 7 + WORDS.nspecial
    expected = stepwise(monkeypatch, [model], prompt, 2)
    assert_same_hypotheses(search([model], prompt, 2), expected)
    assert lengths_scanned == [longest]


def test_ensembles_and_adaptive_softmax(monkeypatch, lengths_scanned):
    adaptive = {"adaptive_softmax_cutoff": "8,12", "adaptive_softmax_dropout": 0.0}
    for models in (
        [lively(lm_model(update_rule="delta"), seed) for seed in (7, 8)],
        [lively(lm_model(update_rule="delta", **adaptive))],
    ):
        prompt = torch.tensor(PROMPTS["ragged"])
        expected = stepwise(monkeypatch, models, prompt, 3, temperature=1.5)
        assert_same_hypotheses(search(models, prompt, 3, temperature=1.5), expected)
        assert lengths_scanned == [3] * len(models)
        lengths_scanned.clear()


def test_softmax_reads_step_by_step(lengths_scanned):
    model = lively(lm_model(update_rule="softmax"))
    search([model], torch.tensor(PROMPTS["equal"]), 2)
    assert lengths_scanned == []


def test_a_failed_search_leaves_the_decoder_as_it_was(monkeypatch):
    model = lively(lm_model(update_rule="delta"))
    with pytest.raises(AssertionError, match="min_len"):
        search([model], torch.tensor(PROMPTS["equal"]), 2, min_len=99)
    assert "forward" not in vars(model.decoder)


def test_common_length():
    lengths = {"equal": 6, "ragged": 3, "eos inside": 3, "eos at the end": 3, "one token": 1}
    for name, length in lengths.items():
        assert common_length(torch.tensor(PROMPTS[name]), EOS, PAD) == length
