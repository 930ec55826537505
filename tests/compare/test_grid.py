"""Grids: what a file asks for, and that runs are started, stopped, resumed and never done twice."""

import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.compare import grid as grids
from fairseq_fastweights.compare import plots
from fairseq_fastweights.compare.__main__ import main
from fairseq_fastweights.compare.grid import build_grid

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAINER = f"{sys.executable} {HERE / 'stand_in_trainer.py'}"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take a second each, and are looked at in test_tables.py."""
    for name in ("draw_curves", "draw_cost"):
        monkeypatch.setattr(plots, name, lambda *_: [])


def jobs(**described):
    return {job.name: job for job in build_grid({"command": "python", **described}).jobs}


def test_rows_times_what_varies_times_seeds():
    made = jobs(
        rows={"soft max": "--arch transformer", "delta": "--arch fast --dpfp 1"},
        vary={"lr": ["1e-3", 0.01], "--share": [True, False]},
        seeds=[1, 2],
        out="o",
    )
    assert len(made) == 2 * 2 * 2 * 2
    assert made["soft_max,lr=1e-3,share=true,seed=1"].command("train") == (
        "python --arch transformer --lr 1e-3 --share --save-dir o/soft_max,lr=1e-3,share=true,seed=1 --seed 1"
    )
    assert made["delta,lr=0.01,share=false,seed=2"].commands["train"] == (
        "python --arch fast --dpfp 1 --lr 0.01 --save-dir o/delta,lr=0.01,share=false,seed=2 --seed 2".split()
    )


def test_places_in_commands():
    made = jobs(
        command="python a={dir} b={seed}", evaluate="python {dir}/x {name} 'two words'", seeds=[7], out="o"
    )
    assert made["seed=7"].commands == {
        # a place elsewhere in the command does not keep the runs apart
        "train": ["python", "a=o/seed=7", "b=7", "--save-dir", "o/seed=7", "--seed", "7"],
        "evaluate": ["python", "o/seed=7/x", "seed=7", "two words"],
    }


def test_a_row_may_be_evaluated_in_its_own_way():
    rows = {"sum": "--rule sum", "carried": {"flags": "--rule delta", "evaluate": "python {dir}/own"}}
    made = jobs(rows=rows, evaluate="python {dir}/all", out="o")
    evaluated = {name: job.commands["evaluate"][1] for name, job in made.items()}
    assert evaluated == {"sum": "o/sum/all", "carried": "o/carried/own"}
    made = jobs(rows=rows, out="o")
    assert list(made["sum"].commands) == ["train"] and list(made["carried"].commands) == ["train", "evaluate"]


@pytest.mark.parametrize(
    "flags",
    ["--save-dir {dir} --seed {seed}", "--save-dir=x/{name} --seed=1{seed}"]
    + ["checkpoint.save_dir={dir} common.seed={seed}", "+checkpoint.save_dir={dir} +common.seed={seed}"],
)
def test_flags_that_are_there_are_not_added(flags):
    (job,) = jobs(command="python " + flags, seeds=[7], out="o").values()
    filled = flags.format(dir="o/seed=7", name="seed=7", seed=7)
    assert job.command("train") == "python " + filled


def test_a_row_may_vary_in_its_own_way():
    rows = {
        "softmax": {"flags": "--rule softmax", "vary": {"lr": [1]}},
        "one": {"flags": "--rule one", "vary": {}},
        "delta": "--rule delta",
    }
    made = jobs(rows=rows, vary={"lr": [1, 2], "nu": [3]}, seeds=[5, 6], out="o")
    assert [name for name in made if "seed=5" in name] == [
        "softmax,lr=1,seed=5",
        "one,seed=5",
        "delta,lr=1,nu=3,seed=5",
        "delta,lr=2,nu=3,seed=5",
    ]
    assert len(made) == 8 and made["one,seed=6"].command("train").startswith("python --rule one --save-dir")


MISTAKES = {
    "unknown key": ("command: x\nseed: [1]", "unknown key 'seed' (allowed: command, out,"),
    "no command": ("seeds: [1]", "command is missing or empty"),
    "empty seeds": ("command: x\nseeds: []", "seeds must be a list with at least one value"),
    "seeds that are words": ("command: x\nseeds: [one]", "seeds must be whole numbers, got 'one'"),
    "empty list": ("command: x\nvary: {lr: []}", "lr must be a list with at least one value"),
    "one value": ("command: x\nvary: {lr: 0.1}", "lr must be a list"),
    "nested value": ("command: x\nvary: {lr: [[1]]}", "lr must have plain values"),
    "rows as list": ("command: x\nrows: [a]", "rows must be names"),
    "twice the same": ("command: x\nvary: {lr: [1, 1]}", "two runs would be called 'lr=1'"),
    "quotes": ("command: x 'y", "command: no closing quotation"),
    "own save-dir": ("command: x --save-dir y", "command must not have --save-dir y: out says what it is"),
    "own save-dir beside a place": (
        "command: x --save-dir y --log-file {name}.log",
        "command must not have --save-dir y: out says",
    ),
    "own seed in a row": (
        "command: x\nrows: {a: --seed 1}\nseeds: [1]",
        "must not have --seed 1: seeds says",
    ),
    "row with an unknown key": (
        "command: x\nrows: {a: {flag: --b}}",
        "unknown key in row 'a': 'flag' (allowed",
    ),
    "row without text": ("command: x\nrows: {a: {flags: [b]}}", "row 'a' must have flags as one text"),
    "length": ("command: python --max-update 1k", "--max-update must be a number, got '1k'"),
    "own seed": ("command: x --seed 1\nseeds: [1]", "command must not have --seed 1: seeds says"),
    "no mapping": ("- a", "a grid is a mapping"),
    "no YAML": ("a: [", "is not YAML: while parsing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_one_clear_line(tmp_path, capsys, mistake):
    text, words = MISTAKES[mistake]
    (tmp_path / "grid.yaml").write_text(text)
    assert main(["run", str(tmp_path / "grid.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fairseq_fastweights: error: ") and words in line
    assert "grid.yaml" in line or mistake == "length"


def write(folder, **described):
    described = {"command": TRAINER, "out": str(folder / "runs"), **described}
    (folder / "grid.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    return str(folder / "grid.yaml")


def starts(folder, step="train"):
    """How many processes a run has had."""
    return len((folder / f"{step}.measured").read_text().splitlines())


def test_runs_evaluates_compares_and_does_nothing_twice(tmp_path, capsys):
    evaluate = f"{sys.executable} -c \"print('BLEU4 = 12.50, 50.0/24.2')\" {{dir}}"
    file = write(tmp_path, vary={"lr": [1.0, 2.0]}, seeds=[1, 2], evaluate=evaluate)
    for _ in range(2):
        assert main(["run", file, "--jobs", "3"]) == 0
    runs = tmp_path / "runs"
    folders = [runs / f"lr={lr},seed={seed}" for lr in ("1.0", "2.0") for seed in (1, 2)]
    assert [starts(folder) + starts(folder, "evaluate") for folder in folders] == [2, 2, 2, 2]
    numbers = json.loads((runs / "comparison.json").read_text())
    assert [row["label"] for row in numbers["rows"]] == ["lr=1.0", "lr=2.0"]
    assert numbers["runs"][0]["evaluation"] == {"bleu": 12.5}
    assert "4.83 ± 0.71" in (runs / "table.md").read_text()  # 10/3 + 1 and 10/3 + 2
    assert "4 of 4 runs were finished before" in capsys.readouterr().out


def test_failing_runs_are_named_and_the_others_go_on(tmp_path, capsys):
    file = write(tmp_path, rows={"bad": "--lr -1", "unknown": "--no-such-flag", "good": "--lr 1"})
    for _ in range(2):  # what failed is tried again
        assert main(["run", file]) == 1
    told = capsys.readouterr()
    assert "failed: bad: train ended with status 1" in told.err and "    a negative rate" in told.err
    assert (
        "failed: unknown: train ended with status 2" in told.err and "arguments: --no-such-flag" in told.err
    )
    assert re.search(r"good +3.333", told.out)
    runs = tmp_path / "runs"
    assert [starts(runs / name) for name in ("bad", "unknown", "good")] == [2, 2, 1]


def test_what_a_run_takes_is_measured(tmp_path, capsys):
    hog = bytearray(700 << 20)  # of this process, which must not count
    hog[:: 1 << 12] = b"x" * len(hog[:: 1 << 12])
    assert main(["run", write(tmp_path, command=TRAINER + " --megabytes 100 --seconds 0.1")]) == 0
    measured = json.loads((tmp_path / "runs/run/train.measured").read_text())
    assert 100 << 20 < measured["peak_resident_bytes"] < 250 << 20
    assert measured["seconds"] >= 0.3 and measured["status"] == 0


def alive(pid):
    """Whether a process is there that was not told to end a moment ago."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and is_there(pid):
        time.sleep(0.05)
    return is_there(pid)


def is_there(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def signal_when(condition, number):
    """Send this process a signal as soon as a condition holds; a minute later in any case."""

    def wait():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_runs_that_save_nothing(tmp_path, capsys):
    file = write(tmp_path, command=TRAINER + " --no-save", seeds=[1, 2])
    assert main(["run", file]) == 0 and main(["run", file]) == 0
    runs = tmp_path / "runs"
    assert [starts(runs / f"seed={seed}") for seed in (1, 2)] == [1, 1]
    assert not list(runs.glob("*/saved")) and "4.83 ± 0.71" in (runs / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_with_its_children_and_resumed(tmp_path, capsys, number):
    file = write(tmp_path, command=TRAINER + " --max-update 8 --seconds 0.25 --child", seeds=[1, 2])
    saved, child = tmp_path / "runs/seed=1/saved", tmp_path / "runs/seed=1/child"
    signal_when(lambda: saved.exists() and saved.read_text() >= "2", number)
    assert main(["run", file]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not alive(int(child.read_text()))
    reached = int(saved.read_text())
    assert 2 <= reached < 8 and not (tmp_path / "runs/seed=2").exists()
    one = build_grid({**yaml.safe_load(Path(file).read_text()), "seeds": [1]})
    assert grids.run_grid(one) == []
    log = (tmp_path / "runs/seed=1/train.log").read_text()
    assert "num_updates=1," in log and f"@ {reached} updates" in log and saved.read_text() == "8"
    os.kill(int(child.read_text()), signal.SIGKILL)  # of the run that ended by itself


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_save_who_does_not_want_to_end(tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(grids, "SECONDS_TO_STOP", 1.5)
    stopped = []
    stop = grids._stop
    monkeypatch.setattr(grids, "_stop", lambda running: [stopped.append(1), stop(running)])
    file = write(tmp_path, command=TRAINER + " --max-update 300 --seconds 0.1 --deaf --child")
    child = tmp_path / "runs/run/child"
    signal_when(lambda: child.exists() and child.read_text(), signal.SIGTERM)
    signal_when(lambda: stopped and time.sleep(0.4) is None, number)
    assert main(["run", file]) == 130
    saved = (tmp_path / "runs/run/saved").read_text()
    assert not alive(int(child.read_text()))
    time.sleep(0.3)
    assert (tmp_path / "runs/run/saved").read_text() == saved < "300"


def test_hangup_stops_the_runs_but_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, handler)
            with grids._stopping_signals():
                ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
                assert ignored == (handler is signal.SIG_IGN)
                if not ignored:
                    with pytest.raises(KeyboardInterrupt):
                        signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_longer_goes_on_and_another_command_is_refused(tmp_path, capsys):
    assert main(["run", write(tmp_path, command=TRAINER + " --max-update 2")]) == 0
    assert main(["run", write(tmp_path, command=TRAINER + " --max-update 4")]) == 0
    assert "@ 2 updates" in (tmp_path / "runs/run/train.log").read_text()
    assert (tmp_path / "runs/run/saved").read_text() == "4"
    capsys.readouterr()
    assert main(["run", write(tmp_path, command=TRAINER + " --max-update 4 --lr 2")]) == 1
    assert "holds a run of another command (now has '--lr', now has '2')" in capsys.readouterr().err
    assert main(["run", write(tmp_path, command=TRAINER + " --max-update 3")]) == 1
    assert "holds a longer run (--max-update: was 4, is 3)" in capsys.readouterr().err
    assert starts(tmp_path / "runs/run") == 2


def test_a_longer_run_is_evaluated_again(tmp_path):
    evaluate = f"{sys.executable} -c 'print(open(\"{{dir}}/saved\").read())'"
    for updates in (2, 2, 4):
        grid = write(tmp_path, command=TRAINER + f" --max-update {updates}", evaluate=evaluate)
        assert main(["run", grid]) == 0
        assert (tmp_path / "runs/run/evaluate.log").read_text() == f"{updates}\n"
    assert starts(tmp_path / "runs/run") == 2


@pytest.mark.parametrize(
    "before, now, refused",
    [
        ("--max-update 4", "--max-update=5", False),
        ("--max-update 4", "--max-update 0", False),  # for fairseq no limit
        ("--max-update 4", "", False),
        ("", "--max-update 4", True),
        ("--max-epoch 4", "--max-epoch 3", True),
        ("optimization.max_update=4", "optimization.max_update=3", True),
        ("optimization.max_update=4", "optimization.max_update=5", False),
    ],
)
def test_what_is_longer(tmp_path, before, now, refused):
    (job,) = jobs(command="python " + before, out=str(tmp_path)).values()
    job.folder.mkdir()
    job.file("train", "command").write_text(job.command("train"))
    (job,) = jobs(command="python " + now, out=str(tmp_path)).values()
    if refused:
        with pytest.raises(FastWeightError, match="holds a longer run"):
            grids.check(job)
    else:
        grids.check(job)


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_folder_in_which_another_process_runs_is_left_alone(tmp_path, capsys, step):
    evaluate = f"{sys.executable} -c \"print('BLEU4 = 12.50, 50.0/24.2')\""
    (job,) = build_grid({"command": TRAINER, "evaluate": evaluate, "out": str(tmp_path)}).jobs
    job.folder.mkdir()
    job.file(step, "log").write_text("what the other one has written")
    if step == "evaluate":
        job.file("train", "finished").write_text(job.command("train") + "\n")
    (job.folder / "lock").touch()
    before = {path.name: path.read_text() for path in job.folder.iterdir()}
    with open(job.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (failure,) = grids.run_grid(grids.Grid(tmp_path, [job]))
        assert str(failure) == f"run: another process is still running in {job.folder}"
        assert {path.name: path.read_text() for path in job.folder.iterdir()} == before
    assert grids.run_grid(grids.Grid(tmp_path, [job])) == []
    assert job.next_step() is None


def test_what_a_killed_runner_left_running_holds_its_folder(tmp_path):
    (job,) = build_grid({"command": TRAINER + " --max-update 100 --seconds 0.1", "out": str(tmp_path)}).jobs
    one = grids._Running(job, 1)
    assert one.start()
    saved = job.folder / "saved"
    try:
        while not saved.exists():
            assert one.process.poll() is None
            time.sleep(0.02)
        one.close()  # as the end of the runner does
        one.process.kill()  # and of what measures; the trainer itself is left
        one.process.wait()
        (failure,) = grids.run_grid(grids.Grid(tmp_path, [job]))
        assert "another process is still running" in str(failure)
    finally:
        one.signal(signal.SIGKILL)
        one.process.wait()


def test_a_job_that_another_process_has_finished_meanwhile_is_not_run(tmp_path, monkeypatch):
    first, second = build_grid({"command": TRAINER, "seeds": [1, 2], "out": str(tmp_path)}).jobs

    def finish_second(_):
        second.folder.mkdir()
        second.file("train", "finished").write_text(second.command("train") + "\n")

    assert grids.run_grid(grids.Grid(tmp_path, [first, second]), 1, finish_second) == []
    assert sorted(path.name for path in second.folder.iterdir()) == ["lock", "train.finished"]


@pytest.mark.parametrize("wrong", [["--metric", "blue"], ["--subset", "tset"]])
def test_what_no_run_has_is_said_after_the_first_training(tmp_path, capsys, wrong):
    file = write(tmp_path, seeds=[1, 2, 3])
    for _ in range(2):  # the second time there is nothing to train
        assert main(["run", file, *wrong]) == 1
        first, last = capsys.readouterr().err.splitlines()
        allowed = {"--metric": "loss", "--subset": "valid"}[wrong[0]]
        words = f"{wrong[0]} must be one of {allowed}, got {wrong[1]!r}"
        assert first == f"fastweights-compare: warning: seed=1: {words}"
        assert last == f"fairseq_fastweights: error: {words}"
    assert main(["run", file, "--metric", "loss"]) == 0
    assert capsys.readouterr().err == ""


def test_the_warning_comes_before_the_next_run(tmp_path):
    grid, seen = build_grid({"command": TRAINER, "seeds": [1, 2], "out": str(tmp_path)}), []
    grids.run_grid(grid, 1, lambda job: seen.append((job.name, grid.jobs[1].folder.exists())))
    assert seen == [("seed=1", False)]


def test_a_command_that_does_not_exist(tmp_path):
    (job,) = build_grid({"command": "no-such-command x", "out": str(tmp_path)}).jobs
    with pytest.raises(FastWeightError, match="there is no command 'no-such-command'"):
        grids.run_grid(grids.Grid(tmp_path, [job]))


def test_the_example_with_fairseq(tmp_path, capsys):
    described = yaml.safe_load((ROOT / "examples/compare/grid.yaml").read_text())
    assert len(build_grid(described).jobs) == 6
    command = described["command"].replace(
        "--user-dir fairseq_fastweights", f"--user-dir {ROOT / 'fairseq_fastweights'}"
    )
    command = re.sub(
        r"--max-update \d+",
        "--max-update 2 --cpu --train-sequences 200 --valid-sequences 50 --fast-weight-backend chunked",
        command,
    )
    rows = {name: described["rows"][name] for name in ("delta",)}
    assert main(["run", write(tmp_path, command=command, rows=rows)]) == 0
    titles, _, cells = (tmp_path / "runs/table.md").read_text().splitlines()
    row = dict(zip(titles.split(" | "), cells.split(" | "), strict=True))
    assert row["updates"] == "2" and row["update rule"] == "delta" and row["feature map |"] == "dpfp |"
    assert 0 <= float(row["best valid accuracy"]) <= 100
