"""The comparison on Multi30k, evaluation and averaging of translation models, on a made-up language pair."""

import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train
from language_pair import ROOT, TRANSLATION, bash
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

sys.path[:0] = [str(ROOT / "examples/compare"), str(TRANSLATION)]

import average_checkpoints  # noqa: E402
import evaluate  # noqa: E402
from commands import run, run_logged  # noqa: E402
from grid_in import grid_in  # noqa: E402

from fairseq_fastweights.compare.grid import build_grid, read_grid  # noqa: E402

GRID = TRANSLATION / "multi30k.yaml"
ROWS = yaml.safe_load(GRID.read_text())["rows"]
LOG = ROOT / "tests/compare/json_bleu.log"


@pytest.fixture(autouse=True)
def first_run_of_its_process():
    """fairseq keeps the best loss of a run in attributes of its functions."""
    for function in (fairseq_train.should_stop_early, checkpoint_utils.save_checkpoint):
        vars(function).clear()


def job_of(work, row):
    """The two updates of a row that --smoke makes, on the CPU."""
    described = grid_in(GRID, work, [row], smoke=True)
    described["command"] += " --cpu --no-progress-bar"
    (job,) = build_grid(described).jobs
    return job


def absolute(words):
    return [str(ROOT / word) if word == "fairseq_fastweights" else word for word in words]


@pytest.mark.parametrize("row", ROWS)
def test_two_updates_of_a_row(prepared, row):
    command, *flags = job_of(prepared, row).commands["train"]
    assert command == "fairseq-train"
    log = run_logged("train", *absolute(flags), "--no-save", "--disable-validation")
    assert "num_updates: 2 >= max_update: 2" in log
    # as multi30k.yaml derives them, for this dictionary
    rule = re.search(r"--update-rule (\S+)", ROWS[row])[1]
    gates = {"softmax": 0, "sum": 0, "delta": 1024, "gated-delta": 2056}[rule]
    attentions = 8 if "everywhere" in row else 3
    entries = len((prepared / "data/bin/dict.en.txt").read_text().splitlines()) + 4
    wanted = 5_424_384 + 256 * (entries - 7800) + gates * attentions
    found = re.search(r"shared model params: ([\d,]+)", log)[1]
    assert int(found.replace(",", "")) == wanted


def in_process(command, **_):
    """In place of subprocess.run: fairseq-generate without a process of its own."""
    assert command[1:3] == ["-m", "fairseq_cli.generate"]
    return subprocess.CompletedProcess(command, 0, stdout=run("generate", *command[3:]), stderr="")


@pytest.fixture(scope="module")
def trained(prepared):
    """A folder with two checkpoints of a small model, and its best one."""
    folder = prepared / "trained"
    vars(checkpoint_utils.save_checkpoint).clear()
    command, *flags = job_of(prepared, "delta+elu").commands["train"]
    small = (
        "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 --max-update 10 "
    )
    small += "--total-num-update 10 --validate-interval-updates 5 --save-interval-updates 5 --keep-interval-updates -1 "
    small += f"--lr 0.02 --feature-map favor --favor-features 4 --keep-best-checkpoints 2 --save-dir {folder}"
    run("train", *absolute(flags), *small.split())
    return folder


def test_a_row_is_trained_and_evaluated(prepared, trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.subprocess, "run", in_process)
    words = job_of(prepared, "delta+elu").commands["evaluate"]
    assert words[:2] == ["python", "examples/translation/evaluate.py"]
    flags = [*words[3:], "--beam", "1", "2", "--lenpen", "0.5", "--", "--cpu"]
    flags[flags.index("--out") + 1] = str(trained / "evaluation")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(trained / "checkpoint_best.pt"), *flags])
    evaluate.main()
    printed = capsys.readouterr().out
    found = json.loads((trained / "evaluation/scores.json").read_text())
    assert [(one["split"], one["beam"]) for one in found[:2]] == [("valid", 1), ("valid", 2)]
    best = max(found[:2], key=lambda one: one["bleu"])
    assert (found[2]["split"], found[2]["beam"], found[2]["lenpen"]) == ("test", best["beam"], 0.5)
    hypotheses = (trained / "evaluation" / found[2]["hypotheses"]).read_text().splitlines()
    references = (prepared / "data/raw/test.de").read_text().splitlines()
    assert len(hypotheses) == len(references) and not any("\u2581" in line for line in hypotheses)
    own = BLEU()
    assert found[2]["bleu"] == own.corpus_score(hypotheses, [references]).score
    assert printed.splitlines()[-1].startswith(f"BLEU|{own.get_signature()} = {found[2]['bleu']:.2f} ")
    assert re.search(r"^chrF2\|nrefs:1\|.*version:\S+ = [\d.]+$", printed, re.MULTILINE)
    buckets = found[2]["by_length"]
    assert [name for name, *_ in buckets] == ["1-8", "9-10", "11-12", "13-15", "16-20", "21+"]
    assert sum(sentences for _, sentences, _ in buckets) == 12
    monkeypatch.setattr(evaluate, "translate", None)  # what is there is used again
    evaluate.main()
    assert json.loads((trained / "evaluation/scores.json").read_text()) == found


def test_bleu_by_length():
    sources = ["a b", "a b c", "a b c", "a b c d e"]
    references = ["eins zwei drei vier", "fünf sechs sieben acht", "neun zehn elf zwölf", "ja"]
    hypotheses = ["eins zwei drei vier", "fünf sechs sieben acht neun", "neun zehn elf", "nein"]
    found = evaluate.bleu_by_length(sources, hypotheses, references, (2, 3, 4))
    assert [(name, count) for name, count, _ in found] == [("1-2", 1), ("3-3", 2), ("4-4", 0), ("5+", 1)]
    middle = BLEU().corpus_score(hypotheses[1:3], [references[1:3]]).score
    assert found[0][2] == pytest.approx(100) and found[1][2] == middle and found[2][2] is None


def test_hypotheses_are_in_the_order_of_the_text(prepared, monkeypatch):
    gap = subprocess.CompletedProcess([], 0, stdout="D-0\t-1\teins\nD-2\t-1\tdrei\n", stderr="")
    monkeypatch.setattr(evaluate.subprocess, "run", lambda command, **_: gap)
    with pytest.raises(SystemExit, match="no hypothesis for sentence 1 of test"):
        evaluate.translate("x.pt", evaluate.read_data(prepared / "data"), "test", 5, 1.0, [])
    said = "S-1\tx\nH-1\t-1\t_b\nD-1\t-1.5\tzwei Wörter\nD-0\t-1\teins\nD-2\t-3\t\n"
    done = subprocess.CompletedProcess([], 0, stdout=said, stderr="")
    monkeypatch.setattr(evaluate.subprocess, "run", lambda command, **_: done)
    data = evaluate.read_data(prepared / "data")
    assert (data.source, data.target) == ("en", "de")
    assert evaluate.translate("x.pt", data, "test", 5, 1.0, []) == ["eins", "zwei Wörter", ""]
    with pytest.raises(SystemExit, match="3 hypotheses for the 12 sentences of test"):
        evaluate.score(data, "test", 5, 1.0, ["a", "b", "c"], (10,), prepared / "x")
    with pytest.raises(SystemExit, match="is no folder of prepare_pairs.sh"):
        evaluate.read_data(prepared)


def test_the_best_setting_of_the_first_split_is_used_for_the_others(prepared, tmp_path, monkeypatch):
    data, asked = evaluate.read_data(prepared / "data"), []

    def translate(checkpoint, data, split, beam, lenpen, flags):
        asked.append((split, beam, lenpen))
        wrong = 3 if (beam, lenpen) != (4, 1.5) else 1
        return ["falsch"] * wrong + data.raw(split, "de")[wrong:]

    monkeypatch.setattr(evaluate, "translate", translate)
    (tmp_path / "x.pt").touch()
    words = [str(tmp_path / "x.pt"), str(data.folder), "--beam", "2", "4", "--lenpen", "0.5", "1.5"]
    args = evaluate.arguments(words)
    args.out.mkdir()
    found = evaluate.evaluate(args)
    assert asked == [*(("valid", beam, lenpen) for beam in (2, 4) for lenpen in (0.5, 1.5)), ("test", 4, 1.5)]
    assert len(found) == 5 and found[3].bleu == max(scores.bleu for scores in found[:4])
    os.utime(tmp_path / "x.pt")  # another checkpoint: everything is translated again
    evaluate.evaluate(args)
    assert len(asked) == 10


def test_hypotheses_of_another_system_are_not_used_again(prepared, tmp_path, monkeypatch):
    asked = []

    def translate(checkpoint, data, split, *_):
        asked.append(checkpoint)
        return data.raw(split, "de")

    monkeypatch.setattr(evaluate, "translate", translate)
    for name in "ab":
        (tmp_path / f"{name}.pt").touch()
    one, other, out = str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), str(tmp_path / "out")
    for words in ([one], [one], [f"{one}:{other}"], [f"{one}:{other}", "--", "--fp16"], [other]):
        words = [words[0], str(prepared / "data"), "--split", "test", "--out", out, *words[1:]]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        evaluate.main()
    assert asked == [one, f"{one}:{other}", f"{one}:{other}", other]
    assert evaluate.arguments([f"{one}:{other}", str(tmp_path)]).out == tmp_path / "a+b-scores"


def test_lines_end_with_a_line_feed_alone(tmp_path):
    (tmp_path / "x").write_bytes(b"a\rb\nc\r\n")
    assert evaluate.read_lines(tmp_path / "x") == ["a\rb", "c\r"]


def test_what_translating_documents_keeps(prepared, trained, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    documents = importlib.import_module("documents")
    checkpoint = str(trained / "checkpoint_best.pt")
    flags = "--sentences 3 --documents 2 --words 100".split()
    monkeypatch.setattr(sys, "argv", ["documents.py", str(prepared / "data"), checkpoint, *flags])
    documents.main()
    printed = capsys.readouterr().out
    assert "2 documents of 3 sentences" in printed
    rows = re.findall(r"^\| trained \| (\S+) \| ([\d,]+) \| [\d.]+ \|$", printed, re.MULTILINE)
    assert [steps for steps, _ in rows] == ["1-50", "51-100"]
    # 4 heads of width 4 with 8 features: the state, and up to 16 pairs
    assert rows[0][1] == rows[1][1] and int(rows[0][1].replace(",", "")) >= 4 * 4 * 8 * 4


def averaged(monkeypatch, *words, status=0):
    monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", *map(str, words)])
    assert average_checkpoints.main() == status


def test_weights_are_averaged_in_float64(trained, prepared, tmp_path, monkeypatch):
    paths = average_checkpoints.last(trained, 2)
    assert [path.name.split("_")[-1] for path in paths] == ["5.pt", "10.pt"]
    out = tmp_path / "averaged.pt"
    averaged(monkeypatch, trained, "--last", 2, "--out", out)
    found, *states = [torch.load(path, weights_only=True) for path in (out, *paths)]
    drawn = 0
    for name, value in found["model"].items():
        one, other = (state["model"][name] for state in states)
        if name.endswith((".projection", ".seed")):
            drawn += not torch.equal(one, other)
            assert torch.equal(value, other)
        else:
            assert value.dtype == other.dtype
            assert torch.equal(value, ((one.double() + other.double()) / 2).to(value.dtype)), name
    assert drawn and not torch.equal(*(state["model"]["decoder.layers.0.fc1.weight"] for state in states))
    flags = ["--user-dir", ROOT / "fairseq_fastweights", "--cpu", "--required-batch-size-multiple", "1"]
    short = ["--max-len-b", "5", "--max-len-a", "0", "--beam", "1"]
    printed = run("generate", prepared / "data/bin", "--path", out, *flags, *short)
    assert len(re.findall("^H-", printed, re.MULTILINE)) == 12


def test_sums_keep_what_float32_would_lose(tmp_path):
    for i, value in enumerate((1e8, 1.0, -1e8)):
        state = {"model": {"w": torch.tensor([value]), "version": torch.tensor([i])}}
        torch.save({**state, "last_optimizer_state": {"big": torch.zeros(9)}}, tmp_path / f"{i}.pt")
    found = average_checkpoints.average([tmp_path / f"{i}.pt" for i in range(3)])
    assert found["model"]["w"] == torch.tensor([1 / 3]) and found["model"]["version"] == torch.tensor([2])
    assert found["last_optimizer_state"] is None


def test_which_checkpoints_are_averaged(tmp_path, monkeypatch, capsys):
    names = [
        "checkpoint2.pt",
        "checkpoint10.pt",
        "checkpoint9.pt",
        "checkpoint_3_70.pt",
        "checkpoint_last.pt",
    ]
    names += ["checkpoint.best_bleu_9.5001.pt", "checkpoint.best_bleu_10.1000.pt", "checkpoint_best.pt"]
    for name in names:
        best = {"cfg": {"checkpoint": {"maximize_best_checkpoint_metric": True}}}
        torch.save({"model": {"w": torch.ones(2)}, **best}, tmp_path / name)
    assert [path.name for path in average_checkpoints.last(tmp_path, 2)] == names[2:0:-1]
    assert [path.name for path in average_checkpoints.best(tmp_path, 1)] == [
        "checkpoint.best_bleu_10.1000.pt"
    ]
    out = tmp_path / "out.pt"
    averaged(monkeypatch, tmp_path, "--last", 4, "--out", out, status=1)
    assert "has 3 checkpoints of this kind, asked for were 4" in capsys.readouterr().err
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "other.pt")
    averaged(monkeypatch, tmp_path / names[0], tmp_path / "other.pt", "--out", out, status=1)
    assert "of another model than the checkpoints before it: w differs" in capsys.readouterr().err
    assert not out.exists()


class Code:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_checkpoint_with_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": Code()}}, "bad.pt")
    averaged(monkeypatch, "bad.pt", "--out", "out.pt", status=1)
    assert "checkpoint bad.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "it_ran").exists()


def load_results(monkeypatch, name="results"):
    """results.py of this folder: that of the language models has the same name. Or a file that imports it."""
    monkeypatch.delitem(sys.modules, "results", raising=False)
    monkeypatch.syspath_prepend(str(TRANSLATION))
    return importlib.import_module(name)


@pytest.fixture
def finished(prepared, tmp_path):
    """WORK of a comparison in which softmax and delta+elu are finished, in made-up runs: softmax is worse."""
    work = tmp_path / "work"
    shutil.copytree(prepared / "data", work / "data")
    described = grid_in(GRID, work, ["softmax", "sum+elu", "delta+elu"], smoke=False)
    (work / "grid.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    data = evaluate.read_data(work / "data")
    references = data.raw("test", "de")
    jobs = {job.name.split(",")[0]: job for job in read_grid(work / "grid.yaml").jobs}
    for name, wrong in (("softmax", 6), ("delta+elu", 1)):
        folder = jobs[name].folder / "evaluation"
        folder.mkdir(parents=True)
        chosen, scores = random.Random(7), []
        hypotheses = [" ".join(chosen.sample(x.split(), len(x.split()))) for x in references[:wrong]]
        for split, lines in (("valid", data.raw("valid", "de")), ("test", hypotheses + references[wrong:])):
            path = folder / f"{split}.de"
            evaluate.write_lines(path, lines)
            scores.append(evaluate.asdict(evaluate.score(data, split, 5, 1.0, lines, (5, 99), path)))
        (folder / "scores.json").write_text(json.dumps(scores))
        shutil.copy(LOG, jobs[name].file("train", "log"))
        for step in ("train", "evaluate"):
            jobs[name].file(step, "finished").write_text(jobs[name].command(step) + "\n")
    return work


def test_results_between_the_marks(finished, tmp_path, monkeypatch):
    results = load_results(monkeypatch)
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(TRANSLATION / "README.md", folder)
    written = folder / "README.md"
    before, after = re.split(r"<!-- results -->.*<!-- /results -->", written.read_text(), flags=re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["results.py", str(finished), "--into", str(folder)])
    for _ in range(2):  # the second time in place of the first
        results.main()
    text = written.read_text()
    assert text.startswith(before) and text.endswith(after) and str(finished) not in text
    section = text[len(before) : len(text) - len(after)]
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in section.splitlines()}
    softmax, delta = rows["| softmax"], rows["| delta+elu"]
    assert softmax[1:3] == ["1", "100"] and softmax[5:7] == ["", ""]
    references = evaluate.read_lines(finished / "data/raw/test.de")
    systems = [evaluate.read_lines(path) for path in sorted(finished.glob("runs/*/evaluation/test.de"))][::-1]
    bleu = [BLEU().corpus_score(lines, [references]).score for lines in systems]
    assert delta[5] == f"{bleu[1] - bleu[0]:+.2f}" and bleu[1] > bleu[0]
    test = PairedTest(list(zip("ab", systems, strict=True)), {"BLEU": BLEU()}, [references], "bs", 1000)
    assert delta[6] == f"{test()[1]['BLEU'][1].p_value:.3f}"
    assert "Not finished: sum+elu,seed=1." in text
    assert "    --update-rule delta --feature-map elu \\" in text
    assert "examples/translation/multi30k/runs/delta+elu,seed=1" in text
    for name in ("multi30k", "multi30k-lengths"):
        assert (folder / f"{name}.png").stat().st_size > 10_000 and (folder / f"{name}.svg").is_file()


def test_curves_by_length_are_those_of_the_scores(finished, tmp_path, monkeypatch):
    results, drawn = load_results(monkeypatch), []
    monkeypatch.setattr(results, "draw_groups", lambda *arguments: drawn.append(arguments))
    rows = results.finished_rows(read_grid(finished / "grid.yaml"))
    results.draw_lengths(rows, tmp_path)
    ((curves, names, *_),) = drawn
    for (label, values), row in zip(curves, rows, strict=True):
        buckets = results.scores(row.runs[0], "test")["by_length"]
        assert label == row.label
        assert [None if math.isnan(value) else value for value in values] == [bleu for *_, bleu in buckets]
        assert names == [f"{name}\n({count})" for name, count, _ in buckets]


LAST = "2026-01-01 00:00:00 | INFO | fairseq_cli.train | Stopping training due to num_updates: {0} >= max_update: {0}\n"


def test_results_of_the_conversion(finished, tmp_path, monkeypatch):
    out, (softmax,) = finished / "converted", finished.glob("runs/softmax*")
    (delta,) = finished.glob("runs/delta+elu*")
    with open(softmax / "train.log", "a") as log:
        log.write(LAST.format(1800))
    out.mkdir()
    (out / "as-converted.log").write_text(
        f"kept: 3 tensors\n\nfairseq-train {finished}/data/bin --task translation --user-dir "
        f"{ROOT}/fairseq_fastweights --max-update 180\n"
    )
    for name, updates in (("distilled", 180), ("distilled,trained", 170), ("trained", 360)):
        (out / f"{name}.log").write_text(LAST.format(updates))
        (out / f"{name}.finished").write_text("90\n")
    module = load_results(monkeypatch, "conversion_results")
    for name in module.ROWS:
        shutil.copytree((softmax if name == "as-converted" else delta) / "evaluation", out / name)
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(TRANSLATION / "README.md", folder)
    monkeypatch.setattr(sys, "argv", ["conversion_results.py", str(finished), "--into", str(folder)])
    module.main()
    text = (folder / "README.md").read_text()
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in text.splitlines()}
    assert rows["| softmax, the model that is converted"][1:3] == ["1800", "100.00"]
    one, other = (module.scores_in(x / "evaluation", "test")["bleu"] for x in (softmax, delta))
    both = rows["| distilled, then trained"]
    assert both[1] == "350" and both[3:5] == [f"{other:.2f}", f"{other / one:.1%}"] and both[6] == "3.0"
    assert rows["| as converted"][1] == "0" and rows["| as converted"][4] == "100.0%"
    assert "fairseq-train examples/translation/multi30k/data/bin \\\n    --task translation" in text
    assert str(finished) not in text and str(ROOT) not in text


@pytest.mark.long
def test_the_script_from_text_to_table(pairs, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, split in (("train", "train"), ("val", "valid"), ("test_2016_flickr", "test")):
        for language in ("en", "de"):
            shutil.copy(pairs / f"{split}.{language}", folder / f"{name}.{language}")
    (tmp_path / "results").mkdir()
    shutil.copy(TRANSLATION / "README.md", tmp_path / "results")
    settings = {
        "WORK": str(tmp_path / "work"),
        "RESULTS": str(tmp_path / "results"),
        "ROWS": "softmax",
        "VOCAB": "60",
    }
    bash(TRANSLATION / "compare_multi30k.sh", "--smoke", folder, **settings)
    assert (tmp_path / "work/runs/softmax,seed=1/evaluate.finished").is_file()
    assert (tmp_path / "results/README.md").read_text().count("| softmax | 1 |") == 1
    bash(TRANSLATION / "convert_multi30k.sh", **settings)
    assert "| trained without distillation | 2 |" in (tmp_path / "results/README.md").read_text()
    assert "s\n" not in bash(TRANSLATION / "convert_multi30k.sh", **settings)  # nothing is done again
