"""What fairseq-train logged: ``--log-format json`` or ``simple``, with or without prefixes, over several starts."""

import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import nan
from pathlib import Path
from statistics import median
from typing import Dict, Iterable, List, Optional

from .configuration import Options, read_configuration, starts_configuration

# "2026-11-24 20:01:28 | INFO | valid | ", and hydra's "[2026-11-24 20:01:28,512][valid][INFO] - "
PREFIX = re.compile(
    r"\[?(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,\d]*"
    r"(?: \| \w+ \| [\w.]+ \| |\]\[[\w.]+\]\[\w+\] - )(?P<message>.*)"
)
WITHIN_EPOCH = re.compile(r"epoch \d+: +\d+ / \d+ (.*)")
EPOCH = re.compile(r"epoch \d+ \| (.*)")
SUBSET = re.compile(r"valid on '(.*)' subset")
PARAMETERS = re.compile(r"num\. (?:shared )?model params: ([\d,]+)")
LOADED = re.compile(r"Loaded checkpoint .* \(epoch \d+ @ (\d+) updates\)")
TOTAL_MEMORY = re.compile(r"total memory = ([\d.]+) GB")

FAST_WEIGHT_STATS = re.compile(r"fw_(?:[a-z]+_)?\d+_")  # of --fast-weight-stats

INNER, TRAIN = "train_inner", "train"  # the loggers of the last few updates and of an epoch
NO_METRICS = set(
    "wps ups wpb bsz num_updates lr gnorm clip train_wall wall gb_free gb_total loss_scale epoch update "
    "sample_size ntokens nsentences total n_correct".split()
)


@dataclass
class Stats:
    """One line of numbers. ``seconds`` count from the beginning of the run; nan if the log does not say."""

    kind: str  # train_inner, train or the name of a validation subset
    updates: int
    values: Dict[str, float]
    time: Optional[datetime] = None
    seconds: float = nan

    @property
    def metrics(self) -> Dict[str, float]:
        """What measures quality."""
        return {
            name: value
            for name, value in self.values.items()
            if name not in NO_METRICS and not name.startswith("best_") and not FAST_WEIGHT_STATS.match(name)
        }


@dataclass
class Start:
    """From one configuration line to the next: one process of fairseq-train."""

    options: Options = field(default_factory=dict)
    parameters: Optional[int] = None
    began: Optional[datetime] = None
    resumed_at: Optional[int] = None
    total_memory: Optional[float] = None
    stats: List[Stats] = field(default_factory=list)


@dataclass
class Log:
    """A run, from its first update to its last. Empty if nothing was trained."""

    options: Options
    parameters: Optional[int]
    stats: List[Stats]
    gpu_memory: Optional[float]  # GiB

    @property
    def updates(self) -> Optional[int]:
        return max((stats.updates for stats in self.stats), default=None)

    @property
    def seconds(self) -> Optional[float]:
        return max((stats.seconds for stats in self.stats if stats.seconds == stats.seconds), default=None)

    @property
    def tokens_per_second(self) -> Optional[float]:
        """The median over log intervals (else epochs): validation, saving and starting fall into few of them."""
        for kind in (INNER, TRAIN):
            speeds = [
                stats.values["wps"] for stats in self.stats if stats.kind == kind and "wps" in stats.values
            ]
            speeds = [speed for speed in speeds if speed > 0]
            if speeds:
                return median(speeds)
        return None

    @property
    def subsets(self) -> List[str]:
        """What was validated, in this order."""
        return list(dict.fromkeys(stats.kind for stats in self.stats if stats.kind not in (INNER, TRAIN)))

    def validations(self, subset: Optional[str] = None) -> List[Stats]:
        """Validations of a subset, by updates; by default of the one that was validated first."""
        subset = subset or next(iter(self.subsets), None)
        # --log-file makes fairseq write some lines twice
        by_updates = {stats.updates: stats for stats in self.stats if stats.kind == subset}
        return [by_updates[updates] for updates in sorted(by_updates)]


def read_log(path: Path) -> Log:
    """Read a log. Lines that are not fairseq's are passed over; a log without any gives an empty Log."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        return merge(read_starts(lines))


def read_starts(lines: Iterable[str]) -> List[Start]:
    """The starts in a log. What comes before the first configuration is one of its own."""
    starts = [Start()]
    for line in lines:
        prefix = PREFIX.search(line)
        message = (prefix["message"] if prefix else line).strip()
        time = datetime.fromisoformat(prefix["time"]) if prefix else None
        if starts_configuration(message):
            starts.append(Start(options=read_configuration(message) or {}, began=time))
        else:
            _read_message(starts[-1], message, time)
    return starts


def _read_message(start: Start, message: str, time: Optional[datetime]) -> None:
    start.began = start.began or time
    if stats := read_stats(message):
        stats.time = time
        start.stats.append(stats)
    elif found := PARAMETERS.match(message):
        start.parameters = int(found[1].replace(",", ""))
    elif found := LOADED.match(message):
        start.resumed_at = int(found[1])
    elif message.startswith("No existing checkpoint found"):
        start.resumed_at = 0
    elif message.startswith("training on "):
        start.began = time  # as fairseq's own wall clock: without building the model
    elif found := TOTAL_MEMORY.search(message):
        start.total_memory = float(found[1])


def read_stats(message: str) -> Optional[Stats]:
    """The numbers of a line in either format; None if it has none."""
    if message.startswith('{"'):
        return _read_json(message)
    if found := WITHIN_EPOCH.match(message):
        return _stats(INNER, (item.split("=", 1) for item in found[1].split(", ") if "=" in item))
    if found := EPOCH.match(message):
        items = found[1].split(" | ")
        subset = SUBSET.match(items[0])
        pairs = (item.split(" ", 1) for item in items[bool(subset) :] if " " in item)
        return _stats(subset[1] if subset else TRAIN, pairs)
    return None


def _read_json(message: str) -> Optional[Stats]:
    try:
        found = json.loads(message)
    except ValueError:  # cut off
        return None
    # every key is prefixed by train_ or the name of the subset, but for those within an epoch
    counter = next((name for name in found if name.endswith("num_updates")), "")
    prefix = counter.removesuffix("num_updates")
    pairs = [(name.removeprefix(prefix), value) for name, value in found.items() if name.startswith(prefix)]
    return _stats(prefix.rstrip("_") or INNER, pairs)


def _stats(kind: str, pairs: Iterable) -> Optional[Stats]:
    values = {}
    for name, value in pairs:
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            continue
    if "num_updates" not in values:
        return None
    return Stats(kind, int(values["num_updates"]), values)


def merge(starts: List[Start]) -> Log:
    """One run from its starts: what a start does again, because it was not saved, is counted once.

    A start without numbers of updates failed at once, or was another program, which logs a configuration too.
    """
    starts = [start for start in starts if start.stats]
    stats: List[Stats] = []
    for start in starts:
        kept = [old for old in stats if old.updates <= _resumed_at(start)]
        before = kept[-1].seconds if kept else 0.0
        stats = kept + [replace(new, seconds=before + new.seconds) for new in _timed(start)]
    options = [start.options for start in starts if start.options]
    parameters = [start.parameters for start in starts if start.parameters is not None]
    return Log(
        options[-1] if options else {}, parameters[-1] if parameters else None, stats, _gpu_memory(starts)
    )


def _resumed_at(start: Start) -> int:
    if start.resumed_at is not None:
        return start.resumed_at
    return min(stats.updates for stats in start.stats) - 1


def _timed(start: Start) -> List[Stats]:
    """The stats with the seconds since this start.

    By fairseq's wall clock, which validation lines lack: they get the last one seen. After a resume fairseq 0.12
    logs 0 throughout, so then by the prefixes of the lines.
    """
    has_clock = any(stats.values.get("wall", 0) > 0 for stats in start.stats)
    timed, wall = [], 0.0
    for stats in start.stats:
        if has_clock:
            wall = max(wall, stats.values.get("wall", 0.0))
        else:
            wall = (stats.time - start.began).total_seconds() if stats.time and start.began else nan
        timed.append(replace(stats, seconds=wall))
    return timed


def _gpu_memory(starts: List[Start]) -> Optional[float]:
    """The most that was allocated: fairseq logs the least memory that was free (on GPUs only)."""
    used = [
        start.total_memory - stats.values["gb_free"]
        for start in starts
        for stats in start.stats
        if start.total_memory is not None and "gb_free" in stats.values
    ]
    return max(used, default=None)
