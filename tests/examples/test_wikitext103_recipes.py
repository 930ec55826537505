"""The WikiText-103 recipes on a made-up text: the data, two updates of every row, and the paper's evaluation."""

import os
import random
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cli"))

from commands import run_logged  # noqa: E402

import fairseq_fastweights  # noqa: E402, F401  (registers the tasks)

RECIPES = ROOT / "examples/language_model"
ROW = re.compile(r"^\| `(\S+)` \| (\w+) \| (\w+) \| (.+) \| (.+) \| (.+) \| (.*) \|$", re.MULTILINE)
COLUMNS = ("row", "size", "context", "tables", "valid", "test", "flags")
ROWS = [
    dict(zip(COLUMNS, cells, strict=True)) for cells in ROW.findall((RECIPES / "WIKITEXT103.md").read_text())
]
OURS = [row for row in ROWS if row["context"] != "published"]


def bash(script, *arguments, ok=True, **environment) -> str:
    """What a recipe prints, on the CPU, with the commands of this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, "PATH": path, "GPUS": "0", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def command_of(*arguments, **environment) -> list[str]:
    return shlex.split(bash("train_wikitext103.sh", "--print", *arguments, **environment))


def flags_of(command) -> dict[str, str]:
    """Flag -> value, or an empty string."""
    words = iter([*command, "--"])
    found, word = {}, next(words)
    for following in words:
        if word.startswith("--"):
            found[word] = "" if following.startswith("--") else following
        word = following
    return found


def write_text(folder, lines, names=("train.txt", "valid.txt", "test.txt")) -> None:
    """Lines of 1 to 9 words out of 150, some lines empty, as in WikiText."""
    folder.mkdir()
    chosen = random.Random(2)
    for name, count in zip(names, lines, strict=True):
        sentences = [[f"w{chosen.randrange(150)}" for _ in range(chosen.randrange(10))] for _ in range(count)]
        (folder / name).write_text("".join(" ".join(["", *words, "\n"]) for words in sentences))


def tokens_in(file) -> int:
    return sum(len(line.split()) + 1 for line in file.read_text().splitlines())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wikitext") / "text"
    write_text(folder, (400, 30, 30))
    return folder


@pytest.fixture(scope="module")
def binarised(text):
    """The folder that the recipes work in, its data in bin."""
    work = text.parent / "work"
    bash("prepare_wikitext103.sh", text, WORK=str(work))
    return work


@pytest.fixture(autouse=True)
def first_run_of_its_process():
    """fairseq keeps the best loss of a run in attributes of its functions."""
    for function in (fairseq_train.should_stop_early, checkpoint_utils.save_checkpoint):
        vars(function).clear()


def test_data_has_every_word_and_no_made_up_one(text, binarised):
    train = (text / "train.txt").read_text().split()
    words = [line.split()[0] for line in (binarised / "bin/dict.txt").read_text().splitlines()]
    assert sorted(words) == sorted(set(train))
    assert (binarised / "bin/counts").read_text().split() == [
        *("train", str(tokens_in(text / "train.txt"))),
        *("valid", str(tokens_in(text / "valid.txt"))),
        *("test", str(tokens_in(text / "test.txt"))),
        *("types", str(len(words))),
    ]


def test_preparing_again_does_nothing_and_another_text_is_refused(text, binarised, tmp_path):
    before = (binarised / "bin/train.bin").stat().st_mtime_ns
    assert "already there" in bash("prepare_wikitext103.sh", text, WORK=str(binarised))
    assert (binarised / "bin/train.bin").stat().st_mtime_ns == before
    write_text(tmp_path / "other", (5, 2, 2))
    said = bash("prepare_wikitext103.sh", tmp_path / "other", WORK=str(binarised), ok=False)
    assert "was made of another text" in said


def test_a_binarisation_that_was_stopped_is_done_again(text, tmp_path):
    (tmp_path / "bin.part").mkdir()
    (tmp_path / "bin.part/dict.txt").write_text("half")
    bash("prepare_wikitext103.sh", text, WORK=str(tmp_path))
    assert "half" not in (tmp_path / "bin/dict.txt").read_text()


def test_download_goes_on_and_another_text_than_wikitext_103_is_refused(tmp_path):
    names = [f"wiki.{split}.tokens" for split in ("train", "valid", "test")]
    write_text(tmp_path / "wikitext-103", (9, 3, 3), names)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "wikitext-103" / name, f"wikitext-103/{name}")
    whole = (tmp_path / "archive.zip").read_bytes()
    work = tmp_path / "work"
    work.mkdir()
    (work / "wikitext-103-v1.zip.part").write_bytes(whole[:100])
    said = bash("prepare_wikitext103.sh", WORK=str(work), URL=f"file://{tmp_path}/archive.zip", ok=False)
    assert (work / "wikitext-103-v1.zip").read_bytes() == whole
    assert "wiki.train.tokens: FAILED" in said and "the text is not that of WikiText-103" in said
    assert not (work / "text").exists() and not (work / "bin").exists()


SIZES = {"small": ("256", 96, "500000"), "medium": ("384", 56, "400000")}


@pytest.mark.parametrize("row", OURS, ids=lambda row: row["row"])
def test_hyper_parameters_are_the_papers(row):
    flags = flags_of(command_of(row["row"]))
    window, sequences, updates = SIZES[row["size"]]
    expected = {
        "--arch": f"fast_weight_lm_wt103_{row['size']}",
        "--tokens-per-sample": window,
        "--batch-size": str(sequences),
        "--max-update": updates,
        "--update-freq": "1",
        "--optimizer": "torch_adam",
        "--lr": "2.5e-4",
        "--lr-scheduler": "cosine",
        "--warmup-updates": "2000",
        "--clip-norm": "0.25",
        "--dropout": "0.1",
        "--seed": "1111",
        "--criterion": "adaptive_loss",
        "--required-batch-size-multiple": "1",
        "--validate-interval-updates": "4000",
    }
    assert {flag: flags[flag] for flag in expected} == expected
    assert flags["--task"] == ("stateful_" if row["context"] == "carried" else "") + "language_modeling"
    assert flags_of(shlex.split(row["flags"].strip("`"))).items() <= flags.items()
    if row["context"] == "carried":
        assert "--no-token-positional-embeddings" in flags


def test_rows_have_names_of_their_own():
    assert len({row["row"] for row in ROWS}) == len(ROWS)
    assert {row["context"] for row in ROWS} == {"window", "carried", "published"}


def test_the_batch_is_shared_out():
    shared = flags_of(command_of("medium-delta", GPUS="2", ACCUMULATE="4"))
    assert (shared["--batch-size"], shared["--update-freq"]) == ("7", "4")
    assert shared["--distributed-world-size"] == "2" and "--cpu" not in shared
    assert "cannot be shared out" in bash(
        "train_wikitext103.sh", "--print", "medium-delta", GPUS="3", ok=False
    )
    said = bash("train_wikitext103.sh", "--print", "medium-delta-carried", ACCUMULATE="2", ok=False)
    assert "ACCUMULATE must be 1" in said


@pytest.mark.parametrize("stride", ["0", "257", "x"])
def test_strides_are_within_the_window(stride):
    said = bash("train_wikitext103.sh", "--print", "small-delta", STRIDE=stride, ok=False)
    assert "STRIDE must be 1 to 256" in said


@pytest.mark.parametrize(
    "name, why", [("small-gamma", "no row small-gamma"), ("transformer-xl", "no row"), ("", "no row")]
)
def test_unknown_rows_are_refused(name, why):
    said = bash("train_wikitext103.sh", name, ok=False)
    assert why in said and "small-delta" in said


def test_published_rows_are_not_trained():
    (name, *_) = [row["row"] for row in ROWS if row["context"] == "published"]
    assert "for comparison only" in bash("train_wikitext103.sh", name, ok=False)


@pytest.mark.parametrize("row", OURS, ids=lambda row: row["row"])
def test_two_updates(row, text, binarised):
    command = command_of("--smoke", text, row["row"], WORK=str(binarised))
    assert command.pop(0) == "fairseq-train"
    short = "--max-update 2 --no-save --disable-validation --num-workers 0 --log-interval 1 --no-progress-bar"
    small = "--decoder-layers 2 --tokens-per-sample 8"
    log = run_logged("train", *command, *short.split(), *small.split())
    losses = [float(loss) for loss in re.findall(r"\bloss=([0-9.]+)", log)]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses), log[-2000:]


FEW = "--decoder-layers 1 --decoder-ffn-embed-dim 16".split()


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """One row from its beginning to its end, with a small model: where it worked, and what it printed twice."""
    work = tmp_path_factory.mktemp("finished")
    row = ("train_wikitext103.sh", "--smoke", text, "small-delta", *FEW)
    return work, [bash(*row, WORK=str(work)) for _ in range(2)]


def test_a_row_from_its_beginning_to_its_end(finished):
    _, (printed, again) = finished
    (result,) = [line for line in printed.splitlines() if "Perplexity of small-delta" in line]
    assert re.fullmatch(
        r"== Perplexity of small-delta: valid [0-9.]+ \(published 34.1\), test [0-9.]+ \(published 35.5\)",
        result,
    )
    assert again.count("already there") == 4 and result in again


def test_every_stride_has_a_result_of_its_own(finished, text):
    work, (printed, _) = finished
    row = ("train_wikitext103.sh", "--smoke", text, "small-delta", *FEW)
    again = bash(*row, WORK=str(work), STRIDE="64")
    assert again.count("already there") == 2  # the data and the training
    result = again.splitlines()[-1]
    assert result.startswith("== Perplexity of small-delta (windows 64 apart; published: 1): valid")
    assert re.findall(r"valid ([0-9.]+)", result) != re.findall(r"small-delta: valid ([0-9.]+)", printed)


WINDOW = 64  # with --smoke


def trained(finished):
    """The checkpoint, and the model and the stream of its test text: its </s>, then the tokens."""
    work, _ = finished
    (path,) = work.glob("models/*/checkpoint_best.pt")
    (model,) = checkpoint_utils.load_model_ensemble([str(path)], {"data": str(work / "bin")})[0]
    words = model.decoder.dictionary
    stream = [words.eos()]
    for line in (work / "text/test.txt").read_text().splitlines():
        stream += [*map(words.index, line.split()), words.eos()]
    assert len(stream) > WINDOW + 30
    return path, model.double().eval(), stream


def log_probability(model, seen, word) -> float:
    """Of a word after others, in float64: that of its band, and that of the word in the band."""
    softmax = model.decoder.adaptive_softmax
    with torch.no_grad():
        x = model(torch.tensor([seen]))[0][0, -1]
        head = torch.log_softmax(softmax.head(x[None])[0], dim=0)
        if word < softmax.cutoff[0]:
            return float(head[word])
        band = sum(word >= cutoff for cutoff in softmax.cutoff) - 1
        tail = torch.log_softmax(softmax.tail[band](x[None])[0], dim=0)
        return float(head[softmax.cutoff[0] + band] + tail[word - softmax.cutoff[band]])


def by_hand(model, stream, stride) -> list[float]:
    """Log-probability of every token: windows of WINDOW tokens, each stride further, their last stride scored."""
    found = []
    for i, word in enumerate(stream[1:]):
        end = (i // stride + 1) * stride  # of the window that scores token i
        found.append(log_probability(model, stream[max(0, end - WINDOW) : i + 1], word))
    return found


@pytest.mark.parametrize("stride", [1, 24])
def test_context_window_is_a_sliding_window(finished, stride):
    path, model, stream = trained(finished)
    sizes = f"--tokens-per-sample {WINDOW} --context-window {WINDOW - stride} --batch-size 5"
    rest = "--output-word-probs --num-workers 0 --cpu --no-progress-bar --gen-subset test --user-dir"
    data = [finished[0] / "bin", "--path", path]
    log = run_logged("eval_lm", *data, *sizes.split(), *rest.split(), ROOT / "fairseq_fastweights")
    scored = re.findall(r"(\S+) \[ *(-[0-9.]+)\]", log)
    assert [model.decoder.dictionary.index(word) for word, _ in scored] == stream[1:]
    expected = torch.tensor(by_hand(model, stream, stride), dtype=torch.float64)
    found = torch.tensor([float(x) for _, x in scored], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_the_recipe_evaluates_with_stride_1(finished):
    work, (printed, _) = finished
    _, model, stream = trained(finished)
    perplexity = float(torch.tensor(by_hand(model, stream, 1), dtype=torch.float64).mean().neg().exp())
    other = float(torch.tensor(by_hand(model, stream, WINDOW), dtype=torch.float64).mean().neg().exp())
    reported = float(re.search(r"test ([0-9.]+)", printed.splitlines()[-1])[1])
    assert reported == pytest.approx(perplexity, abs=0.006)  # two digits are printed
    assert reported != pytest.approx(other, abs=0.1)
