"""Two updates and a search with a serial rule, by fairseq's commands."""

import re

import pytest
from commands import PACKAGE, hypotheses, load, run, run_logged, train_lm, train_translation


@pytest.mark.parametrize(
    "flags",
    [
        "--update-rule recurrent-delta-net --feature-map softmax --update-rule-cross delta",
        "--update-rule delta-mlp --delta-mlp-depth 2 --update-rule-encoder delta",
    ],
    ids=lambda flags: flags.split()[1],
)
def test_translation_is_trained_and_generates(data, tmp_path, flags):
    checkpoint = train_translation(data.pairs, tmp_path, *flags.split(), "--max-update", 2)
    assert any("decoder.layers.0.self_attn.rule." in name for name in load(checkpoint)["model"])
    search = "--beam 3 --max-len-a 0 --max-len-b 12 --num-workers 0 --cpu".split()
    generate = [data.pairs, "--path", checkpoint, "--user-dir", PACKAGE, *search]
    found = hypotheses(run("generate", *generate, "--batch-size", 8))
    assert sorted(found) == list(range(21))
    assert hypotheses(run("generate", *generate, "--batch-size", 1)) == found


@pytest.mark.parametrize("rule", ["delta-rnn", "delta-lstm"])
def test_language_model_is_trained_and_evaluated(data, tmp_path, rule):
    checkpoint = train_lm(data.words, tmp_path, "--update-rule", rule, "--max-update", 2)
    log = run_logged(
        *("eval_lm", data.words, "--path", checkpoint, "--user-dir", PACKAGE),
        *("--tokens-per-sample", 16, "--batch-size", 4, "--num-workers", 0, "--cpu"),
    )
    assert 1 < float(re.search(r"Perplexity: ([\d.]+)", log)[1]) < 40
