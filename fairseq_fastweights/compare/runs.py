"""Finds runs of fairseq-train in save-dirs, logs and folders, and reads what they left."""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import torch

from ..errors import FastWeightError
from . import PROGRAM
from .configuration import Options, flatten
from .logs import Log, Stats, read_log

TRAIN_LOGS = ("train.log", "hydra_train.log")
EVALUATION_LOG = "evaluate.log"
MEASURED = "train.measured"  # a line of JSON for every process that the grid runner started
NOTHING = "neither checkpoints nor a log with numbers of a training"
SCORES = {
    "bleu": re.compile(r"\bBLEU\S* = (\d+(?:\.\d+)?)"),
    "ppl": re.compile(r"\bPerplexity: (\d+(?:\.\d+)?)"),
}


@dataclass
class Run:
    """One run. What it lacks is None or empty."""

    name: str
    path: Path
    options: Options = field(default_factory=dict)
    parameters: Optional[int] = None
    updates: Optional[int] = None
    tokens_per_second: Optional[float] = None
    seconds: Optional[float] = None
    gpu_memory: Optional[float] = None  # GiB
    memory: Optional[float] = None  # GiB, resident
    validations: List[Stats] = field(default_factory=list)
    subsets: List[str] = field(default_factory=list)  # that it validated, of which validations are of one
    evaluation: Dict[str, float] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.options and self.updates is None

    def best(self, metric: str) -> Optional[Stats]:
        """The validation at which ``metric`` was best, or None."""
        measured = [
            v for v in self.validations if v.metrics.get(metric, float("nan")) == v.metrics.get(metric)
        ]
        choose = max if self.higher_is_better(metric) else min
        return choose(measured, key=lambda v: v.metrics[metric], default=None)

    def higher_is_better(self, metric: str) -> bool:
        """As --maximize-best-checkpoint-metric says of the run's own metric, else by the metric's name."""
        if self.options.get("best_checkpoint_metric") == metric != "loss":
            return bool(self.options.get("maximize_best_checkpoint_metric"))
        return bool(re.search("bleu|chrf|acc|f1|mcc|corr|precision|recall|rouge", metric))


def find_runs(paths: Iterable[Path], subset: Optional[str] = None, every: bool = True) -> List[Run]:
    """The runs in ``paths``: save-dirs, logs, and folders that are searched for both.

    Args:
        subset: the validation subset to read, by default the one a run validates first.
        every: whether each path must hold a run; else one of them.

    Raises:
        FastWeightError: a path does not exist or holds no run, or no run validated ``subset``. A run that cannot
            be read beside others that can is named on stderr.
    """
    runs: Dict[Path, Run] = {}
    for path in paths:
        found, problems = 0, []
        for place, name in _places(path):
            try:
                run = read_run(place, name, subset)
            except FastWeightError as error:
                problems.append(str(error))
                continue
            if not run.is_empty:
                runs.setdefault(place.resolve(), run)
                found += 1
        if every and not found:
            raise FastWeightError("; ".join(problems) or f"no run of fairseq-train in {path}: {NOTHING}")
        for problem in problems:
            print(f"{PROGRAM}: passed over: {problem}", file=sys.stderr)
    if not runs:
        raise FastWeightError(f"no run of fairseq-train to compare: {NOTHING}")
    known = dict.fromkeys(name for run in runs.values() for name in run.subsets)
    if subset is not None and subset not in known:
        raise FastWeightError(
            f"--subset must be one of {', '.join(known) or 'none: no run validated'}, got {subset!r}"
        )
    _make_names_unique(list(runs.values()))
    return list(runs.values())


def _places(path: Path) -> Iterator[Tuple[Path, str]]:
    """Where there may be a run, and what to call it."""
    if path.is_file() and path.suffix == ".pt":
        raise FastWeightError(f"{path} is one checkpoint: give the folder it is in")
    if path.is_file():
        yield path, path.parent.name if path.name in TRAIN_LOGS else path.stem
    elif not path.is_dir():
        raise FastWeightError(f"{path} does not exist")
    elif _is_save_dir(path):
        yield path, path.resolve().name
    else:
        yield from _search(path)


def _search(root: Path) -> Iterator[Tuple[Path, str]]:
    for folder, inside, files in os.walk(root):
        here = Path(folder)
        save_dirs = [name for name in inside if _is_save_dir(here / name)]
        places = save_dirs + [
            name for name in files if name.endswith(".log") and name.removesuffix(".log") not in save_dirs
        ]
        for name in sorted(places, key=_natural):
            place = here / name
            yield place, str(place.relative_to(root)).removesuffix(".log")
        inside[:] = sorted((name for name in inside if name not in save_dirs), key=_natural)


def _natural(name: str) -> List:
    """nu=2 before nu=10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _is_save_dir(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TRAIN_LOGS) or any(folder.glob("checkpoint*.pt"))


def _make_names_unique(runs: List[Run]) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)


def read_run(path: Path, name: str, subset: Optional[str] = None) -> Run:
    """The run in a save-dir or a log. FastWeightError if its checkpoint is needed and cannot be read."""
    is_folder = path.is_dir()
    log = _log_of(path) if is_folder else read_log(path)
    run = Run(
        name,
        path,
        log.options,
        log.parameters,
        log.updates,
        log.tokens_per_second,
        log.seconds,
        log.gpu_memory,
        validations=log.validations(subset),
        subsets=log.subsets,
    )
    if is_folder:
        _add_checkpoint(run, subset)
        run.memory = _measured_memory(path)
        run.evaluation = _scores(path / EVALUATION_LOG)
    return run


def _log_of(folder: Path) -> Log:
    """The log inside, else the one beside it that has its name, else the newest other one inside; of a training."""
    named = [folder / name for name in TRAIN_LOGS] + [folder.with_name(folder.name + ".log")]
    others = [path for path in folder.glob("*.log") if path.name != EVALUATION_LOG]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    logs = (read_log(path) for path in named + others if path.is_file())
    return next((log for log in logs if log.stats), Log({}, None, [], None))


def _add_checkpoint(run: Run, subset: Optional[str]) -> None:
    """What the log does not say, from the last and the best checkpoint."""
    if run.options and run.updates is not None:
        return
    last = _first_file(run.path, "checkpoint_last.pt", "checkpoint_best.pt")
    if last is None:
        return
    state = load_checkpoint(last)
    run.options = run.options or flatten(state.get("cfg") or state.get("args"))
    run.updates = run.updates if run.updates is not None else _updates(state)
    run.seconds = run.seconds or state.get("extra_state", {}).get("previous_training_time")
    run.parameters = run.parameters or _trained_parameters(state)
    best_path = run.path / "checkpoint_best.pt"
    best_state = load_checkpoint(best_path) if best_path.is_file() and best_path != last else state
    best, metric = best_state.get("extra_state", {}).get("best"), run.options.get("best_checkpoint_metric")
    if not run.subsets and best is not None and metric:
        updates = _updates(best_state) if best_path.is_file() else run.updates
        first = (run.options.get("valid_subset") or "valid").split(",")[
            0
        ]  # by which fairseq chooses the best
        run.subsets = [first]
        if subset in (None, first):
            run.validations = [Stats(first, updates or 0, {metric: float(best)})]


def _first_file(folder: Path, *names: str) -> Optional[Path]:
    others = sorted(folder.glob("checkpoint*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in [folder / name for name in names] + others if path.is_file()), None)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, as data. FastWeightError if it is missing, holds code, or is no checkpoint of fairseq."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file can raise anything
        reason = (
            str(error).split("WeightsUnpickler error:")[-1].strip().splitlines() or [type(error).__name__]
        )[0]
        raise FastWeightError(f"checkpoint {path} cannot be read: {reason[:200]}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise FastWeightError(f"{path} is no checkpoint of fairseq: there is no 'model' in it")
    return state


def _updates(state: dict) -> Optional[int]:
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates")


def _trained_parameters(state: dict) -> Optional[int]:
    """As many as the optimizer has first moments of: 'model' also holds buffers, and shared weights twice."""
    optimizer = (state.get("last_optimizer_state") or {}).get("state") or {}
    moments = [entry.get("exp_avg") for entry in optimizer.values()]
    if not moments or not all(isinstance(moment, torch.Tensor) for moment in moments):
        return None
    return sum(moment.numel() for moment in moments)


def _measured_memory(folder: Path) -> Optional[float]:
    path = folder / MEASURED
    if not path.is_file():
        return None
    peaks = [json.loads(line)["peak_resident_bytes"] for line in path.read_text().splitlines() if line]
    return max(peaks, default=0) / 2**30 or None


def _scores(path: Path) -> Dict[str, float]:
    """What the output of an evaluation says at last, by metric."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    found = {name: pattern.findall(text) for name, pattern in SCORES.items()}
    return {name: float(scores[-1]) for name, scores in found.items() if scores}
