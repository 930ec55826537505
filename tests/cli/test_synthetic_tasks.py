"""Language models, ours and fairseq's, train on the synthetic tasks, and what they answer is counted."""

import re

import pytest
from commands import PACKAGE, TINY_LM, run_logged

TRAIN = (
    "--optimizer adam --lr 0.003 --batch-size 16 --max-epoch 3 --seed 3 --num-workers 0 --cpu --no-progress-bar "
    "--train-sequences 320 --valid-sequences 35 --no-epoch-checkpoints"
).split()
VALIDATE = "--valid-sequences 35 --batch-size 16 --seed 3 --cpu --num-workers 0".split()
TASKS = {
    "multi_query_recall": "--tokens-per-sample 24 --num-pairs 2 --num-words 8".split(),
    "state_tracking": "--tokens-per-sample 10 --num-items 3 --swaps".split(),
}


@pytest.mark.parametrize("arch", ["fast_weight_lm", "transformer_lm"])
@pytest.mark.parametrize("task", TASKS)
def test_a_language_model_trains(tmp_path, task, arch):
    flags = ["--user-dir", PACKAGE, "--task", task, *TASKS[task], "--arch", arch, *TINY_LM, *TRAIN]
    log = run_logged("train", *flags, "--save-dir", tmp_path)
    valid = [line for line in log.splitlines() if "valid on 'valid' subset" in line]
    losses = [float(re.search(r"\bloss ([\d.]+)", line)[1]) for line in valid]
    assert len(losses) == 3 and min(losses[1:]) < losses[0]
    assert all(0 < float(re.search(r"accuracy ([\d.]+)", line)[1]) <= 100 for line in valid)
    assert all(float(re.search(r"n_correct ([\d.]+)", line)[1]) > 0 for line in valid)
    checkpoint = tmp_path / "checkpoint_last.pt"
    again = run_logged("validate", *flags[:4], *TASKS[task], *VALIDATE, "--path", checkpoint)
    assert f"loss {losses[-1]}" in again
