"""Which runs are found, which become one row, and what is said of them."""

import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.compare import plots
from fairseq_fastweights.compare.__main__ import main
from fairseq_fastweights.compare.logs import Stats
from fairseq_fastweights.compare.plots import curve, draw_cost, draw_curves, look, metric_title
from fairseq_fastweights.compare.runs import Run, find_runs
from fairseq_fastweights.compare.tables import (
    Row,
    differing_options,
    group,
    main_metric,
    markdown,
    number,
    print_table,
    spread,
    table,
)

HERE = Path(__file__).parent


def run(name, losses=(3.0, 2.0), updates=(10, 20), **options):
    validations = [Stats("valid", u, {"loss": x}) for u, x in zip(updates, losses, strict=True)]
    return Run(name, Path(name), options, 1234567, updates[-1], 100.0, 60.0, validations=validations)


def three():
    return [
        run(
            "delta,seed=1", (3.0, 2.0), update_rule="delta", feature_map="elu", lr=[0.1], seed=1, save_dir="a"
        ),
        run(
            "delta,seed=2", (3.0, 2.2), update_rule="delta", feature_map="elu", lr=[0.1], seed=2, save_dir="b"
        ),
        run(
            "softmax",
            (4.0, 3.0),
            update_rule="softmax",
            feature_map="elu",
            lr=[0.1],
            seed=1,
            save_dir="c",
            extra=1,
        ),
    ]


def test_runs_that_differ_in_the_seed_are_one_row():
    rows = group(three())
    assert [(row.label, len(row.runs)) for row in rows] == [("delta", 2), ("softmax", 1)]
    titles, cells = table(rows)
    assert titles[:3] == ["run", "n", "best valid loss"]
    assert cells[0][:3] == ["delta", "2", "2.10 ± 0.14"]  # sqrt(2 0.1^2)
    assert cells[1][:3] == ["softmax", "1", "3"]
    assert dict(zip(titles, cells[0], strict=True))["parameters"] == "1,234,567"


def test_one_seed_twice_is_not_two_seeds():
    assert len(group([run("a", seed=1, lr=1), run("b", seed=1, lr=1)])) == 2
    assert len(group([run("a"), run("b")])) == 2  # of which nothing is known


@pytest.mark.parametrize(
    "option, value",
    [
        ("eval_csv", "logs/{}.csv"),
        ("tensorboard_logdir", "tb/{}"),
        ("results_path", "results/{}"),
        ("what_a_plugin_writes", "runs/{}/attention.npz"),  # in the run's own folder
    ],
)
def test_where_something_is_written_is_no_difference(option, value):
    runs = [
        run(f"{lr},seed={seed}", lr=lr, seed=seed, save_dir=f"runs/{lr},{seed}")
        for lr in (1, 2)
        for seed in (3, 4)
    ]
    for one in runs:
        one.options[option] = value.format(Path(one.options["save_dir"]).name)
    rows = group(runs)
    assert [len(row.runs) for row in rows] == [2, 2]
    assert differing_options(rows) == ["lr"]


def test_where_something_is_read_is_a_difference():
    runs = [run("a", seed=1, save_dir="a", data="a"), run("b", seed=2, save_dir="b", data="b")]
    assert len(group(runs)) == 2 and differing_options(group(runs)) == ["data"]
    runs = [run("a", seed=1, save_dir="sum", rule="sum"), run("b", seed=2, save_dir="b", rule="sum")]
    assert len(group(runs)) == 1  # a save-dir that is called like a value


def test_only_options_that_differ_are_shown():
    titles, cells = table(group(three()))
    assert titles[-2:] == ["update rule", "feature map"]
    assert [row[-2:] for row in cells] == [["delta", "elu"], ["softmax", ""]]  # softmax has no feature map
    rows = group([run("a", seed=1, lr=[0.1], dropout=0), run("b", seed=1, lr=[0.2], dropout=0.0)])
    assert differing_options(rows) == ["lr"]
    assert [row[-1] for row in table(rows)[1]] == ["0.1", "0.2"]


def test_what_nobody_has_is_no_column_and_what_one_lacks_an_empty_cell():
    runs = [run("a", seed=1, lr=1), Run("b", Path("b"), {"seed": 1, "lr": 2})]
    runs[0].memory = 1.5
    titles, cells = table(group(runs))
    assert "peak memory (GiB)" in titles and "peak GPU memory (GiB)" not in titles
    assert dict(zip(titles, cells[1], strict=True))["peak memory (GiB)"] == ""


@pytest.mark.parametrize(
    "values, n, text",
    [
        ([2.0, 2.2, 2.4], 3, "2.20 ± 0.20"),
        ([2.0, 2.0], 2, "2"),
        ([2.0, 2.2], 3, "2.10 ± 0.14 (2 of 3)"),
        ([1000.0, 3000.0], 2, "2,000 ± 1,414"),
        ([], 2, ""),
        ([float("nan"), 1.0], 2, "nan"),
    ],
)
def test_mean_and_sample_deviation(values, n, text):
    assert spread(values, n) == text


def test_numbers():
    assert [number(x) for x in (5280.0, 4725.25, 1.72, 0.00012345, 12.3456)] == [
        "5,280",
        "4,725",
        "1.72",
        "0.0001234",
        "12.35",
    ]


def test_best_is_highest_or_lowest_as_the_metric_wants():
    one = read("json_bleu.log")
    assert one.best("bleu").metrics["bleu"] == 20.44 and one.best("loss").metrics["loss"] == 0.6
    one.options |= {"best_checkpoint_metric": "latency", "maximize_best_checkpoint_metric": True}
    one.validations = [Stats("valid", u, {"latency": x}) for u, x in ((1, 2.0), (2, 5.0), (3, float("nan")))]
    assert one.best("latency").updates == 2
    assert one.best("accuracy") is None


def read(name):
    (found,) = find_runs([HERE / name])
    return found


def test_main_metric():
    assert main_metric([read("json_bleu.log")]) == "bleu"  # by which it keeps its best checkpoint
    assert main_metric([read("json_bleu.log"), read("lm.log")]) == "loss"
    with pytest.raises(FastWeightError, match="--metric must be one of loss, ppl, bleu, got 'blue'"):
        main_metric([read("json_bleu.log")], "blue")


def test_markdown():
    assert markdown(["run", "loss"], [["a|b", "1 ± 0.1"], ["c", ""]]) == (
        "| run | loss |\n| --- | ---: |\n| a\\|b | 1 ± 0.1 |\n| c |  |\n"
    )


@pytest.mark.parametrize("width", [30, 60, 200])
def test_every_cell_is_readable_on_any_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("TERM", "xterm")
    titles = ["run", *(f"best {i} of all" for i in range(9))]
    cells = [[f"row_number_{r}", *(f"{r}.{i}00 ± 0.1" for i in range(9))] for r in range(2)]
    print_table(titles, cells)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    for row in cells:
        assert all(any(cell in line and row[0] in line for line in lines) for cell in row)
    assert (sum("row_number_0" in line for line in lines) == 1) == (width == 200)


@pytest.fixture
def folder(tmp_path):
    """Runs as they lie about: with train.log inside, log beside the save-dir, a log alone, and other files."""
    for name in ("b10", "b2"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        shutil.copy(HERE / "json_bleu.log", tmp_path / "deep" / name / "train.log")
    (tmp_path / "deep/b2/evaluate.log").write_text("Generate test with beam=5: BLEU4 = 12.34, 50.0/24.2\n")
    (tmp_path / "deep/b10/evaluate.log").write_text(
        "BLEU|nrefs:1|case:mixed|version:2.6.0 = 18.6 50.0/24.2\n"
    )
    (tmp_path / "deep/b2/train.measured").write_text(
        '{"peak_resident_bytes": 1073741824}\n{"peak_resident_bytes": 5}\n'
    )
    (tmp_path / "delta").mkdir()
    torch.save({"model": {}}, tmp_path / "delta/checkpoint_last.pt")
    shutil.copy(HERE / "simple_resumed.log", tmp_path / "delta.log")
    shutil.copy(HERE / "lm.log", tmp_path / "alone.log")
    (tmp_path / "other.log").write_text("nothing of fairseq's\n")
    return tmp_path


def test_runs_are_found_in_folders(folder):
    runs = {one.name: one for one in find_runs([folder])}
    assert list(runs) == ["alone", "delta", "deep/b2", "deep/b10"]
    assert runs["delta"].updates == 170
    assert runs["deep/b2"].evaluation == {"bleu": 12.34} and runs["deep/b10"].evaluation == {"bleu": 18.6}
    assert runs["deep/b2"].memory == 1.0
    assert [one.name for one in find_runs([folder / "delta", folder / "deep/b2/train.log"])] == [
        "delta",
        "b2",
    ]


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere", "nowhere does not exist"),
        ("other.log", "no run of fairseq-train in"),
        ("x.pt", "one checkpoint"),
    ],
)
def test_a_path_without_a_run_is_one_line(folder, capsys, path, words):
    (folder / "x.pt").write_bytes(b"")
    assert main([str(folder / path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def checkpoint(updates, best):
    return {
        "model": {"w": torch.zeros(3, 4), "buffer": torch.zeros(100)},
        "cfg": {
            "checkpoint": {"best_checkpoint_metric": "loss"},
            "common": {"seed": 1},
            "model": Namespace(_name="fast_weight_transformer", update_rule="delta"),
        },
        "optimizer_history": [{"num_updates": updates}],
        "extra_state": {"previous_training_time": 7.5, "best": best},
        "last_optimizer_state": {"state": {0: {"step": updates, "exp_avg": torch.zeros(3, 4)}}},
    }


def test_checkpoints_alone(tmp_path):
    torch.save(checkpoint(100, 1.5), tmp_path / "checkpoint_last.pt")
    torch.save(checkpoint(60, 1.5), tmp_path / "checkpoint_best.pt")
    (found,) = find_runs([tmp_path])
    assert (found.parameters, found.updates, found.seconds) == (12, 100, 7.5)
    assert (found.best("loss").updates, found.best("loss").metrics) == (60, {"loss": 1.5})
    assert (found.options["arch"], found.options["update_rule"]) == ("fast_weight_transformer", "delta")


GENERATE = (
    "2026-11-24 20:09:00 | INFO | fairseq_cli.generate | {'_name': None, 'common': {'seed': 9, 'x': 1}}\n"
)


def test_what_generate_logs_is_no_run(folder, capsys):
    (folder / "generate.log").write_text(GENERATE + "H-0 -1.0 a b\n")
    assert [one.name for one in find_runs([folder])] == ["alone", "delta", "deep/b2", "deep/b10"]
    assert main([str(folder / "generate.log")]) == 1
    assert "no run of fairseq-train in" in capsys.readouterr().err
    (folder / "delta.log").unlink()
    torch.save(checkpoint(100, 1.5), folder / "delta/checkpoint_last.pt")
    (folder / "delta/generate.log").write_text(GENERATE)
    (found,) = find_runs([folder / "delta"])
    assert (found.options["seed"], found.options["update_rule"], found.updates) == (1, "delta", 100)
    assert found.best("loss").metrics == {"loss": 1.5} and "x" not in found.options
    shutil.copy(HERE / "lm.log", folder / "delta/older.log")
    os.utime(folder / "delta/older.log", (0, 0))
    (found,) = find_runs([folder / "delta"])
    assert found.options["arch"] == "fast_weight_lm_tiny"


@pytest.fixture
def two_subsets(tmp_path):
    """A log of two subsets beside a save-dir without a log."""
    log = (HERE / "lm.log").read_text()
    other = log.replace("valid on 'valid' subset | loss 2", "valid on 'test' subset | loss 3")
    (tmp_path / "a.log").write_text(
        log + "".join(x for x in other.splitlines(True) if "valid on 'test'" in x)
    )
    (tmp_path / "b").mkdir()
    torch.save(checkpoint(100, 1.5), tmp_path / "b/checkpoint_last.pt")
    return tmp_path


def test_one_subset_is_not_shown_as_another(two_subsets, capsys):
    runs = find_runs([two_subsets])
    assert [one.best("loss").metrics["loss"] for one in runs] == [2.512, 1.5]
    assert (
        table(group(runs))[0][1] == "best valid loss" and metric_title(runs, "ppl") == "validation perplexity"
    )
    runs = find_runs([two_subsets], "test")
    assert runs[0].best("loss").metrics["loss"] == 3.512 and runs[1].best("loss") is None
    titles, cells = table(group(runs))
    assert titles[1] == "best test loss" and [row[1] for row in cells] == ["3.512", ""]
    assert metric_title(runs, "bleu") == "test BLEU"
    assert main([str(two_subsets), "--subset", "tset"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "--subset must be one of valid, test, got 'tset'" in told.err


def test_the_best_of_a_checkpoint_is_of_the_subset_it_was_chosen_by(tmp_path):
    state = checkpoint(100, 1.5)
    state["cfg"]["dataset"] = {"valid_subset": "test,valid"}
    torch.save(state, tmp_path / "checkpoint_last.pt")
    (found,) = find_runs([tmp_path])
    assert found.best("loss").kind == "test"
    both = [found, read("lm.log")]
    assert table(group(both))[0][1] == "best test or valid loss"


@pytest.mark.parametrize("out", [[], ["--out"]])
def test_a_metric_that_cannot_be_drawn_is_one_line_before_anything_is_written(tmp_path, capsys, out):
    assert main([str(HERE / "lm.log"), "--metric", "blue", *out, *(str(tmp_path / "out") for _ in out)]) == 1
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert ("--metric must be one of loss, ppl, got 'blue'" if out else "it needs --out") in line
    assert told.out == "" and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_does_not_hide_other_runs(folder, capsys):
    (folder / "half").mkdir()
    (folder / "half/checkpoint_last.pt").write_bytes(b"half of it")
    assert len(find_runs([folder])) == 4
    assert "half/checkpoint_last.pt cannot be read" in capsys.readouterr().err


def test_curves_are_means_where_every_seed_has_been():
    runs = [run("a", (4.0, 2.0), (10, 20)), run("b", (6.0, 5.0, 0.0), (10, 15, 25))]
    updates, means, deviations = curve(runs, "loss")
    assert updates.tolist() == [10, 15, 20]
    assert means.tolist() == [5.0, 4.0, 2.25]  # b between 15 and 25: 2.5
    assert deviations.tolist() == pytest.approx([2**0.5, 2**0.5, 0.5 / 2**0.5])


def test_plots_of_many_rows(tmp_path, monkeypatch):
    drawn, write = [], plots._figure._write
    monkeypatch.setattr(plots._figure, "_write", lambda one: [drawn.append(one), write(one)])
    rows = [Row(f"row {i}", [run(f"{i}", (3.0 + i, 0.1 + i))]) for i in range(12)]
    written = draw_curves(rows, "loss", tmp_path) + draw_cost(rows, "loss", "parameters", tmp_path)
    assert [path.name for path in written] == [
        "curves.png",
        "curves.svg",
        "quality-against-parameters.png",
        "quality-against-parameters.svg",
    ]
    curves, points = drawn
    assert [line.get_ydata().tolist() for line in curves.axes.lines] == [
        [3.0 + i, 0.1 + i] for i in range(12)
    ]
    assert [bar[0].get_xydata().tolist() for bar in points.axes.containers] == [
        [[1.234567, 0.1 + i]] for i in range(12)
    ]
    for one in drawn:
        (legend,) = one.figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [row.label for row in rows]
        inside, whole = legend.get_window_extent(), one.figure.bbox
        assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1 and whole.y0 <= inside.y0
        assert inside.y1 <= one.axes.get_tightbbox().y0 + 1  # below the axes, not upon them
    for path in written[::2]:
        picture = imread(path)
        assert picture.shape[1] == plots.WIDTH * 150 and picture[..., :3].std() > 0.05
    looks = [tuple(map(str, look(i).values())) for i in range(100)]
    assert len(set(looks)) == 100


@pytest.mark.parametrize("metric, scale", [("loss", "log"), ("accuracy", "linear")])
def test_logarithms_are_for_what_shrinks(tmp_path, monkeypatch, metric, scale):
    drawn = []
    monkeypatch.setattr(plots._figure, "_write", lambda figure: drawn.append(figure.axes))
    one = run("a", (30.0, 0.3))
    one.validations = [Stats("valid", v.updates, {metric: v.metrics["loss"]}) for v in one.validations]
    draw_curves([Row("a", [one])], metric, tmp_path)
    other = run("b", (900.0, 900.0))
    other.validations = [Stats("valid", v.updates, {metric: v.metrics["loss"]}) for v in other.validations]
    draw_cost([Row("a", [one]), Row("b", [other])], metric, "parameters", tmp_path)
    assert [axes.get_yscale() for axes in drawn] == [scale, scale]
    assert [axes.get_xscale() for axes in drawn] == ["linear", "linear"]
    assert drawn[1].get_xlabel() == "parameters (millions)"


def test_numbers_that_json_does_not_know(tmp_path):
    text = (HERE / "lm.log").read_text().replace("loss 2.541", "loss nan")
    (tmp_path / "train.log").write_text(text)
    assert main([str(tmp_path), "--json", str(tmp_path / "numbers.json")]) == 0
    assert "NaN" not in (tmp_path / "numbers.json").read_text()
    (one,) = json.loads((tmp_path / "numbers.json").read_text())["runs"]
    assert one["validations"][1]["loss"] is None and one["best"]["loss"]["value"] == 2.512


def test_the_command_writes_everything(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main([str(folder), "--out", str(out), "--json", str(tmp_path / "numbers.json"), "--metric", "ppl"])
        == 0
    )
    assert {path.name for path in out.iterdir()} == {
        "table.md",
        "comparison.json",
        "curves.png",
        "curves.svg",
        "quality-against-wall.png",
        "quality-against-wall.svg",
    }
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {one["name"]: one["best"]["ppl"] for one in numbers["runs"]}["alone"] == {
        "value": 5.7,
        "updates": 57,
    }
    assert "update_rule" in numbers["differing_options"]
    printed, written = capsys.readouterr().out, (out / "table.md").read_text()
    for word in ("fast_weight_lm_tiny", "20.44", "18.6"):
        assert word in printed and word in written
