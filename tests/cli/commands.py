"""fairseq's commands, in this process or in one of their own, on a made-up language pair."""

import contextlib
import importlib
import io
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import torch

import fairseq_fastweights

PACKAGE = str(Path(fairseq_fastweights.__file__).resolve().parent)
TINY = (
    "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2"
).split()
TINY_LM = (
    "--decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
).split()
TRAIN = (
    "--optimizer adam --lr 0.01 --batch-size 8 --dropout 0.1 --disable-validation --no-progress-bar "
    "--no-epoch-checkpoints --required-batch-size-multiple 1 --seed 3 --num-workers 0 --cpu"
).split()
READ_BATCHES = ("train", "validate", "generate", "interactive", "eval_lm")
EVERYWHERE = "--update-rule delta --update-rule-encoder delta --update-rule-cross delta".split()
SEARCH = ["--user-dir", PACKAGE, *"--beam 5 --max-len-b 12 --max-len-a 0 --num-workers 0 --cpu".split()]
FAVOR = "--feature-map favor --favor-features 6".split()


def run(command, *arguments) -> str:
    """What fairseq-COMMAND prints to stdout, run in this process. Batches are made there, too, unless --num-workers
    says otherwise: Python's garbage collector waits 5 seconds for the workers of one command during the next."""
    main = importlib.import_module(f"fairseq_cli.{command}").cli_main
    words = [command, *map(str, arguments)]
    if command in READ_BATCHES and "--num-workers" not in words:
        words += ["--num-workers", "0"]
    before, sys.argv = sys.argv, words
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main()
    finally:
        sys.argv = before
    return out.getvalue()


def run_logged(command, *arguments) -> str:
    """What fairseq-COMMAND logs, run in this process."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    # not the root logger's, which fairseq resets
    loggers = [logging.getLogger(name) for name in ("fairseq", "fairseq_cli")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        run(command, *arguments)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    return log.getvalue()


def start(command, *arguments, cwd=None, **environment) -> subprocess.Popen:
    """fairseq-COMMAND in a process of its own, one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", f"fairseq_cli.{command}", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> tuple[int, str, str]:
    """The exit status of a started command, its stdout and its stderr."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def train_translation(data, save_dir, *flags) -> Path:
    """Train in this process; returns the last checkpoint."""
    arch = ["--user-dir", PACKAGE, "--arch", "fast_weight_transformer", *TINY, *TRAIN]
    run("train", data, *arch, "--save-dir", save_dir, *flags)
    return Path(save_dir) / "checkpoint_last.pt"


def train_lm(data, save_dir, *flags) -> Path:
    """Train in this process; returns the last checkpoint."""
    arch = ["--user-dir", PACKAGE, "--arch", "fast_weight_lm", *TINY_LM, *TRAIN]
    task = "--task language_modeling --tokens-per-sample 16 --sample-break-mode none".split()
    run("train", data, *arch, *task, "--save-dir", save_dir, *flags)
    return Path(save_dir) / "checkpoint_last.pt"


def generate(data, checkpoint, *flags) -> str:
    """What fairseq-generate prints, with beam 5; flags that come again count."""
    return run("generate", data, "--path", checkpoint, *SEARCH, *flags)


def hypotheses(output: str) -> dict[int, str]:
    """Sentence number -> best hypothesis, from what generate or interactive printed."""
    return {int(n): text for n, text in re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, re.MULTILINE)}


def load(checkpoint) -> dict:
    """A checkpoint, as data and nothing else."""
    return torch.load(checkpoint, weights_only=True)


def assert_same_training(one, other) -> None:
    """Two checkpoints hold the same parameters, buffers and optimizer state, bit for bit."""
    one, other = load(one), load(other)
    assert_same_tree(one["model"], other["model"])
    assert_same_tree(one["last_optimizer_state"], other["last_optimizer_state"])
    updates = [state["optimizer_history"][-1]["num_updates"] for state in (one, other)]
    assert updates[0] == updates[1]


def assert_same_tree(one, other, path="") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            assert_same_tree(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same_tree(*pair, f"{path}.{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def write_sentences(folder: Path, sizes: dict[str, int]) -> None:
    """SPLIT.en and SPLIT.xx: every word has one translation, and adjectives follow their noun."""
    nouns = [f"noun{i}" for i in range(8)]
    adjectives = [f"big{i}" for i in range(4)]
    chosen = random.Random(1)
    for split, size in sizes.items():
        pairs = []
        for _ in range(size):
            source, target = [], []
            for _ in range(chosen.randint(1, 4)):
                noun, adjective = chosen.choice(nouns), chosen.choice(adjectives)
                source += [adjective, noun]
                target += [f"x{noun}", f"x{adjective}"]
            pairs.append((source, target))
        for side, language in enumerate(("en", "xx")):
            lines = "".join(" ".join(pair[side]) + "\n" for pair in pairs)
            (folder / f"{split}.{language}").write_text(lines)
