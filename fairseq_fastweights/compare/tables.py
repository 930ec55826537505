"""One row for the runs that differ in their seed only, and the columns in which rows can be told apart."""

import re
import textwrap
from dataclasses import dataclass
from math import floor, isfinite, log10
from statistics import mean, stdev
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ..errors import FastWeightError
from . import needed
from .runs import Run

# options that say where something is written, not what the run does
PLACES = {
    "save_dir",
    "log_file",
    "tensorboard_logdir",
    "eval_csv",
    "results_path",
    "distributed_port",
    "distributed_init_method",
    "no_seed_provided",
}
ALWAYS_SHOWN = ("update_rule", "feature_map")
RULES = ("update_rule", "update_rule_encoder", "update_rule_cross")
SEED_IN_NAME = re.compile(r"[-_.,/ ]?seed[-_=. ]?\d+", re.IGNORECASE)
NEVER_FULL, BETWEEN_COLUMNS = 10_000, 3  # characters
SECONDS_IN = {"s": 1, "min": 60, "h": 3600}


@dataclass
class Row:
    """Runs that differ in the seed only."""

    label: str
    runs: List[Run]

    def values(self, quantity: "Quantity") -> List[float]:
        found = [quantity.of(run) for run in self.runs]
        return [value for value in found if value is not None]

    def option(self, name: str) -> Any:
        return self.runs[0].options.get(name)


@dataclass
class Quantity:
    """A number every run may have. ``key`` is a metric's name, or a field of Run."""

    kind: str  # valid, evaluation or run
    key: str
    title: str
    scale: float = 1.0

    def of(self, run: Run) -> Optional[float]:
        if self.kind == "valid":
            best = run.best(self.key)
            value = best.metrics[self.key] if best else None
        elif self.kind == "evaluation":
            value = run.evaluation.get(self.key)
        else:
            value = getattr(run, self.key)
        return None if value is None else value / self.scale


def group(runs: Sequence[Run]) -> List[Row]:
    """Rows in the order of the runs. Runs of one seed, and runs without a configuration, keep rows of their own."""
    groups: Dict[Any, List[Run]] = {}
    times_seen: Dict[Any, int] = {}
    for run in runs:
        kind = tuple(sorted((name, meaning(run, name)) for name in run.options if is_setting(name)))
        if not kind or "seed" not in run.options:
            groups[run.name] = [run]
            continue
        same = (kind, run.options["seed"])
        times_seen[same] = times_seen.get(same, 0) + 1
        groups.setdefault((kind, times_seen[same]), []).append(run)
    return [Row(_label(members), members) for members in groups.values()]


def is_setting(option: str) -> bool:
    """Whether an option says what a run does; the seed aside."""
    return option.rpartition(".")[2] not in PLACES | {"seed"}


def _label(runs: List[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    names = dict.fromkeys(SEED_IN_NAME.sub("", run.name).strip("-_.,/ ") or run.name for run in runs)
    return ", ".join(names)


def differing_options(rows: Sequence[Row]) -> List[str]:
    """The options of which two rows have different values. A row without the option does not differ in it."""
    names = dict.fromkeys(name for row in rows for name in row.runs[0].options if is_setting(name))
    return [
        name
        for name in names
        if len({meaning(row.runs[0], name) for row in rows if name in row.runs[0].options}) > 1
    ]


def meaning(run: Run, name: str) -> str:
    """An option's value to compare with another run's: what lies in the run's own folder is at the same place."""
    value, own = run.options[name], f"{run.options.get('save_dir') or ''}/"
    if isinstance(value, str) and len(own) > 1 and value.startswith(own):
        value = "{dir}/" + value.removeprefix(own)
    return comparable(value)


def comparable(value: Any) -> str:
    """Equal for values that mean the same: fairseq writes 0 for 0.0 now and then."""
    if isinstance(value, list):
        return f"[{', '.join(map(comparable, value))}]"
    return repr(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def metrics(runs: Sequence[Run]) -> List[str]:
    """Whatever the runs validated, in the order they logged it."""
    return list(dict.fromkeys(name for run in runs for v in run.validations for name in v.metrics))


def subset(runs: Sequence[Run]) -> str:
    """Of what the validations are. Runs that validate other data than others first are not to be compared unseen."""
    return " or ".join(dict.fromkeys(v.kind for run in runs for v in run.validations))


def check_metric(runs: Sequence[Run], wanted: Optional[str]) -> None:
    """FastWeightError if a metric is asked for that no run has measured."""
    known = metrics(runs)
    if wanted is not None and wanted not in known:
        raise FastWeightError(
            f"--metric must be one of {', '.join(known) or 'none: no run validated'}, got {wanted!r}"
        )


def main_metric(runs: Sequence[Run], wanted: Optional[str] = None) -> str:
    """The metric to plot: the one asked for, else the one all runs keep their best checkpoint by, else the first.

    Raises:
        FastWeightError: no run has validated, or none has measured ``wanted``.
    """
    known = metrics(runs)
    check_metric(runs, wanted)
    if not known:
        raise FastWeightError("no run has validated yet: there is nothing to draw")
    chosen = {run.options.get("best_checkpoint_metric") for run in runs}
    agreed = chosen.pop() if len(chosen) == 1 else None
    return wanted or (agreed if agreed in known else known[0])


def time_unit(seconds: Sequence[float]) -> str:
    """The unit in which the longest time is easiest to read."""
    longest = max(seconds, default=0)
    return "h" if longest >= 2 * 3600 else "min" if longest >= 5 * 60 else "s"


def quantities(runs: Sequence[Run]) -> List[Quantity]:
    """The columns of numbers, those without a single number left out."""
    unit = time_unit([run.seconds for run in runs if run.seconds is not None])
    scores = dict.fromkeys(name for run in runs for name in run.evaluation)
    wanted = [Quantity("valid", name, f"best {subset(runs)} {name}") for name in metrics(runs)]
    wanted += [Quantity("evaluation", name, f"evaluated {name}") for name in scores]
    wanted += [
        Quantity("run", "parameters", "parameters"),
        Quantity("run", "updates", "updates"),
        Quantity("run", "tokens_per_second", "tokens/s"),
        Quantity("run", "seconds", f"wall time ({unit})", SECONDS_IN[unit]),
        Quantity("run", "gpu_memory", "peak GPU memory (GiB)"),
        Quantity("run", "memory", "peak memory (GiB)"),
    ]
    return [quantity for quantity in wanted if any(quantity.of(run) is not None for run in runs)]


def table(rows: Sequence[Row]) -> Tuple[List[str], List[List[str]]]:
    """Titles and cells."""
    runs = [run for row in rows for run in row.runs]
    seeds = len(runs) > len(rows)
    numbers = quantities(runs)
    always = [name for name in ALWAYS_SHOWN if any(name in run.options for run in runs)]
    options = always + [name for name in differing_options(rows) if name not in always]
    titles = ["run", *(["n"] if seeds else []), *(q.title for q in numbers)]
    titles += [name.replace("_", " ") for name in options]
    cells = [
        [
            row.label,
            *([str(len(row.runs))] if seeds else []),
            *(spread(row.values(q), len(row.runs)) for q in numbers),
            *(setting(row, name) for name in options),
        ]
        for row in rows
    ]
    return titles, cells


def setting(row: Row, name: str) -> str:
    """An option's value; a feature map is none where every rule is fairseq's softmax attention."""
    value = row.option(name)
    rules = {row.option(rule) for rule in RULES}
    if value is None or (name == "feature_map" and rules <= {"softmax", None}):
        return "" if name not in row.runs[0].options or name == "feature_map" else "None"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return str(value)


def spread(values: Sequence[float], n: int) -> str:
    """Mean and sample standard deviation, ``2.310 ± 0.021``; how many of ``n`` runs have a value, if not all."""
    if not values:
        return ""
    deviation = stdev(values) if len(values) > 1 and all(map(isfinite, values)) else 0.0
    if deviation > 0:
        decimals = max(0, 1 - floor(log10(deviation)))
        text = f"{mean(values):,.{decimals}f} ± {deviation:,.{decimals}f}"
    else:
        text = number(values[0] if len(values) == 1 else mean(values))
    return text if len(values) == n else f"{text} ({len(values)} of {n})"


def number(value: float) -> str:
    """Four digits, and all of a whole number."""
    if isfinite(value) and (value == int(value) or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers on the right."""
    sides = ["---:" if all(_is_number(row[i]) for row in cells) else "---" for i in range(len(titles))]
    lines = [titles, sides, *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"(-?[\d.,]+(e-?\d+)?|nan|inf)?( ± [\d.,]+)?( \(.*\))?", cell) is not None


def print_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """On the terminal; columns that do not fit beside the others go into a table below, with the run's name again."""
    rich_table, box = needed("rich.table", "rich"), needed("rich.box", "rich")
    console = needed("rich.console", "rich").Console(highlight=False)
    if not console.is_terminal:
        console.width = NEVER_FULL  # nothing is broken in a file
    columns = [list(column) for column in zip(titles, *cells, strict=True)]
    for shown in _that_fit(columns, console.width):
        built = rich_table.Table(box=box.SIMPLE, header_style="bold")
        for title, *values in shown:
            right = title != titles[0] and all(map(_is_number, values))
            header = textwrap.fill(title, _width(title, values), break_on_hyphens=False)
            built.add_column(escaped(header), justify="right" if right else "left", overflow="fold")
        for row in zip(*(values for _, *values in shown), strict=True):
            built.add_row(*map(escaped, row))
        console.print(built)


def escaped(text: str) -> Any:
    """Text that rich prints as it is."""
    return needed("rich.text", "rich").Text(text)


def _that_fit(columns: List[List[str]], width: int) -> Iterator[List[List[str]]]:
    """The columns in groups of at most ``width`` characters, each led by the first column."""
    first, *others = columns
    group, used = [first], _width(*_parts(first))
    for column in others:
        wide = _width(*_parts(column)) + BETWEEN_COLUMNS
        if len(group) > 1 and used + wide + BETWEEN_COLUMNS > width:
            yield group
            group, used = [first], _width(*_parts(first))
        group.append(column)
        used += wide
    yield group


def _parts(column: List[str]) -> Tuple[str, List[str]]:
    return column[0], column[1:]


def _width(title: str, values: Sequence[str]) -> int:
    """A title may be broken between its words, a value is not."""
    return max(map(len, [*title.split(), *values]))
