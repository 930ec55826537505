"""Logs of real trainings (shortened: configurations, and lines that hold no numbers) and what is to be read in them."""

from math import isnan
from pathlib import Path

import pytest

from fairseq_fastweights.compare.configuration import flatten, read_configuration
from fairseq_fastweights.compare.logs import merge, read_log, read_starts, read_stats

HERE = Path(__file__).parent


def losses(log):
    return {v.updates: v.metrics["loss"] for v in log.validations()}


def test_simple_format_of_a_run_that_was_stopped_and_resumed():
    log = read_log(HERE / "simple_resumed.log")
    assert losses(log) == {75: 1.402, 100: 1.128, 120: 1.001, 140: 0.889, 150: 1.01, 160: 1.026, 170: 0.779}
    assert (log.parameters, log.updates) == (5312, 170)
    # 5 s on fairseq's clock, then from 20:01:38 to 20:01:44, where that clock stood still
    assert log.seconds == 11
    assert log.tokens_per_second == (4463.9 + 4986.6) / 2  # the median of six
    assert log.options["max_update"] == 170  # of the second start
    assert log.gpu_memory is None


def test_json_format_with_bleu():
    log = read_log(HERE / "json_bleu.log")
    assert [v.metrics for v in log.validations()] == [
        {"loss": 1.458, "ppl": 2.75, "bleu": 7.01},
        {"loss": 1.057, "ppl": 2.08, "bleu": 20.44},
        {"loss": 0.6, "ppl": 1.52, "bleu": 12.1},
    ]
    assert (log.parameters, log.updates, log.seconds) == (5280, 200, 11)
    assert log.options["arch"] == "transformer" and "update_rule" not in log.options


def test_log_file_without_prefixes_whose_lines_come_twice():
    log = read_log(HERE / "log_file.log")
    assert losses(log) == {75: 1.402, 100: 1.128}
    assert log.seconds == 5


def test_hydra_and_a_language_model():
    log = read_log(HERE / "hydra.log")
    assert losses(log) == {20: 2.679}
    assert (log.parameters, log.seconds, log.options["task"]) == (18956288, 79, "language_modeling")
    assert losses(read_log(HERE / "lm.log")) == {25: 2.642, 50: 2.541, 57: 2.512, 75: 2.528, 100: 2.587}


def test_configuration_of_both_kinds_of_architecture():
    options = read_log(HERE / "simple_resumed.log").options
    chosen = {
        "arch": "fast_weight_transformer",
        "task": "translation",
        "criterion": "cross_entropy",
        "lr": [0.01],
        "update_rule": "delta",
        "seed": 3,
        "adam_betas": [0.9, 0.999],
    }
    assert {name: options[name] for name in chosen} == chosen
    options = read_log(HERE / "lm.log").options
    chosen = {
        "arch": "fast_weight_lm_tiny",
        "activation_fn": "relu",
        "sample_break_mode": "none",
        "dropout": 0.1,
    }
    assert {name: options[name] for name in chosen} == chosen  # the two middle ones are logged without quotes


def test_configuration_is_data():
    options = read_configuration(
        "{'common': {'a': nan, 'b': -inf, 'c': <Choice.x: 'fine'>, 'd': __import__('os').getcwd(), 'e': gelu_fast}}"
    )
    assert isnan(options.pop("a"))
    assert options == {"b": -float("inf"), "c": "fine", "d": "__import__('os').getcwd()", "e": "gelu_fast"}
    assert read_configuration("Namespace(arch='lstm', lr=[0.25])") == {"arch": "lstm", "lr": [0.25]}
    assert read_configuration("{'_name': None, 'common': {'seed': 1") is None  # cut off


def test_sections_that_disagree_are_told_apart():
    sections = {"task": {"length": 8}, "model": {"_name": "a", "length": 4}, "common": {"seed": 1}}
    assert flatten(sections) == {"length": 8, "seed": 1, "arch": "a", "model.length": 4}


PREFIX = "2026-01-01 00:00:{:02d} | INFO | "


def train(second, updates, wall, loss=1.0):
    where = PREFIX.format(second) + "train_inner | epoch 001:  1 / 9"
    return f"{where} loss={loss}, wps=100, num_updates={updates}, wall={wall}"


def valid(second, updates, loss):
    return (
        PREFIX.format(second)
        + f"valid | epoch 001 | valid on 'valid' subset | loss {loss} | num_updates {updates}"
    )


CONFIGURATION = PREFIX.format(0) + "fairseq_cli.train | {'_name': None, 'common': {'seed': 1}}"


def resume(updates):
    line = "fairseq.trainer | Loaded checkpoint x/checkpoint_last.pt (epoch 1 @ {} updates)"
    return PREFIX.format(0) + line.format(updates)


def test_what_is_done_again_after_a_kill_counts_once():
    first = [CONFIGURATION, train(2, 10, 2), valid(2, 10, 5.0), train(9, 20, 9), valid(9, 20, 4.0)]
    second = [CONFIGURATION, resume(10), train(8, 20, 0), valid(8, 20, 3.0)]
    log = merge(read_starts(first + second))
    assert losses(log) == {10: 5.0, 20: 3.0}
    assert log.seconds == 2 + 8


def test_a_start_that_failed_at_once_changes_nothing():
    first = [CONFIGURATION, train(2, 10, 2), valid(2, 10, 5.0)]
    failed = [
        CONFIGURATION,
        PREFIX.format(3) + "fairseq.trainer | No existing checkpoint found x",
        "Traceback",
    ]
    assert losses(merge(read_starts(first + failed))) == {10: 5.0}


def test_another_program_that_logs_its_configuration_is_no_start():
    generate = PREFIX.format(9) + "fairseq_cli.generate | {'_name': None, 'common': {'seed': 2, 'beam': 5}}"
    log = merge(read_starts([CONFIGURATION, train(2, 10, 2), generate, "H-0 | x", "P-0 | y"]))
    assert log.options == {"seed": 1} and log.updates == 10
    assert merge(read_starts([generate, "H-0 | x"])).options == {}


def test_a_run_that_was_started_anew_in_the_same_log():
    anew = PREFIX.format(3) + "fairseq.trainer | No existing checkpoint found x"
    first = [CONFIGURATION, train(2, 10, 2), valid(2, 10, 5.0)]
    log = merge(read_starts([*first, CONFIGURATION, anew, train(1, 15, 1), valid(1, 15, 7.0)]))
    assert losses(log) == {15: 7.0}
    assert log.seconds == 1


def test_other_subsets():
    lines = [valid(1, 10, 5.0), valid(1, 10, 6.0).replace("'valid'", "'valid1'")]
    log = merge(read_starts([CONFIGURATION, *lines]))
    assert log.validations()[0].metrics == {"loss": 5.0}
    assert log.subsets == ["valid", "valid1"]
    assert log.validations("valid1")[0].metrics == {"loss": 6.0}
    json = read_stats(
        '{"epoch": 2, "valid1_loss": "0.5", "valid1_num_updates": "7", "valid1_best_loss": "0.4"}'
    )
    assert (json.kind, json.updates, json.metrics) == ("valid1", 7, {"loss": 0.5})


def test_peak_gpu_memory_is_what_was_not_free():
    # as fairseq.utils.CudaEnvironment and Trainer.train_step write it
    rank = (
        PREFIX.format(0)
        + "fairseq.utils | rank   0: capabilities =  9.0  ; total memory = 79.500 GB ; name = H100"
    )
    lines = [rank, train(1, 1, 1) + ", gb_free=60.5", train(2, 2, 2) + ", gb_free=59.3"]
    assert merge(read_starts([CONFIGURATION, *lines])).gpu_memory == pytest.approx(20.2)


@pytest.mark.parametrize(
    "line", ['{"epoch": 1, "valid_lo', "epoch 001 | loss", "{}", "epoch 001:  1 / 9 loss", '{"a": 1}']
)
def test_half_lines_are_passed_over(line):
    assert read_stats(line) is None
