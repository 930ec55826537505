"""fairseq's commands with --task stateful_language_modeling: runs that stop, run on two processes, evaluate a text."""

import math
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from commands import (
    PACKAGE,
    TINY_LM,
    TRAIN,
    assert_same_training,
    assert_same_tree,
    load,
    run,
    run_logged,
)
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from fairseq_cli import eval_lm
from test_training_runs import two_processes

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.tasks import text_streams

MODEL = ["--user-dir", PACKAGE, "--arch", "fast_weight_lm", *TINY_LM, "--no-token-positional-embeddings"]
TASK = "--task stateful_language_modeling --tokens-per-sample 16 --max-target-positions 64".split()
VALIDATING = [flag for flag in TRAIN if flag != "--disable-validation"]


def train(data, save_dir, *flags, common=VALIDATING):
    """In this process; the last checkpoint. 120 sentences, about 600 tokens, 8 streams: 5 segments an epoch."""
    run("train", data.words, *MODEL, *TASK, *common, "--save-dir", save_dir, *flags)
    return save_dir / "checkpoint_last.pt"


def tokens(data) -> int:
    """Of the training text."""
    dictionary = Dictionary.load(str(data.words / "dict.txt"))
    text = data_utils.load_indexed_dataset(
        str(data.words / "train"), dictionary
    )  # closes its file at its end
    return int(sum(text.sizes))


def segments_of_an_epoch(data, streams=8, length=16):
    return math.ceil(math.ceil(tokens(data) / streams) / length)


# --- training

RUNS = {
    "delta": ["--batch-size-valid", "3"],
    "normalized": ["--attention-normalization", "true"],
    "accumulated": ["--update-rule", "gated-delta", "--update-freq", "2", "--state-gradient"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_run_equals_the_run_that_was_not_stopped(data, tmp_path, kind):
    updates = math.ceil(segments_of_an_epoch(data) / (2 if kind == "accumulated" else 1))  # an epoch
    assert updates > 2
    flags = [*RUNS[kind], "--validate-interval-updates", "1"]
    expected = train(data, tmp_path / "whole", *flags, "--max-update", 2 * updates + 1)
    half = train(data, tmp_path / "half", *flags, "--max-update", updates + 1)  # inside the second epoch
    streams = load(half)["extra_state"]["train_iterator"]["streams"]
    layout = {"streams": 8, "tokens": tokens(data), "tokens_per_sample": 16, "reset_at": None}
    assert streams["layout"] == layout
    assert streams["attentions"][0][0].shape == (8, 2, 8, 8)
    assert streams["attentions"][0][0].abs().min(3)[0].min() > 0
    train(data, tmp_path / "half", *flags, "--max-update", 2 * updates + 1)
    assert_same_training(tmp_path / "half" / "checkpoint_last.pt", expected)
    again = load(tmp_path / "half" / "checkpoint_last.pt")["extra_state"]["train_iterator"]
    assert_same_tree(
        list(again["streams"]["attentions"][0][:1]),
        list(load(expected)["extra_state"]["train_iterator"]["streams"]["attentions"][0][:1]),
    )


def test_a_checkpoint_at_the_end_of_an_epoch_holds_no_states(data, tmp_path):
    checkpoint = train(data, tmp_path, "--max-epoch", 1)
    assert "streams" not in load(checkpoint)["extra_state"]["train_iterator"]


@pytest.mark.parametrize("streams", [4, 200])  # an epoch of more segments, and of fewer than were read
def test_other_streams_after_a_stop_begin_the_epoch_anew_and_say_so(data, tmp_path, monkeypatch, streams):
    warnings = []
    monkeypatch.setattr(text_streams.logger, "warning", warnings.append)
    train(data, tmp_path, "--max-update", 2)
    assert warnings == []
    checkpoint = train(data, tmp_path, "--batch-size", streams, "--max-update", 3)
    iterator = load(checkpoint)["extra_state"]["train_iterator"]
    ended = tokens(data) <= 16 * streams
    assert (iterator["epoch"], iterator["iterations_in_epoch"]) == ((2, 0) if ended else (1, 1))
    size = f"{tokens(data)} tokens in segments of 16"
    assert warnings == [
        f"the checkpoint holds 8 streams of {size}, this run has {streams} streams of {size}: epoch 1 begins anew"
    ]


@pytest.mark.parametrize("kind", ["normalized", "accumulated"])
def test_two_processes_equal_one_with_twice_the_batch(data, tmp_path, kind):
    flags = ["--dropout", "0", "--optimizer", "sgd", "--lr", "0.5", *RUNS[kind]]
    # stopped and resumed inside the epoch: each rank gets its streams back
    for updates in (2, 3):
        arguments = [data.words, *MODEL, *TASK, *TRAIN, *flags, "--batch-size", 4]
        two_processes(*arguments, "--max-update", updates, "--save-dir", tmp_path / "two")
    # and they go on in one process, since they are the same streams
    one, two = (
        load(train(data, tmp_path / n, *flags, "--max-update", 4, common=TRAIN)) for n in ("one", "two")
    )
    for name, expected in one["model"].items():
        torch.testing.assert_close(two["model"][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    states = [x["extra_state"]["train_iterator"]["streams"]["attentions"] for x in (one, two)]
    for expected, result in zip(*states, strict=True):
        for a, b in zip(expected, result, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-tokens", "100", "--batch-size-valid", "2"], "--batch-size gives the number of streams"),
        (["--update-rule", "softmax", "--batch-size", "2"], "softmax attention has no state"),
        (
            ["--arch", "fast_weight_transformer", "--batch-size", "2"],
            "needs the architecture of a language model",
        ),
        (["--sample-break-mode", "complete", "--batch-size", "2"], "--sample-break-mode must be none"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, flags, message):
    i = TRAIN.index("--batch-size")
    common = TRAIN[:i] + TRAIN[i + 2 :]
    with pytest.raises(FastWeightError, match=message):
        train(data, tmp_path, *flags, common=common)


# --- evaluation


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A delta rule with attention normalisation, trained over three epochs of streams."""
    save_dir = tmp_path_factory.mktemp("stateful")
    return train(data, save_dir, "--attention-normalization", "true", "--max-epoch", 3, common=TRAIN)


def test_a_pass_is_not_shared_out(data, checkpoint):
    """As fairseq would over all GPUs; each would read a part of the text."""
    _, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    task.load_dataset("test")
    with pytest.raises(FastWeightError, match="--distributed-world-size must be 1, got 2"):
        task.eval_lm_dataloader(task.dataset("test"), num_shards=2)


def evaluate(data, checkpoint, *flags):
    """(tokens, loss) of fairseq-eval-lm on the test split; the loss with all its digits, of which it logs five."""
    found, evaluation = [], eval_lm.eval_lm

    def kept(*args, **kwargs):
        found.append(evaluation(*args, **kwargs))
        return found[0]

    with mock.patch("fairseq_cli.eval_lm.eval_lm", kept):
        log = run_logged("eval_lm", data.words, "--user-dir", PACKAGE, "--cpu", "--path", checkpoint, *flags)
    tokens = re.search(r"Evaluated ([\d,]+) tokens", log)[1]
    logged = float(re.search(r"Loss \(base 2\): ([\d.]+)", log)[1])
    loss = float(found[0]["loss"])
    assert loss == pytest.approx(logged, abs=6e-5)
    return int(tokens.replace(",", "")), loss


def test_perplexity_does_not_depend_on_the_segments(data, checkpoint):
    task = ["--task", "stateful_language_modeling"]
    text = (data.text / "test.xx").read_text()
    words = len(text.split()) + text.count("\n")
    whole = "--task language_modeling --tokens-per-sample 1000".split()
    overrides = ["--model-overrides", "{'max_target_positions': 1000}"]
    _, loss = evaluate(data, checkpoint, *whole, *overrides)
    for n in (1, 7, 64, words - 1, 1000):
        found = evaluate(data, checkpoint, *task, "--tokens-per-sample", n)
        assert found == (words, pytest.approx(loss, rel=1e-5)), n


def test_separate_texts_and_parallel_streams(data, checkpoint):
    task = ["--task", "stateful_language_modeling", "--tokens-per-sample", 64]
    sentences = "--task language_modeling --sample-break-mode eos --tokens-per-sample 64".split()
    tokens, loss = evaluate(data, checkpoint, *sentences)
    reset = evaluate(data, checkpoint, *task, "--reset-at", "</s>")
    assert reset == (tokens, pytest.approx(loss, rel=1e-5))
    tokens, loss = evaluate(data, checkpoint, *task)
    in_three = evaluate(data, checkpoint, *task, "--batch-size", 3)
    assert in_three[0] == tokens and 0 < abs(in_three[1] - loss) < 0.5


def test_validate_and_generate_take_the_checkpoint(data, checkpoint):
    task = ["--task", "stateful_language_modeling", "--tokens-per-sample", 64]
    common = [data.words, "--user-dir", PACKAGE, "--cpu", "--path", checkpoint]
    log = run_logged("validate", *common, *task, "--valid-subset", "test", "--batch-size", 1)
    loss = float(re.search(r"\bloss ([\d.]+)", log)[1])
    assert loss == pytest.approx(evaluate(data, checkpoint, *task)[1], abs=1e-3)
    with pytest.raises(FastWeightError, match="needs --sample-break-mode eos"):
        run("generate", *common, *task, "--batch-size", 1)
    flags = "--sample-break-mode eos --beam 2 --prefix-size 1 --max-len-b 5 --batch-size 4".split()
    both = [run("generate", *common, "--task", name, *flags) for name in (task[1], "language_modeling")]
    assert both[0] == both[1] and len(re.findall("^H-", both[0], re.MULTILINE)) == 21


# not getrusage's ru_maxrss, which begins at the size of the process that started this one
MEASURED = """
from fairseq_cli.eval_lm import cli_main
cli_main()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """100,000 tokens against 1,000, in one stream; what is kept of a segment would be 64 kB."""
    words = [f"w{i}" for i in range(8)]
    peaks = {}
    for split, tokens in (("short", 1000), ("long", 100_000)):
        lines = [" ".join(words[(i * j) % 8] for j in range(9)) for i in range(tokens // 10)]
        (tmp_path / split).write_text("\n".join(lines) + "\n")
    pref = f"{tmp_path / 'short'},{tmp_path / 'long'}"
    run(
        "preprocess",
        "--only-source",
        "--trainpref",
        tmp_path / "short",
        "--testpref",
        pref,
        "--destdir",
        tmp_path / "data",
    )
    wide = "--decoder-layers 1 --decoder-embed-dim 128 --decoder-ffn-embed-dim 16 --decoder-attention-heads 1"
    run(
        "train",
        tmp_path / "data",
        "--user-dir",
        PACKAGE,
        "--arch",
        "fast_weight_lm",
        *wide.split(),
        "--no-token-positional-embeddings",
        *TASK,
        *TRAIN,
        "--save-dir",
        tmp_path,
        "--max-update",
        1,
    )
    for split, subset in (("short", "test"), ("long", "test1")):
        command = [
            tmp_path / "data",
            "--user-dir",
            PACKAGE,
            "--cpu",
            "--path",
            tmp_path / "checkpoint_last.pt",
            "--task",
            "stateful_language_modeling",
            "--tokens-per-sample",
            128,
            "--gen-subset",
            subset,
            "--num-workers",
            0,
        ]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[split] = int(done.stdout.split()[-1])
    assert peaks["long"] < 1.05 * peaks["short"]
