"""Runs a grid of fairseq commands: each run in a folder of its own, what is finished is not run again.

A folder holds train.log (of every start, one after another), fairseq's checkpoints, and

    train.command    what was run
    train.measured   a line of JSON for every start: exit status, seconds, peak resident memory
    train.finished   the command again, written when it ended with status 0

and the same of evaluate, if there is an evaluation. Who runs a step holds a lock on the file lock.
"""

import fcntl
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
from math import inf
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from ..errors import FastWeightError
from . import measured, needed

KEYS = ("command", "out", "seeds", "vary", "rows", "evaluate")
STEPS = ("train", "evaluate")
ROW_KEYS = ("flags", "vary", "evaluate")
# a flag, and what fairseq-hydra-train calls it
SAVE_DIR = ("--save-dir", "checkpoint.save_dir")
SEED = ("--seed", "common.seed")
MAX_UPDATE = ("--max-update", "optimization.max_update")
# a run that was to be shorter can go on; anything else that changes would mix two runs in one folder
STOPPING = (
    MAX_UPDATE,
    ("--max-epoch", "optimization.max_epoch"),
    ("--stop-time-hours", "optimization.stop_time_hours"),
)
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
    """A step that ended badly, or (None) a job whose folder another process holds."""

    job: Job
    step: Optional[str] = None
    status: int = 0

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.job.name}: another process is still running in {self.job.folder}"
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
    _only(KEYS, described, "key")
    train = _words(described, "command")
    out = described.get("out", "runs")
    if not isinstance(out, str) or not out:
        raise FastWeightError(f"out must be a folder, got {out!r}")
    jobs = [
        _job(Path(out), parts, seed, train, evaluate)
        for row, vary, evaluate in _rows(described)
        for *parts, seed in itertools.product([row], *vary, _seeds(described))
    ]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise FastWeightError(f"two runs would be called {name!r}: give them names in rows")
    return Grid(Path(out), jobs)


def _only(allowed: Sequence[str], described: dict, what: str) -> None:
    for key in described:
        if key not in allowed:
            raise FastWeightError(f"unknown {what} {key!r} (allowed: {', '.join(allowed)})")


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
    command += _apart(command, SAVE_DIR, ("{dir}", "{name}"), "out")
    if seed is not None:
        command += _apart(command, SEED, ("{seed}",), "seeds")
    commands = {"train": _filled(command, places)}
    if evaluate:
        commands["evaluate"] = _filled(evaluate, places)
    return Job(name, out / name, commands)


def _apart(words: Sequence[str], names: Sequence[str], places: Sequence[str], key: str) -> List[str]:
    """The flag that keeps runs apart, if it is not there. FastWeightError if it is and does not keep them apart."""
    given = option(words, names)
    if given is None:
        return [names[0], places[0]]
    if not any(place in given for place in places):
        raise FastWeightError(
            f"command must not have {names[0]} {given}: {key} says what it is ({' or '.join(places)})"
        )
    return []


def option(words: Sequence[str], names: Sequence[str]) -> Optional[str]:
    """The value a command has for an option of any of these names, the last one as for argparse; None without."""
    value = None
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, given, text = word.partition("=")
        if name.lstrip("+") in names:
            value = text if given else after
    return value


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
    return _split(text, key)


def _split(text: str, key: str) -> List[str]:
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise FastWeightError(f"{key}: {str(error).lower()} in {text!r}") from None


# a row, what varies in it, how it is evaluated
Varied = Tuple[Part, List[List[Part]], Optional[List[str]]]


def _rows(described: dict) -> List[Varied]:
    rows = described.get("rows", {"": ""})
    if not isinstance(rows, dict) or not rows:
        raise FastWeightError("rows must be names with their flags, such as 'delta: --update-rule delta'")
    return [_row(str(name), row, described) for name, row in rows.items()]


def _row(name: str, row: Any, described: dict) -> Varied:
    """What a row says itself goes before what the grid says for all."""
    row = row if isinstance(row, dict) else {"flags": row}
    _only(ROW_KEYS, row, f"key in row {name!r}:")
    flags = "" if row.get("flags") is None else row["flags"]
    if not isinstance(flags, str):
        raise FastWeightError(f"row {name!r} must have flags as one text, got {flags!r}")
    own = {"vary": {}, **described, **row}
    evaluate = _words(own, "evaluate") if "evaluate" in own else None
    return (name, _split(flags, f"row {name!r}")), _vary(own["vary"]), evaluate


def _vary(vary: Any) -> List[List[Part]]:
    if not isinstance(vary, dict):
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


def run_grid(
    grid: Grid, parallel: int = 1, first_trained: Callable[[Job], None] = lambda job: None
) -> List[Failure]:
    """Run what is not finished, ``parallel`` runs at a time; returns what failed. Being stopped, it stops all.

    Args:
        first_trained: called once, as soon as there is a run whose training is finished.

    Raises:
        FastWeightError: a command is not found, or a folder holds a run that other flags made.
    """
    for job in grid.jobs:
        check(job)
    waiting = deque(job for job in grid.jobs if job.next_step())
    trained = [job for job in grid.jobs if job.finished("train")]
    failures: List[Failure] = []
    running: List[_Running] = []
    with _progress(grid, len(grid.jobs) - len(waiting)) as progress, _stopping_signals():
        try:
            for job in trained[:1]:
                first_trained(job)
            while waiting or running:
                while waiting and len(running) < parallel:
                    failures += _start(waiting.popleft(), parallel, running, progress)
                time.sleep(0.1)
                for one in [one for one in running if one.ended()]:
                    failures += _settle(one, running, progress)
                    if not trained and one.job.finished("train"):
                        trained.append(one.job)
                        first_trained(one.job)
                progress.show(running)
        finally:
            _stop(running)
    return failures


def check(job: Job) -> None:
    """FastWeightError if a command of ``job`` does not exist, or its folder holds another or a longer run."""
    for words in job.commands.values():
        program(words[0])
    limits = {names: _limit(job.commands["train"], names) for names in STOPPING}
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
    for names, shorter in limits.items():
        longer = _limit(before, names)
        if shorter < longer:
            raise FastWeightError(
                f"{job.folder} holds a longer run ({names[0]}: was {longer:g}, is {shorter:g}): "
                "take another 'out', or remove that folder"
            )


def _limit(words: Sequence[str], names: Sequence[str]) -> float:
    """At what a run is to stop; infinity if nothing says so, as 0 does not."""
    given = option(words, names)
    try:
        return float(given or 0) or inf
    except ValueError:
        raise FastWeightError(f"{names[0]} must be a number, got {given!r}") from None


def _without_stopping(words: Sequence[str]) -> List[str]:
    flags = [flag for flag, _ in STOPPING]
    stopping = [name for names in STOPPING for name in names]
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in stopping:
            kept.append(word)
        skip = word in flags
    return kept


def program(name: str) -> str:
    """The path of a command, which may lie beside this Python rather than on PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    if found is None:
        raise FastWeightError(f"there is no command {name!r} on PATH")
    return found


class _Taken(Exception):
    """Another process holds the folder of a job."""


class _Running:
    """A job at one of its steps. Its folder is locked as long as this is open or a process of the step lives."""

    def __init__(self, job: Job, parallel: int):
        """Take the lock and do nothing else. Raises _Taken."""
        self.job, self.threads = job, max(1, (os.cpu_count() or 1) // parallel)
        job.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(job.folder / "lock", "a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise _Taken from None

    def close(self) -> None:
        self.lock.close()

    def start(self) -> bool:
        """Start the next step; False if there is none."""
        self.step = step = self.job.next_step()
        if step is None:
            return False
        if step == "train":  # of a longer run: what was evaluated is another model
            self.job.file("evaluate", "finished").unlink(missing_ok=True)
        _write(self.job.file(step, "command"), self.job.command(step))
        first, *rest = self.job.commands[step]
        held = self.lock.fileno()
        wrapper = [sys.executable, "-I", "-S", measured.__file__, self.job.file(step, "measured"), str(held)]
        # the log of a resumed training goes on; an evaluation is done from its beginning
        with open(self.job.file(step, "log"), "ab" if step == "train" else "wb") as log:
            self.process = subprocess.Popen(
                [*wrapper, program(first), *rest],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[held],
                start_new_session=True,  # so that all of it can be stopped, at the right time
                env={"OMP_NUM_THREADS": str(self.threads), **os.environ},
            )
        self.started = time.monotonic()
        return True

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


def _start(job: Job, parallel: int, running: List[_Running], progress: "_Progress") -> List[Failure]:
    try:
        one = _Running(job, parallel)
    except _Taken:
        progress.finish(job, "another process is still running in its folder")
        return [Failure(job)]
    if one.start():
        running.append(one)
    else:
        one.close()
        progress.finish(job, "was finished by another process")
    return []


def _settle(one: _Running, running: List[_Running], progress: "_Progress") -> List[Failure]:
    """Mark what ended well, and go on with the next step of the job."""
    job, step, status = one.job, one.step, one.process.returncode
    took = f"{time.monotonic() - one.started:.0f} s"
    if not status:
        _write(job.file(step, "finished"), job.command(step))
        if one.start():
            progress.say(job, f"{step} took {took}")
            return []
    running.remove(one)
    one.close()
    progress.finish(job, f"{step} {'failed after' if status else 'took'} {took}")
    return [Failure(job, step, status)] if status else []


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def _stop(running: Sequence[_Running]) -> None:
    """End all processes, whatever signals come meanwhile."""
    for number in _heeded():
        signal.signal(number, signal.SIG_IGN)
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
        one.close()


def _heeded() -> List[int]:
    """Ctrl-C, which a shell may have made its background jobs ignore, SIGTERM, and SIGHUP but under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """Whatever is to stop this process raises KeyboardInterrupt, so that it stops its children."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _heeded()}
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
                limit = _limit(one.job.commands["train"], MAX_UPDATE) if one.step == "train" else inf
                self.shown[name] = self.bars.add_task(name, total=limit if limit < inf else None)
            self.bars.update(self.shown[name], completed=one.updates() or 0)

    def _print(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
