"""Text for language models, and the comparison on WikiText-2, on a made-up text."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fairseq import checkpoint_utils
from fairseq.data import MMapIndexedDataset
from fairseq_cli import train as fairseq_train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples/language_model"
sys.path[:0] = [str(ROOT / "tests/cli"), str(ROOT / "examples/compare"), str(RECIPES)]

import carried  # noqa: E402
import results  # noqa: E402
from commands import run_logged  # noqa: E402
from grid_in import grid_in  # noqa: E402

from fairseq_fastweights.compare.grid import build_grid, read_grid  # noqa: E402

SPLITS = {"train": 240, "valid": 30, "test": 30}  # lines
GRID = RECIPES / "wikitext2.yaml"
ROWS = yaml.safe_load(GRID.read_text())["rows"]
LOG = ROOT / "tests/compare/lm.log"  # its best validation perplexity is 5.7, its wall time 6 s


def bash(script, *arguments, ok=True, **environment) -> str:
    """What a recipe prints, with the commands of this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Lines of made-up words, every third one empty; 'onlytest' is in no training text."""
    folder, chosen = tmp_path_factory.mktemp("text"), random.Random(1)
    words = [a + b for a in "ka lo mi nu re".split() for b in "bel dor fin gas".split()] + ["<unk>"]
    for split, size in SPLITS.items():
        lines = [" ".join(chosen.choices(words, k=12)) if i % 3 else " " for i in range(size)]
        lines[1] += " onlytest" if split == "test" else ""
        (folder / f"{split}.txt").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def pieces(text, tmp_path_factory):
    """WORK, with the text in 60 pieces."""
    work = tmp_path_factory.mktemp("work")
    bash("prepare_text.sh", text, work / "data", VOCAB="60")
    return work


def tokens(file: Path) -> int:
    """Of a text, ends of lines counted."""
    return sum(len(line.split()) + 1 for line in file.read_text().splitlines())


def binarised(data: Path, split: str) -> int:
    dataset = MMapIndexedDataset(str(data / split))  # sizes are of its file, which it closes at its end
    return int(dataset.sizes.sum())


def test_pieces_are_counted_and_give_the_text_back(text, pieces):
    counted = [line.split() for line in (pieces / "data/tokens").read_text().splitlines()]
    assert [split for split, *_ in counted] == list(SPLITS)
    for split, words, cut in counted:
        assert int(words) == tokens(text / f"{split}.txt")
        assert int(cut) == binarised(pieces / "data", split) > int(words)
        lines = (pieces / f"data/pieces/{split}.txt").read_text().splitlines()
        joined = [line.replace(" ", "").replace("\u2581", " ").strip() for line in lines]
        assert joined == [line.strip() for line in (text / f"{split}.txt").read_text().splitlines()]


def test_words_are_those_of_the_training_text(text, tmp_path):
    bash("prepare_text.sh", text, tmp_path / "data", VOCAB="words")
    known = {line.split()[0] for line in (tmp_path / "data/dict.txt").read_text().splitlines()}
    known = {word for word in known if not word.startswith("madeupword")}
    assert known == set((text / "train.txt").read_text().split()) - {"<unk>"}
    assert binarised(tmp_path / "data", "test") == tokens(text / "test.txt") == 20 * 12 + 1 + 30


def test_prepared_text_is_used_again_and_mixed_with_no_other(text, pieces):
    data = pieces / "data"
    model, before = data / "pieces/spm.model", (data / "test.bin").read_bytes()
    made = model.stat().st_mtime_ns
    (data / "dict.txt").unlink()  # as if binarising had been stopped
    bash("prepare_text.sh", text, data, VOCAB="60")
    assert model.stat().st_mtime_ns == made and (data / "test.bin").read_bytes() == before
    assert "already there" in bash("prepare_text.sh", text, data, VOCAB="60")
    assert "another text or VOCAB" in bash("prepare_text.sh", text, data, VOCAB="61", ok=False)


@pytest.mark.parametrize(
    "folder, vocab, message",
    [("", "0", "VOCAB must be"), ("no", "60", "there is no"), ("", "x", "VOCAB must")],
)
def test_wrong_requests(text, tmp_path, folder, vocab, message):
    assert message in bash("prepare_text.sh", text / folder, tmp_path / "data", VOCAB=vocab, ok=False)


def small(described: dict) -> dict:
    """The grid with short segments: what it says of the rows stays."""
    changed = yaml.safe_dump(described, sort_keys=False, width=10**6).replace(
        "--tokens-per-sample 256", "--tokens-per-sample 32"
    )
    changed = yaml.safe_load(changed)
    changed["command"] += " --decoder-layers 1 --batch-size 4 --cpu"
    return changed


@pytest.mark.parametrize("row", ROWS)
def test_two_updates_of_a_row_and_its_evaluation(pieces, row):
    for function in (fairseq_train.should_stop_early, checkpoint_utils.save_checkpoint):
        vars(function).pop("best", None)  # of the run before
    (job,) = build_grid(small(grid_in(GRID, pieces, [row], smoke=True))).jobs
    command, *flags = job.commands["train"]
    assert command == "fairseq-train"
    log = run_logged("train", *absolute(flags))
    assert "num_updates: 2 >= max_update: 2" in log
    # 128 * 4 weights for beta; as many and two numbers a head for the decay
    rule = re.search(r"--update-rule (\S+)", job.command("train"))[1]
    gates = {"softmax": 0, "sum": 0, "delta": 512, "gated-delta": 512 + 512 + 8}[rule]
    embeddings = 128 * (4 + entries(pieces))
    layer = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 2 * 2 * 128
    assert (
        int(re.search(r"shared model params: ([\d,]+)", log)[1].replace(",", ""))
        == embeddings + layer + gates
    )
    command, *flags = job.commands["evaluate"]
    assert command == "fairseq-eval-lm"
    log = run_logged("eval_lm", *absolute(flags), "--cpu")
    assert 1 < float(re.search(r"Perplexity: ([\d.]+)", log)[1]) < 10_000
    evaluated = int(re.search(r"Evaluated ([\d,]+) tokens", log)[1].replace(",", ""))
    assert evaluated == binarised(pieces / "data", "test")


def entries(pieces: Path) -> int:
    return len((pieces / "data/dict.txt").read_text().splitlines())


def absolute(flags):
    return [str(ROOT / flag) if flag == "fairseq_fastweights" else flag for flag in flags]


def readme(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(RECIPES / "README.md", folder)
    return folder / "README.md"


@pytest.mark.long
def test_the_script_from_text_to_table(text, tmp_path):
    written = readme(tmp_path / "results")
    environment = {
        "WORK": str(tmp_path / "work"),
        "ROWS": "softmax",
        "RESULTS": str(written.parent),
        "VOCAB": "60",
    }
    bash("compare_wikitext2.sh", "--smoke", text, **environment)
    assert (tmp_path / "work/runs/softmax,seed=1/evaluate.finished").is_file()
    assert written.read_text().count("| softmax | 1 |") == 1
    assert (written.parent / "wikitext2.png").stat().st_size > 10_000


@pytest.fixture
def finished(tmp_path):
    """WORK of a comparison in which softmax and delta+elu are finished, in made-up runs."""
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "data/tokens").write_text("train 100 150\nvalid 20 30\ntest 10 20\n")
    described = grid_in(GRID, work, ["softmax", "sum+elu", "delta+elu"], smoke=False)
    (work / "grid.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    for job, test in zip(read_grid(work / "grid.yaml").jobs, (8.5, None, 7.25), strict=True):
        job.folder.mkdir(parents=True)
        shutil.copy(LOG, job.file("train", "log"))
        job.file("train", "finished").write_text(job.command("train") + "\n")
        if test:
            job.file("evaluate", "log").write_text(f"Loss (base 2): 3, Perplexity: {test}\n")
            job.file("evaluate", "finished").write_text(job.command("evaluate") + "\n")
    return work


def test_results_between_the_marks(finished, tmp_path, monkeypatch):
    written = readme(tmp_path / "results")
    before, after = re.split(r"<!-- results -->.*<!-- /results -->", written.read_text(), flags=re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["results.py", str(finished), "--into", str(written.parent)])
    for _ in range(2):  # the second time in place of the first
        results.main()
    lines = written.read_text().splitlines()
    assert written.read_text().startswith(before) and written.read_text().endswith(after)
    # 5.7^(30/20), 8.5^(20/10), 7.25^2; 6 s are 0.1 minutes
    speed = r"4,\d{3}"
    for row, test, word in (("softmax", "8.5", "72.25"), ("delta\\+elu", "7.25", "52.56")):
        pattern = rf"\| {row} \| 1 \| 5.7 \| {test} \| 13.61 \| {word} \| 69,120 \| {speed} \| 0.1 \|"
        assert len([line for line in lines if re.fullmatch(pattern, line)]) == 1
    assert "Not finished: sum+elu,seed=1." in lines
    assert (
        "softmax    --update-rule softmax" in lines
        and "delta+elu  --update-rule delta --feature-map elu" in lines
    )
    assert "    --task language_modeling --update-rule delta --feature-map elu \\" in lines
    assert str(finished) not in written.read_text()
    assert (written.parent / "wikitext2.svg").is_file() and (written.parent / "wikitext2.png").is_file()


# its perplexity says which model it evaluates, and how
EVALUATION = """#!/bin/bash
case "$*" in *no-positions*) model=2;; *) model=3;; esac
case "$*" in *gated*) model=1$model;; esac
case "$*" in *stateful*) way=5;; *) way=4;; esac
echo "Perplexity: 1.00 | of a subset"
echo "Loss (base 2): 3, Perplexity: $model$way.25"
echo once >> "$COUNT"
"""


def test_both_ways_of_reading_between_the_marks(tmp_path, monkeypatch):
    work = tmp_path / "work"
    first, second = ([f"{rule},{end}" for end in carried.WAYS] for rule in carried.RULES)
    for chosen, evaluations in ((first[:1], 0), (first, 4), (first + second, 8)):
        work.mkdir(exist_ok=True)
        (work / "grid.yaml").write_text(yaml.safe_dump(grid_in(GRID, work, chosen, smoke=False)))
        jobs = read_grid(work / "grid.yaml").jobs
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            for step in job.commands:
                job.file(step, "finished").write_text(job.command(step) + "\n")
        stand_in = tmp_path / "bin/fairseq-eval-lm"
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(EVALUATION)
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("COUNT", str(tmp_path / "count"))
        written = readme(tmp_path / "results")
        before = written.read_text()
        monkeypatch.setattr(sys, "argv", ["carried.py", str(work), "--into", str(written.parent)])
        carried.main()
        found, count = written.read_text(), tmp_path / "count"
        assert (found == before) == (not evaluations)
        assert (count.read_text().count("once") if count.exists() else 0) == evaluations  # none again
    assert "| trained from nothing (`delta+elu,no-positions`) | 24.2 | 25.2 |" in found
    assert "| trained carried (`delta+elu,carried`) | 34.2 | 35.2 |" in found
    assert "| trained from nothing (`gated-delta+elu,no-positions`) | 124.2 | 125.2 |" in found
    assert "| trained carried (`gated-delta+elu,carried`) | 134.2 | 135.2 |" in found
    (by_hand,) = re.findall(
        r"```bash\n(fairseq-eval-lm[^`]*--path[^`]*)```", found.split("<!-- carried -->")[1]
    )
    words = by_hand.replace("\\\n", " ").split()
    assert words[words.index("--path") + 1] == f"{carried.USUAL}/runs/{first[0]},seed=1/checkpoint_best.pt"
    assert words[words.index("--task") + 1] == "stateful_language_modeling"
    assert before.split("<!-- carried -->")[0] == found.split("<!-- carried -->")[0]


def test_rows_are_asked_for_by_name():
    with pytest.raises(ValueError, match="no row 'delte' in wikitext2.yaml: it has softmax sum"):
        grid_in(GRID, Path("work"), ["delte"], smoke=False)
