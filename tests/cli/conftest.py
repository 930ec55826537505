"""Data and trained models that the command-line tests share."""

from types import SimpleNamespace

import pytest
from commands import EVERYWHERE, run, train_lm, train_translation, write_sentences
from conversions import KINDS, train_softmax
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train


@pytest.fixture(autouse=True)
def first_run_of_its_process():
    """fairseq keeps the best loss of a run in attributes of its functions."""
    for function in (fairseq_train.should_stop_early, checkpoint_utils.save_checkpoint):
        for name in ("best", "num_runs"):
            vars(function).pop(name, None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Binarized text: .pairs for translation (English-Xish), .words for language modelling."""
    folder = tmp_path_factory.mktemp("data")
    write_sentences(folder, {"train": 120, "valid": 21, "test": 21})
    splits = [f"--{split}pref" for split in ("train", "valid", "test")]
    pairs = [x for flag in splits for x in (flag, folder / flag[2:-4])]
    run("preprocess", "-s", "en", "-t", "xx", *pairs, "--destdir", folder / "pairs")
    words = [x for flag in splits for x in (flag, folder / f"{flag[2:-4]}.xx")]
    run("preprocess", "--only-source", *words, "--destdir", folder / "words")
    return SimpleNamespace(pairs=folder / "pairs", words=folder / "words", text=folder)


@pytest.fixture(scope="session")
def translation(data, tmp_path_factory):
    """The checkpoint of a translation model with delta rules at all three sites."""
    save_dir = tmp_path_factory.mktemp("translation")
    return train_translation(data.pairs, save_dir, *EVERYWHERE, "--max-update", 60)


@pytest.fixture(scope="session")
def language_model(data, tmp_path_factory):
    """The checkpoint of a language model with the delta rule."""
    return train_lm(data.words, tmp_path_factory.mktemp("lm"), "--max-update", 60)


@pytest.fixture(scope="session")
def softmax_models(data, tmp_path_factory):
    """Checkpoints of fairseq's own models, by task: what users convert."""
    folder = tmp_path_factory.mktemp("softmax")
    return {kind: train_softmax(kind, data, folder / kind, "--max-update", 30) for kind in KINDS}
