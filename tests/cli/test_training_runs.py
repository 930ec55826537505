"""A run is its seed: stopped and resumed, repeated, or on two processes, it is the same run."""

import socket

import pytest
import torch
from commands import (
    EVERYWHERE,
    FAVOR,
    PACKAGE,
    TINY,
    TRAIN,
    assert_same_training,
    finish,
    load,
    start,
    train_lm,
    train_translation,
)

# 120 sentences in batches of 8: update 7 is in the middle of the first epoch, 15 its end
UPDATES, STOP = 18, 7
RUNS = {
    "translation": (train_translation, EVERYWHERE),
    "translation-favor": (train_translation, [*EVERYWHERE, *FAVOR]),
    "lm-gated-delta": (train_lm, ["--update-rule", "gated-delta"]),
    "lm-favor": (train_lm, [*FAVOR, "--favor-redraw-interval", "3", "--update-rule", "sum"]),
}


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(request, data, tmp_path_factory):
    """How to train one kind of model, and the last checkpoint of a run that was not stopped."""
    train, flags = RUNS[request.param]
    where = data.pairs if train is train_translation else data.words

    def again(save_dir, *more):
        return train(where, save_dir, *flags, *more)

    return again, again(tmp_path_factory.mktemp("whole"), "--max-update", UPDATES)


@pytest.mark.parametrize("stop", [STOP, 15])
def test_resumed_run_equals_the_run_that_was_not_stopped(uninterrupted, tmp_path, stop):
    train, expected = uninterrupted
    half = train(tmp_path, "--max-update", stop)
    assert load(half)["optimizer_history"][-1]["num_updates"] == stop
    assert_same_training(train(tmp_path, "--max-update", UPDATES), expected)


def test_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    train, expected = uninterrupted
    assert_same_training(train(tmp_path, "--max-update", UPDATES), expected)


def test_another_seed_gives_another_model(uninterrupted, tmp_path):
    train, expected = uninterrupted
    other = load(train(tmp_path, "--max-update", UPDATES, "--seed", 4))["model"]
    assert any(not torch.equal(x, other[name]) for name, x in load(expected)["model"].items())


def projections(checkpoint):
    return [x for name, x in load(checkpoint)["model"].items() if name.endswith("projection")]


def test_favor_draws_new_directions_in_training(data, tmp_path):
    train, flags = RUNS["translation-favor"]
    one = projections(train(data.pairs, tmp_path / "1", *flags, "--max-update", 1))
    two = projections(train(data.pairs, tmp_path / "2", *flags, "--max-update", 2))
    assert len(one) == 3
    assert all(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    distributed = (
        "--ddp-backend legacy_ddp --distributed-backend gloo --distributed-world-size 2 "
        f"--distributed-init-method {address} --distributed-no-spawn"
    ).split()
    ranks = [start("train", *arguments, *distributed, "--distributed-rank", r) for r in (0, 1)]
    for rank in ranks:
        status, _, err = finish(rank)
        assert status == 0, err[-3000:]


def test_two_processes_equal_one_with_twice_the_batch(data, tmp_path):
    # Adam would blow up the rounding of gradients that are almost zero
    flags = [*EVERYWHERE, *FAVOR, "--dropout", "0", "--optimizer", "sgd", "--lr", "0.1"]
    common = [data.pairs, "--user-dir", PACKAGE, "--arch", "fast_weight_transformer", *TINY, *TRAIN]
    # stopped and resumed, since rank 1 gets its checkpoint from rank 0
    for updates in (2, 5):
        two_processes(*common, *flags, "--max-update", updates, "--save-dir", tmp_path / "two")
    one = train_translation(*(data.pairs, tmp_path / "one", *flags, "--max-update", 5, "--update-freq", 2))
    two = load(tmp_path / "two" / "checkpoint_last.pt")["model"]
    for name, expected in load(one)["model"].items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-6, msg=name)
