"""fairseq-train --task associative_retrieval gives the authors' logs again, and goes on where it stopped."""

import csv
import re

import pytest
from commands import PACKAGE, assert_same_training, load, run, run_logged

TASK = ["--user-dir", PACKAGE, "--task", "associative_retrieval", "--arch", "associative_memory", "--cpu"]

# setting, keys, flags, final loss and update of the authors' log (seed 1), relative tolerance
PUBLISHED = [
    (1, 20, "softmax", 0.0006343253, 200, 1e-5),
    (1, 40, "softmax", 0.00032426324, 100, 1e-5),
    (1, 20, "sum --feature-map elu", 0.0008887422, 800, 1e-5),
    (2, 20, "delta --feature-map elu", 0.0007962155, 900, 1e-5),
    (1, 20, "sum --feature-map dpfp --dpfp-nu 1", 0.0007829439, 100, 2e-2),
    (2, 20, "sum --feature-map dpfp --dpfp-nu 1", 0.10479573, 1300, 2e-2),
]


def retrieve(folder, *flags):
    """The rows of a run, (update, loss)."""
    file = folder / "log.csv"
    run("train", *TASK, "--seed", 1, "--eval-csv", file, *flags)
    with open(file, newline="") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["step", "eval-loss"]
    return [(int(step), float(loss)) for step, loss in rows]


@pytest.mark.parametrize("setting, keys, flags, loss, update, tolerance", PUBLISHED)
def test_log_of_the_authors(tmp_path, setting, keys, flags, loss, update, tolerance):
    rows = retrieve(tmp_path, "--setting", setting, "--num-keys", keys, "--update-rule", *flags.split())
    assert [step for step, _ in rows] == list(range(100, update + 1, 100))
    assert rows[-1] == (update, pytest.approx(loss, rel=tolerance))


SMALL = "--num-keys 6 --key-dim 8 --eval-interval 10 --batch-size 4 --target-loss 0 --patience 100".split()
RUNS = {
    "favor": "--update-rule sum --feature-map favor --favor-features 5 --setting 1".split(),
    "fwm": "--update-rule fwm --feature-map dpfp --setting 2".split(),
}


@pytest.mark.parametrize("stop", [20, 25])
@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_run_that_was_not_stopped(tmp_path, name, stop):
    """Stopped after an evaluation or between two: the same data, directions and losses."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def go(folder, updates):
        return retrieve(folder, *SMALL, *RUNS[name], "--max-update", updates, "--save-dir", folder)

    expected = go(whole, 40)
    assert len(go(halves, stop)) == len(range(10, stop + 10, 10))
    rows = [
        row for row in go(halves, 40) if row[0] % 10 == 0
    ]  # without the evaluation that ended the first half
    assert_same_training(halves / "checkpoint_last.pt", whole / "checkpoint_last.pt")
    assert rows == [(step, pytest.approx(loss, rel=1e-12)) for step, loss in expected]


def test_a_run_starts_its_file_anew(tmp_path):
    flags = [*SMALL, *RUNS["fwm"], "--max-update"]
    assert [step for step, _ in retrieve(tmp_path, *flags, 30)] == [10, 20, 30]
    assert [step for step, _ in retrieve(tmp_path, *flags, 30, "--eval-interval", 15)] == [15, 30]


def test_a_finished_run_is_finished(tmp_path):
    flags = ["--num-keys", 3, "--update-rule", "softmax", "--eval-interval", 10, "--target-loss", 0.1]
    rows = retrieve(tmp_path, *flags, "--save-dir", tmp_path)
    assert retrieve(tmp_path, *flags, "--save-dir", tmp_path) == rows


def test_a_checkpoint_can_be_validated(tmp_path):
    flags = "--num-keys 3 --setting 1 --update-rule softmax --eval-interval 10 --target-loss 0.02".split()
    retrieve(tmp_path, *flags, "--save-dir", tmp_path)
    flags = ["--task", "associative_retrieval", "--num-keys", 3, "--setting", 1, "--batch-size", 4, "--cpu"]
    log = run_logged("validate", *TASK[:2], *flags, "--path", tmp_path / "checkpoint_last.pt")
    assert float(re.search(r"valid on 'valid' subset \| loss [\d.]+ \| accuracy ([\d.]+)", log)[1]) > 0.9


def test_training_ends_at_the_target_loss(tmp_path):
    flags = "--num-keys 3 --update-rule softmax --eval-interval 10 --target-loss".split()
    assert len(retrieve(tmp_path, *flags, 10)) == 1
    rows = retrieve(tmp_path, *flags, 0.1)
    assert rows[-1][1] <= 0.1 < rows[-2][1]


def test_nothing_is_saved_without_a_folder_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retrieve(tmp_path, *SMALL, *RUNS["fwm"], "--max-update", 10)
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_settings_of_the_authors_and_of_the_user(tmp_path):
    def settings(*flags):
        retrieve(tmp_path, "--num-keys", 3, *flags, "--max-update", 1, "--save-dir", tmp_path / "saved")
        cfg = load(tmp_path / "saved/checkpoint_last.pt")["cfg"]
        (tmp_path / "saved/checkpoint_last.pt").unlink()
        return cfg["dataset"]["batch_size"], cfg["dataset"]["batch_size_valid"], cfg["optimization"]["lr"]

    assert settings("--update-rule", "sum") == (32, 32, [1e-3])
    assert settings("--update-rule", "fwm", "--feature-map", "tanh") == (128, 128, [1e-4])
    fwm = ["--update-rule", "fwm", "--feature-map", "tanh", "--batch-size", 8, "--lr", 0.01]
    assert settings(*fwm) == (8, 8, [0.01])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--setting", "3"], "--setting must be 1 or 2, got 3"),
        (["--num-keys", "1"], "--num-keys must be at least 2, got 1"),
        (["--eval-interval", "0"], "--eval-interval must be at least 1, got 0"),
        (
            ["--arch", "transformer", "--batch-size", "4", "--lr", "0.1", "--save-dir", "unused"],
            "needs --arch associative_memory, got 'transformer'",
        ),
        (["--update-rule", "hebb"], "--update-rule must be one of softmax, sum, delta, fwm here, got 'hebb'"),
        (["--feature-map", "tanh"], "feature map tanh has negative features"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        retrieve(tmp_path, *flags)
