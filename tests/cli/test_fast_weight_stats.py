"""--fast-weight-stats in runs of fairseq-train: what the log shows, and that nothing else changes."""

import json
import math

import pytest
import torch
from commands import (
    EVERYWHERE,
    PACKAGE,
    TINY,
    TINY_LM,
    TRAIN,
    assert_same_training,
    finish,
    load,
    run_logged,
    start,
    train_lm,
)

NORMALIZED = ["--update-rule", "delta", "--attention-normalization", "true"]
MEASURES = ("state_norm", "effective_rank", "write", "erased", "erased_max", "kappa", "kappa_min")
RUNS = {
    "lm": ("fast_weight_lm", [*TINY_LM, *NORMALIZED], ["fw_0"]),
    "translation": ("fast_weight_transformer", [*TINY, *NORMALIZED], ["fw_0"]),
    "translation-everywhere": (
        "fast_weight_transformer",
        [*TINY, *EVERYWHERE, *NORMALIZED],
        ["fw_decoder_0", "fw_encoder_0", "fw_cross_0"],
    ),
}
LM_TASK = "--task language_modeling --tokens-per-sample 16 --sample-break-mode none".split()


def arguments(data, run, save_dir):
    """Of fairseq-train, with validation."""
    arch, flags, _ = RUNS[run]
    where = [data.words, *LM_TASK] if run == "lm" else [data.pairs]
    common = [flag for flag in TRAIN if flag != "--disable-validation"]
    return [*where, "--user-dir", PACKAGE, "--arch", arch, *flags, *common, "--save-dir", save_dir]


def json_lines(log: str) -> list[dict]:
    return [json.loads(line) for line in log.splitlines() if line.startswith('{"')]


@pytest.mark.parametrize("run", RUNS)
def test_json_log_has_the_metrics_and_training_is_the_same(data, tmp_path, run):
    flags = ["--log-format", "json", "--log-interval", "2", "--max-update", "4"]
    log = run_logged("train", *arguments(data, run, tmp_path / "on"), *flags, "--fast-weight-stats", "2")
    off = run_logged("train", *arguments(data, run, tmp_path / "off"), *flags)
    assert "fw_" not in off
    expected = {f"{prefix}_{measure}" for prefix in RUNS[run][2] for measure in MEASURES}
    inner, validations, epochs = (
        [line for line in json_lines(log) if key in line]
        for key in ("num_updates", "valid_num_updates", "train_num_updates")
    )
    assert (len(inner), len(validations), len(epochs)) == (2, 1, 1)
    for lines, tag in ((inner, ""), (validations, "valid_"), (epochs, "train_")):
        for line in lines:
            found = {name: float(x) for name, x in line.items() if name.startswith(f"{tag}fw_")}
            assert found.keys() == {tag + name for name in expected}
            assert all(math.isfinite(x) and x > 0 for x in found.values())
            assert all(0 < x < 1 for name, x in found.items() if name.endswith("_write"))
    assert_same_training(*(tmp_path / run / "checkpoint_last.pt" for run in ("on", "off")))


def test_planted_inf_is_named_before_fairseq_ends_the_run(data, tmp_path):
    layers = ["--decoder-layers", "2", "--fast-weight-stats", "100"]
    checkpoint = train_lm(data.words, tmp_path, "--max-update", 2, *layers)
    state = load(checkpoint)
    state["model"]["decoder.layers.1.self_attn.v_proj.weight"][0, 0] = math.inf
    torch.save(state, tmp_path / "poisoned.pt")
    resume = ["--restore-file", tmp_path / "poisoned.pt", "--disable-validation", "--max-update", 4]
    flags = arguments(data, "lm", tmp_path / "resumed")
    status, out, err = finish(start("train", *flags, *layers, "--attention-normalization", "auto", *resume))
    assert status != 0 and "FloatingPointError" in err
    (line,) = [line for line in out.splitlines() if "first non-finite value" in line]
    where = "decoder layer 1 self-attention (decoder.layers.1.self_attn), tensor v"
    assert f"first non-finite value: {where} (inf in " in line
    assert line.endswith(" numbers), update 3")


def test_wrong_interval_is_one_line(data, tmp_path):
    flags = [*arguments(data, "lm", tmp_path), "--fast-weight-stats", "-1"]
    status, _, err = finish(start("train", *flags))
    assert status == 1
    assert err.splitlines()[-1].endswith(
        "fast_weight_stats must be a number of updates, or 0 for off, got -1"
    )
