"""Runs a grid of fairseq commands: each run in a folder of its own, what is finished is not run again.

A folder holds train.log (of every start, one after another), fairseq's checkpoints, and

    train.command    what was run
    train.measured   a line of JSON for every start: exit status, seconds, peak resident memory
    train.finished   the command again, written when it ended with status 0

and the same of evaluate, if there is an evaluation.
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Tuple

from ..errors import FastWeightError
from . import measured, needed

KEYS = ("command", "out", "seeds", "vary", "rows", "evaluate")
STEPS = ("train", "evaluate")
# a run that was to be shorter can go on; anything else that changes would mix two runs in one folder
STOPPING = ("--max-update", "--max-epoch", "--stop-time-hours")
SECONDS_TO_STOP = 10
LINES_OF_FAILURE, WIDTH_OF_FAILURE = 15, 300  # a logged configuration is one line of 13,000 characters
UPDATES = re.compile(rb"num_updates\W+(\d+)")


@dataclass(frozen=True)
class Job:
    """One run: its folder and the commands of its steps."""

    name: str
    folder: Path
    commands: Dict[str, List[str]]

    def command(self, step: str) -> str:
        return shlex.join(self.commands[step])

    def file(self, step: str, ending: str) -> Path:
        return self.folder / f"{step}.{ending}"

    def finished(self, step: str) -> bool:
        """Whether this very command has ended well, and no step before it is to be run."""
        before = [self.finished(other) for other in self.commands if STEPS.index(other) < STEPS.index(step)]
        mark = self.file(step, "finished")
        return all(before) and mark.is_file() and mark.read_text() == self.command(step) + "\n"

    def next_step(self) -> Optional[str]:
        return next((step for step in self.commands if not self.finished(step)), None)


@dataclass
class Grid:
    out: Path
    jobs: List[Job]


@dataclass
class Failure:
    job: Job
    step: str
    status: int

    def __str__(self) -> str:
        log = self.job.file(self.step, "log")
        lines = log.read_text(errors="replace").splitlines()[-LINES_OF_FAILURE:]
        what = f"{self.job.name}: {self.step} ended with status {self.status} ({log})"
        return "\n".join([what, *("    " + line[:WIDTH_OF_FAILURE] for line in lines)])


# --- the file -------------------------------------------------------------------------------------


def read_grid(path: Path) -> Grid:
    """The runs a file asks for.

    Raises:
        FastWeightError: the file is missing, is not YAML, or has a key or value that is not understood.
    """
    yaml = needed("yaml", "PyYAML")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FastWeightError(f"{path}: {error.strerror}") from None
    try:
        described = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FastWeightError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return build_grid(described)
    except FastWeightError as error:
        raise FastWeightError(f"{path}: {error}") from None


def build_grid(described: Any) -> Grid:
    """The runs of a grid that was read: rows x the product of what varies x seeds."""
    if not isinstance(described, dict):
        raise FastWeightError(f"a grid is a mapping with the keys {', '.join(KEYS)}")
    for key in described:
        if key not in KEYS:
            raise FastWeightError(f"unknown key {key!r} (allowed: {', '.join(KEYS)})")
    train = _words(described, "command")
    evaluate = _words(described, "evaluate") if "evaluate" in described else None
    out = described.get("out", "runs")
    if not isinstance(out, str) or not out:
        raise FastWeightError(f"out must be a folder, got {out!r}")
    jobs = [
        _job(Path(out), parts, seed, train, evaluate)
        for *parts, seed in itertools.product(_rows(described), *_vary(described), _seeds(described))
    ]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise FastWeightError(f"two runs would be called {name!r}: give them names in rows")
    return Grid(Path(out), jobs)


Part = Tuple[str, List[str]]  # of a run's name, and of its command


def _job(
    out: Path, parts: Sequence[Part], seed: Optional[int], train: List[str], evaluate: Optional[List[str]]
) -> Job:
    name = ",".join([label for label, _ in parts if label] + ([f"seed={seed}"] if seed is not None else []))
    name = re.sub(r"[^\w.,=+-]+", "_", name or "run")
    if len(name) > 200:
        raise FastWeightError(
            f"the name {name[:40]!r}... is too long for a folder: give the runs names in rows"
        )
    places = {"{dir}": str(out / name), "{name}": name, "{seed}": "" if seed is None else str(seed)}
    command = [*train, *(word for _, words in parts for word in words)]
    if not any("{dir}" in word for word in command):
        command += ["--save-dir", "{dir}"]
    if seed is not None and not any("{seed}" in word for word in command):
        command += ["--seed", "{seed}"]
    commands = {"train": _filled(command, places)}
    if evaluate:
        commands["evaluate"] = _filled(evaluate, places)
    return Job(name, out / name, commands)


def _filled(words: Sequence[str], places: Dict[str, str]) -> List[str]:
    filled = []
    for word in words:
        for place, value in places.items():
            word = word.replace(place, value)
        filled.append(word)
    return filled


def _words(described: dict, key: str) -> List[str]:
    text = described.get(key)
    if not isinstance(text, str) or not text.strip():
        raise FastWeightError(
            f"{key} is missing or empty: it is a command line such as 'fairseq-train DATA ...'"
        )
    words = _split(text, key)
    for flag, instead in (("--save-dir", "out"), ("--seed", "seeds")):
        given = any(word == flag or word.startswith(flag + "=") for word in words)
        if key == "command" and given and "{" not in text and instead in described | {"out": None}:
            raise FastWeightError(f"command must not have {flag}: {instead} says what it is")
    return words


def _split(text: str, key: str) -> List[str]:
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise FastWeightError(f"{key}: {str(error).lower()} in {text!r}") from None


def _rows(described: dict) -> List[Part]:
    rows = described.get("rows", {"": ""})
    if not isinstance(rows, dict) or not rows:
        raise FastWeightError("rows must be names with their flags, such as 'delta: --update-rule delta'")
    for name, flags in rows.items():
        if not isinstance(flags, (str, type(None))):
            raise FastWeightError(f"row {name!r} must have flags as one text, got {flags!r}")
    return [(str(name), _split(flags or "", f"row {name!r}")) for name, flags in rows.items()]


def _vary(described: dict) -> List[List[Part]]:
    vary = described.get("vary", {})
    if not isinstance(vary, dict) or ("vary" in described and not vary):
        raise FastWeightError("vary must be flags with lists of values, such as 'lr: [1e-3, 2e-3]'")
    return [[_flag(str(flag).lstrip("-"), value) for value in _list(vary[flag], flag)] for flag in vary]


def _list(values: Any, key: str) -> List[Any]:
    if not isinstance(values, list) or not values:
        raise FastWeightError(f"{key} must be a list with at least one value, got {values!r}")
    for value in values:
        if not isinstance(value, (str, int, float, bool)):
            raise FastWeightError(f"{key} must have plain values, got {value!r}")
    return values


def _flag(flag: str, value: Any) -> Part:
    if isinstance(value, bool):
        return f"{flag}={str(value).lower()}", [f"--{flag}"] if value else []
    return f"{flag}={value}", [f"--{flag}", str(value)]


def _seeds(described: dict) -> List[Optional[int]]:
    if "seeds" not in described:
        return [None]
    seeds = _list(described["seeds"], "seeds")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise FastWeightError(f"seeds must be whole numbers, got {seed!r}")
    return seeds


# --- running --------------------------------------------------------------------------------------


def run_grid(grid: Grid, parallel: int = 1) -> List[Failure]:
    """Run what is not finished, ``parallel`` runs at a time; returns what failed. Being stopped, it stops all.

    Raises:
        FastWeightError: a command is not found, or a folder holds a run that other flags made.
    """
    for job in grid.jobs:
        check(job)
    waiting = deque(job for job in grid.jobs if job.next_step())
    failures: List[Failure] = []
    running: List[_Running] = []
    with _progress(grid, len(grid.jobs) - len(waiting)) as progress, _stopping_signals():
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    running.append(_Running(waiting.popleft(), parallel))
                time.sleep(0.1)
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    failures += _settle(one, waiting, progress)
                progress.show(running)
        finally:
            _stop(running)
    return failures


def check(job: Job) -> None:
    """FastWeightError if a command of ``job`` does not exist, or its folder holds a run of another command."""
    for words in job.commands.values():
        program(words[0])
    was = job.file("train", "command")
    if not was.is_file():
        return
    before, now = shlex.split(was.read_text()), job.commands["train"]
    if _without_stopping(before) != _without_stopping(now):
        changed = [f"had {word!r}" for word in before if word not in now]
        changed += [f"now has {word!r}" for word in now if word not in before]
        raise FastWeightError(
            f"{job.folder} holds a run of another command ({', '.join(changed) or 'in another order'}): "
            "take another 'out', or remove that folder"
        )


def _without_stopping(words: Sequence[str]) -> List[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in STOPPING:
            kept.append(word)
        skip = word in STOPPING
    return kept


def program(name: str) -> str:
    """The path of a command, which may lie beside this Python rather than on PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    if found is None:
        raise FastWeightError(f"there is no command {name!r} on PATH")
    return found


class _Running:
    """A step of a job whose process was started."""

    def __init__(self, job: Job, parallel: int):
        self.job, self.step = job, job.next_step()
        job.folder.mkdir(parents=True, exist_ok=True)
        _write(job.file(self.step, "command"), job.command(self.step))
        first, *rest = job.commands[self.step]
        record, lock = str(job.file(self.step, "measured")), str(job.folder / "lock")
        wrapper = [sys.executable, "-I", "-S", measured.__file__, record, lock]
        threads = max(1, (os.cpu_count() or 1) // parallel)
        # the log of a resumed training goes on; an evaluation is done from its beginning
        with open(job.file(self.step, "log"), "ab" if self.step == "train" else "wb") as log:
            self.process = subprocess.Popen(
                [*wrapper, program(first), *rest],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all of it can be stopped, at the right time
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )
        self.started = time.monotonic()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def updates(self) -> Optional[int]:
        """As many as its log mentioned last."""
        with open(self.job.file(self.step, "log"), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 5000))
            found = UPDATES.findall(log.read())
        return int(found[-1]) if found else None

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


def _settle(one: _Running, waiting: Deque[Job], progress: "_Progress") -> List[Failure]:
    """Mark what ended well, and put a job that has another step at the head of the queue."""
    job, status = one.job, one.process.returncode
    took = f"{time.monotonic() - one.started:.0f} s"
    if status:
        progress.finish(job, f"{one.step} failed after {took}")
        return [Failure(job, one.step, status)]
    _write(job.file(one.step, "finished"), job.command(one.step))
    if job.next_step():
        waiting.appendleft(job)
        progress.say(job, f"{one.step} took {took}")
    else:
        progress.finish(job, f"{one.step} took {took}")
    return []


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        one.signal(signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        one.signal(signal.SIGKILL)  # the group may outlive its first process
        one.process.wait()


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the children as Ctrl-C does, which a shell may have made its background jobs ignore."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(grid: Grid, finished: int) -> Iterator["_Progress"]:
    rich_progress = needed("rich.progress", "rich")
    columns = [
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    ]
    with rich_progress.Progress(*columns) as bars:
        yield _Progress(bars, grid, finished)


@dataclass
class _Progress:
    """A bar for all runs, and one for each that is going."""

    bars: Any
    grid: Grid
    finished: int
    shown: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.all = self.bars.add_task("runs", total=len(self.grid.jobs), completed=self.finished)
        if self.finished:
            self._print(f"{self.finished} of {len(self.grid.jobs)} runs were finished before")

    def say(self, job: Job, what: str) -> None:
        self._print(f"{job.name}: {what}")

    def finish(self, job: Job, what: str) -> None:
        self.say(job, what)
        self.bars.advance(self.all)

    def show(self, running: Sequence[_Running]) -> None:
        going = {f"{one.job.name} {one.step}": one for one in running}
        for name in [name for name in self.shown if name not in going]:
            self.bars.remove_task(self.shown.pop(name))
        for name, one in going.items():
            if name not in self.shown:
                self.shown[name] = self.bars.add_task(
                    name, total=_max_update(one.job) if one.step == "train" else None
                )
            self.bars.update(self.shown[name], completed=one.updates() or 0)

    def _print(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _max_update(job: Job) -> Optional[int]:
    found = re.findall(r"--max-update[ =](\d+)", job.command("train"))
    return int(found[-1]) if found else None
