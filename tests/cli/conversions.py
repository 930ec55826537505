"""fastweights-convert in this process, and the softmax models that the tests convert."""

import contextlib
import io
import shlex
from pathlib import Path

from commands import PACKAGE, TINY, TINY_LM, TRAIN, run
from fairseq import checkpoint_utils

from fairseq_fastweights.convert.__main__ import main

LM_TASK = "--task language_modeling --tokens-per-sample 16 --sample-break-mode none".split()
KINDS = ("translation", "language_modeling")


def train_softmax(kind, data, save_dir, *flags) -> Path:
    """fairseq's own transformer or transformer_lm, trained in this process; returns the last checkpoint."""
    arch = {"translation": "transformer_iwslt_de_en", "language_modeling": "transformer_lm"}[kind]
    sizes = [*TINY, "--share-decoder-input-output-embed"] if kind == "translation" else [*TINY_LM, *LM_TASK]
    where = data.pairs if kind == "translation" else data.words
    flags = ["--user-dir", PACKAGE, "--arch", arch, *sizes, *TRAIN, "--save-dir", save_dir, *flags]
    run("train", where, *flags)
    return Path(save_dir) / "checkpoint_last.pt"


def convert(checkpoint, out, *flags) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(checkpoint), str(out), *map(str, flags)])
    return printed.getvalue()


def next_commands(printed) -> list:
    """The arguments of the commands that it says go on."""
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("fairseq-train ")]


def load_model(checkpoint):
    """(the model in evaluation mode, its task)."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    return models[0].eval(), task


def batch(task):
    """The sentences of the test set as one batch, ragged."""
    task.load_dataset("test")
    dataset = task.dataset("test")
    return dataset.collater([dataset[i] for i in range(len(dataset))])
