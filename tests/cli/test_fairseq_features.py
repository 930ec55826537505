"""What fairseq offers for search and training, with fast weights at all three sites of a translation model."""

import re

import pytest
import torch
from commands import (
    EVERYWHERE,
    PACKAGE,
    SEARCH,
    TINY,
    assert_same_tree,
    generate,
    hypotheses,
    load,
    run,
    run_logged,
    train_translation,
)
from conversions import load_model
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_fastweights.errors import FastWeightError


def lines(data, language):
    return (data.text / f"test.{language}").read_text().splitlines()


def word_scores(output) -> dict[int, torch.Tensor]:
    """Sentence number -> log2-probabilities of the words of its best hypothesis and of its end, as printed."""
    return {
        int(n): torch.tensor([float(x) for x in numbers.split()])
        for n, numbers in re.findall(r"^P-(\d+)\t(.*)$", output, re.MULTILINE)
    }


@torch.no_grad()
def model_scores(checkpoint, source, hypothesis) -> torch.Tensor:
    """The same by one pass of the model over the whole hypothesis."""
    model, task = load_model(checkpoint)
    words = task.source_dictionary.encode_line(source, add_if_not_exist=False).long()[None]
    target = task.target_dictionary.encode_line(hypothesis, add_if_not_exist=False).long()
    previous = torch.cat([target[-1:], target[:-1]])[None]
    logits, _ = model(words, torch.tensor([words.shape[1]]), previous)
    scores = logits[0].log_softmax(-1).gather(1, target[:, None])[:, 0]
    return scores / torch.tensor(2.0).log()


def assert_scores_are_the_models(data, checkpoints, output):
    """Every word has the log-probability that the (mean of the) models give it when they read the whole at once."""
    found, scores = hypotheses(output), word_scores(output)
    assert sorted(found) == sorted(scores) == list(range(21))
    for number, text in found.items():
        each = [model_scores(path, lines(data, "en")[number], text) for path in checkpoints]
        wanted = torch.stack(each).exp2().mean(0).log2()
        assert torch.allclose(scores[number], wanted, atol=2e-3), (number, text)


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """Another checkpoint: gated-delta in the decoder, softmax elsewhere."""
    save_dir = tmp_path_factory.mktemp("other")
    return train_translation(data.pairs, save_dir, "--update-rule", "gated-delta", "--max-update", 40)


def test_ensemble(data, translation, other):
    output = generate(data.pairs, f"{translation}:{other}", "--batch-size", 8)
    assert_scores_are_the_models(data, [translation, other], output)


def test_prefix(data, translation):
    output = generate(data.pairs, translation, "--batch-size", 8, "--prefix-size", 1)
    for number, text in hypotheses(output).items():
        assert text.split()[0] == lines(data, "xx")[number].split()[0]


def repeats(text) -> bool:
    words = text.split()
    pairs = list(zip(words, words[1:]))
    return len(set(pairs)) < len(pairs)


def test_no_pair_of_words_comes_twice(data, translation):
    flags = ["--batch-size", 8, "--min-len", 8]
    free = generate(data.pairs, translation, *flags)
    assert any(map(repeats, hypotheses(free).values()))
    output = generate(data.pairs, translation, *flags, "--no-repeat-ngram-size", 2)
    assert not any(map(repeats, hypotheses(output).values()))
    assert_scores_are_the_models(data, [translation], output)


def test_sampling(data, translation):
    flags = "--batch-size 8 --beam 1 --nbest 1 --sampling --sampling-topk 6 --seed".split()
    output = generate(data.pairs, translation, *flags, 1)
    assert_scores_are_the_models(data, [translation], output)
    assert hypotheses(generate(data.pairs, translation, *flags, 1)) == hypotheses(output)
    assert hypotheses(generate(data.pairs, translation, *flags, 2)) != hypotheses(output)


@pytest.mark.parametrize("order", ["ordered", "unordered"])
def test_lexical_constraints(data, translation, tmp_path, order):
    """Words that a free search does not choose stand in every translation."""
    wanted = ["xbig3", "xnoun7"]
    text = "".join("\t".join([source, *wanted]) + "\n" for source in lines(data, "en"))
    (tmp_path / "constrained").write_text(text)
    flags = [data.pairs, "--path", translation, *SEARCH, "--input", tmp_path / "constrained", "--beam", 8]
    output = run("interactive", *flags, "--constraints", order, "--buffer-size", 21, "--batch-size", 6)
    found = hypotheses(output)
    free = hypotheses(generate(data.pairs, translation)).values()
    assert not any(set(wanted) <= set(text.split()) for text in free)
    for number, text in found.items():
        places = [text.split().index(word) for word in wanted]
        assert order == "unordered" or places == sorted(places), number
    assert_scores_are_the_models(data, [translation], output)


def test_alignment(data, translation, other):
    with pytest.raises(FastWeightError, match="--print-alignment"):
        generate(data.pairs, translation, "--print-alignment")
    output = generate(data.pairs, other, "--print-alignment", "--batch-size", 8)  # softmax in cross-attention
    found = hypotheses(output)
    aligned = dict(re.findall(r"^A-(\d+)\t(.*)$", output, re.MULTILINE))
    assert sorted(map(int, aligned)) == sorted(found)
    for number, text in found.items():
        pairs = [tuple(map(int, pair.split("-"))) for pair in aligned[str(number)].split()]
        assert [target for _, target in pairs] == list(range(len(text.split())))
        assert all(0 <= source <= len(lines(data, "en")[number].split()) for source, _ in pairs)


def test_finetuning_begins_with_the_weights_alone(data, translation, tmp_path):
    flags = [*EVERYWHERE, "--finetune-from-model", translation, "--max-update", 1, "--lr", 0]
    state = load(train_translation(data.pairs, tmp_path, *flags))
    assert_same_tree(state["model"], load(translation)["model"])
    assert state["optimizer_history"][-1]["num_updates"] == 1


def test_moving_average_of_the_weights(data, tmp_path):
    """ema = 0.75 ema + 0.25 weights after an update, also in a run that is resumed."""
    flags = [*EVERYWHERE, "--store-ema", "--ema-decay", 0.75, "--ema-fp32"]
    states = {
        updates: load(train_translation(data.pairs, tmp_path / str(updates), *flags, "--max-update", updates))
        for updates in (1, 2)
    }
    before, after = (states[n]["extra_state"]["ema"] for n in (1, 2))
    weights = states[2]["model"]
    name = "decoder.layers.0.self_attn.rule.beta_proj.weight"
    assert name in after and not torch.equal(after[name], weights[name])
    for name, x in after.items():
        if "version" not in name:
            torch.testing.assert_close(x, 0.75 * before[name] + 0.25 * weights[name])
    # a run that is resumed goes on with it
    resumed = load(train_translation(data.pairs, tmp_path / "1", *flags, "--max-update", 2))
    assert_same_tree(resumed["extra_state"]["ema"], after)


def last_loss(data, folder, *more) -> float:
    """Of 20 updates."""
    rest = "--optimizer adam --lr 0.01 --batch-size 8 --dropout 0 --disable-validation --seed 3 --cpu"
    rest += " --max-update 20 --log-format json --log-interval 20"
    arch = ["--user-dir", PACKAGE, "--arch", "fast_weight_transformer", *TINY, *EVERYWHERE]
    log = run_logged("train", data.pairs, *arch, *rest.split(), "--save-dir", folder, *more)
    return float(re.findall(r'"loss": "([\d.]+)"', log)[0])


@pytest.fixture(scope="module")
def loss_in_float32(data, tmp_path_factory):
    return last_loss(data, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("flag", ["fp16", "memory-efficient-fp16", "bf16", "memory-efficient-bf16", "amp"])
def test_reduced_precision(data, tmp_path, loss_in_float32, flag):
    """As far as the CPU goes: it trains, near the run in float32, and the checkpoint translates."""
    assert last_loss(data, tmp_path, f"--{flag}") == pytest.approx(loss_in_float32, rel=0.02)
    path = tmp_path / "checkpoint_last.pt"
    weight = load(path)["model"]["decoder.layers.0.self_attn.q_proj.weight"]  # saved in float32
    trained_in = torch.bfloat16 if "bf16" in flag else torch.float16
    # amp keeps float32 weights, and does nothing else on the CPU
    assert torch.equal(weight, weight.to(trained_in).float()) == (flag != "amp")
    output = generate(data.pairs, path, "--batch-size", 8)
    assert len(hypotheses(output)) == 21


def test_fully_sharded_flags_are_parsed(data):
    parser = options.get_training_parser()
    flags = (
        "--ddp-backend fully_sharded --use-sharded-state --checkpoint-activations --min-params-to-wrap 100"
    )
    arch = ["--user-dir", PACKAGE, "--arch", "fast_weight_transformer", *TINY, *EVERYWHERE]
    args = options.parse_args_and_arch(
        parser, [str(data.pairs), *arch, *flags.split(), "--optimizer", "adam"]
    )
    cfg = convert_namespace_to_omegaconf(args)
    assert (
        cfg.distributed_training.ddp_backend == "fully_sharded" and cfg.distributed_training.use_sharded_state
    )
    assert cfg.model.checkpoint_activations and cfg.model.min_params_to_wrap == 100
    assert cfg.model.update_rule_cross == "delta"
