"""Shows what the fast-weight heads of a checkpoint write, erase and read in a text.

    fastweights-inspect checkpoints/checkpoint_best.pt --text "the target" --source "the source" --out pictures

The text is cut at spaces (or by --sentencepiece-model): give it tokenised as the training data was. Terminal: a table
for each attention. With --out also pictures, PNG and SVG: SITE.LAYER.gates (write strength, share erased, decay),
SITE.LAYER.weights (the implied attention maps: exact weights of the values in what each head reads) and
SITE.LAYER.state (singular values of the fast weights after every write).
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Dict, List, Optional

from torch import Tensor

from ..errors import FastWeightError
from .checkpoint import Inspected, choose, choose_heads, inspect_text, load, words_of
from .measures import check_exact, summary
from .record import SITES, Recording

DIGITS = 6  # significant, in JSON


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "fastweights-inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", help="a checkpoint of fast_weight_transformer or fast_weight_lm")
    p.add_argument("--text", required=True, help="what the decoder or language model reads")
    p.add_argument("--source", help="for translation: the source sentence, of which --text is a translation")
    p.add_argument("--site", nargs="+", choices=SITES, help="default: all that have fast weights")
    p.add_argument("--layers", nargs="+", type=int, metavar="N", help="from 0; default: all")
    p.add_argument("--heads", nargs="+", type=int, metavar="N", help="from 0; default: all")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="write pictures there (needs matplotlib)")
    p.add_argument("--data", metavar="FOLDER", help="of dict.*.txt; default: where the model was trained")
    p.add_argument("--sentencepiece-model", metavar="FILE", help="cuts --text and --source into pieces")
    p.add_argument("--json", action="store_true", help="everything as JSON in place of the tables")
    return p


def as_json(recording: Recording, heads: List[int], inspected: Inspected) -> Dict[str, object]:
    """A recorded sentence as plain numbers: what the table shows and what the pictures show."""
    values = {
        "write": recording.write_strength,
        "erased_share": recording.erased_share,
        "decay": recording.decay,
        "singular_values": recording.singular_values,
        "weights": recording.weights,
    }
    rows = summary(recording, heads)
    for row, head in zip(rows, heads):
        row.update({name: None if x is None else plain(x[0, head]) for name, x in values.items()})
    return {
        "module": recording.name,
        "site": recording.site,
        "layer": recording.layer,
        "rule": recording.rule,
        "attention_normalized": recording.normalized,
        "written": inspected.written(recording.site),
        "reading": inspected.reading(recording.site),
        "error": check_exact(recording),
        "heads": rows,
    }


def plain(x: Tensor) -> list:
    """Nested lists of numbers with ``DIGITS`` significant digits."""
    return rounded(x.tolist())


def rounded(x):
    return [rounded(item) for item in x] if isinstance(x, list) else float(f"{x:.{DIGITS}g}")


def print_tables(chosen: List[Recording], heads: List[List[int]]) -> None:
    """A table for each attention."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise FastWeightError("tables need rich: pip install rich (or --json)") from error
    console = Console()
    for recording, numbers in zip(chosen, heads):
        normalized = ", attention-normalised" if recording.normalized else ""
        table = Table(
            title=f"{recording.site}, layer {recording.layer}: {recording.rule} rule{normalized}",
            caption=f"weights exact to {check_exact(recording):.0e}",
            title_justify="left",
            caption_justify="left",
        )
        for name in ("head", "writes", "mean beta", "erased", "kept", "eff. rank", "distance", "negative"):
            table.add_column(name, justify="left" if name == "writes" else "right")
        for row in summary(recording, numbers):
            table.add_row(*cells(row))
        console.print(table)
    console.print(LEGEND, style="dim")


LEGEND = (
    "mean beta: write strength; erased: mean share e.k of what the key reads; kept: mean decay a of the state; "
    "eff. rank: of the final state; distance: tokens between reader and read; negative: share of negative weights; "
    "-: not in this rule"
)


def cells(row: Dict[str, object]) -> List[str]:
    """A line of the table."""

    def number(name: str, spec: str = ".3f") -> str:
        return "-" if row[name] is None else format(row[name], spec)

    return [
        str(row["head"]),
        "<-" if row["right_to_left"] else "->",
        number("mean_write"),
        number("mean_erased_share"),
        number("mean_decay"),
        number("effective_rank", ".1f"),
        number("mean_distance", ".1f"),
        number("negative_share", ".0%"),
    ]


def warn_of_unknown_words(inspected: Inspected) -> None:
    """One line on stderr for each text with words that the dictionary lacks."""
    for flag, sentence in (("--text", inspected.target), ("--source", inspected.source)):
        if sentence is not None and sentence.unknown:
            words = list(dict.fromkeys(sentence.unknown))
            print(
                f"fastweights-inspect: {len(sentence.unknown)} of {len(sentence.ids)} tokens of {flag} are not in the "
                f"dictionary: {' '.join(words[:10])}{' ...' if len(words) > 10 else ''}",
                file=sys.stderr,
            )


def main(argv: Optional[List[str]] = None) -> None:
    """The command. A user's mistake is a FastWeightError, which the plugin prints as one line; the exit status is 1."""
    args = parser().parse_args(argv)
    if args.out is not None:
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq's imports turn everything on
        from . import pictures  # now, not after the work, if matplotlib is missing
    model, task = load(args.checkpoint, args.data)
    words = words_of(args.text, args.sentencepiece_model)
    source = None if args.source is None else words_of(args.source, args.sentencepiece_model)
    inspected = inspect_text(model, task, words, source)
    chosen = choose(inspected.recordings, args.site, args.layers)
    heads = [choose_heads(recording, args.heads) for recording in chosen]
    warn_of_unknown_words(inspected)
    if args.json:
        print(json.dumps([as_json(r, numbers, inspected) for r, numbers in zip(chosen, heads)]))
    else:
        print_tables(chosen, heads)
    if args.out is not None:
        for recording, numbers in zip(chosen, heads):
            labels = inspected.reading(recording.site), inspected.written(recording.site)
            for path in pictures.draw(recording, numbers, *labels, args.out):
                print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
