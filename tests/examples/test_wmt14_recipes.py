"""The WMT14 recipe: its rows against the paper's table, how a batch is shared out, and two updates of every row."""

import re
import shlex

import pytest
from commands import run_logged
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train
from language_pair import TRANSLATION, bash

from fairseq_fastweights.feature_maps import build_feature_map

SCRIPT = TRANSLATION / "train_wmt14.sh"
COLUMNS = ("row", "replaced", "d_dot", "valid", "test", "flags")
ROW = re.compile(r"^\| `(\S+)` \| (.+) \| (\S+) \| (\S+) \| (\S+) \| `(.+)` \|$", re.MULTILINE)
ROWS = [
    dict(zip(COLUMNS, cells, strict=True)) for cells in ROW.findall((TRANSLATION / "WMT14.md").read_text())
]
PAPER = {  # table 1: valid, test
    ("softmax", None): ("26.6", "27.7"),
    ("elu", 64): ("25.5", "26.8"),
    ("favor", 64): ("24.2", "24.4"),
    ("favor", 256): ("24.9", "25.3"),
    ("favor", 512): ("26.7", "27.7"),
    ("dpfp", 256): ("26.2", "26.9"),
    ("dpfp", 512): ("26.2", "27.1"),
}
SITES = {"--update-rule": "decoder", "--update-rule-encoder": "encoder", "--update-rule-cross": "cross"}
HEAD = 64  # 1024 / 16


def command_of(*arguments, **environment) -> list[str]:
    return shlex.split(bash(SCRIPT, "--print", *arguments, **environment))


def value_of(command, flag) -> str:
    return command[command.index(flag) + 1]


def map_of(row) -> tuple[str, int | None]:
    """The row's feature map, and how many features it gives a head."""
    flags = dict(zip(*[iter(row["flags"].split())] * 2, strict=True))
    if flags["--update-rule"] == "softmax":
        return "softmax", None
    name = flags["--feature-map"]
    options = {flag.removeprefix(f"--{name}-"): int(value) for flag, value in flags.items() if name in flag}
    return name, build_feature_map(name, HEAD, **options).output_dim


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["row"])
def test_a_row_is_what_it_says(row):
    name, features = map_of(row)
    assert row["d_dot"] == ("-" if features is None else str(features))
    flags = row["flags"].split()
    sites = [site for flag, site in SITES.items() if flag in flags]
    if "softmax" in flags:
        assert row["replaced"] == "-"
    else:
        assert row["replaced"] == ("all" if len(sites) == 3 else ", ".join(sites))
    in_paper = value_of(flags, "--update-rule") in ("softmax", "sum")
    assert (row["valid"], row["test"]) == (PAPER[name, features] if in_paper else ("-", "-"))


def test_every_number_of_the_paper_has_its_rows():
    found = [map_of(row) for row in ROWS if row["valid"] != "-"]
    assert sorted(found, key=str) == sorted([*PAPER, *(key for key in PAPER if key[0] != "softmax")], key=str)


@pytest.mark.parametrize(
    "settings, shared",
    [
        ({"GPUS": "1"}, ("1", "48", "3584")),
        ({"GPUS": "3"}, ("3", "16", "3584")),  # the paper's
        ({"GPUS": "8"}, ("8", "6", "3584")),
        ({"GPUS": "8", "TOKENS": "10752"}, ("8", "2", "10752")),
        ({"GPUS": "8", "MACHINES": "2", "MACHINE": "1", "MASTER": "one:1"}, ("16", "3", "3584")),
    ],
)
def test_the_batch_is_the_papers(settings, shared):
    command = command_of("delta", **settings)
    flags = ("--distributed-world-size", "--update-freq", "--max-tokens")
    found = tuple(value_of(command, flag) for flag in flags)
    assert found == shared and int(found[0]) * int(found[1]) * int(found[2]) == 172_032
    assert "--fp16" in command and "--cpu" not in command
    if "MACHINE" in settings:
        assert value_of(command, "--distributed-init-method") == "tcp://one:1"
        assert value_of(command, "--distributed-rank") == "8"
    else:
        assert "--distributed-rank" not in command


@pytest.mark.parametrize(
    "row, settings, why",
    [
        ("gamma", {}, "no row gamma: it is one of standard linear"),
        ("delta", {"GPUS": "5"}, "cannot be shared out over 5 GPUs x steps of 3584 tokens"),
        ("delta", {"MACHINES": "2", "MACHINE": "2"}, "MACHINE counts from 0 to MACHINES - 1, got 2 of 2"),
        ("delta", {"MACHINES": "2", "GPUS": "8"}, "must be address:port of the first machine"),
    ],
)
def test_wrong_requests(row, settings, why):
    assert why in bash(SCRIPT, "--print", row, ok=False, **settings)


def test_subword_pieces_are_joined_again():
    command = command_of("delta", PIECES="subword-nmt")
    assert value_of(command, "--eval-bleu-detok") == "moses"
    assert (
        value_of(command, "--eval-bleu-remove-bpe") == "--best-checkpoint-metric"
    )  # "@@ ", its value without one


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["row"])
def test_two_updates(row, pairs, prepared):
    for function in (fairseq_train.should_stop_early, checkpoint_utils.save_checkpoint):
        vars(function).clear()
    command = command_of("--smoke", pairs, row["row"], WORK=str(prepared))
    assert command.pop(0) == "fairseq-train"
    short = "--max-update 2 --no-save --disable-validation --num-workers 0 --log-interval 1 --no-progress-bar"
    small = [
        f"--{side}-{size} 64" for side in ("encoder", "decoder") for size in ("embed-dim", "ffn-embed-dim")
    ]
    small += ["--encoder-layers 1 --decoder-layers 1 --max-tokens 128"]
    log = run_logged("train", *command, *short.split(), *" ".join(small).split())
    losses = [float(loss) for loss in re.findall(r"\bloss=([0-9.]+)", log)]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses), log[-2000:]


def test_several_machines_need_gpus():
    said = bash(
        TRANSLATION / "train_wmt14.sh",
        "--print",
        "linear",
        ok=False,
        MACHINES="2",
        MACHINE="1",
        MASTER="a:1",
    )
    assert "several MACHINES need GPUs, got GPUS=0" in said


@pytest.mark.long
def test_a_row_from_its_beginning_to_its_end(pairs, tmp_path):
    small = [f"--{side}-{size}" for side in ("encoder", "decoder") for size in ("embed-dim", "ffn-embed-dim")]
    flags = [word for flag in small for word in (flag, "64")]
    settings = {"WORK": str(tmp_path), "VOCAB": "60", "BEAM": "1 2"}
    for _ in range(2):
        printed = bash(SCRIPT, "--smoke", pairs, "linear", *flags, **settings)
        result = printed.rstrip().splitlines()[-1]
        wanted = r"== BLEU of linear: newstest2013 [\d.]+ \(published 25.5\), newstest2014 [\d.]+ \(published 26.8\)"
        assert re.fullmatch(wanted, result)
    assert printed.count("already there") == 2
