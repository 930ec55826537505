"""Puts fast weights in the place of softmax attention in a trained fairseq transformer or transformer_lm.

    fastweights-convert checkpoint_best.pt converted.pt --update-rule delta --feature-map elu

Every weight that fits is kept; some are multiplied by a factor, so that the model starts near what it computed before
(see fairseq_fastweights/convert/swap.py). Prints what was kept, made new and dropped, and the commands that go on:
distillation of the attention, then ordinary training. Without these the converted model is of little use. --update-rule
softmax keeps a site as it is. The checkpoint is read as data: one that holds code is refused.
"""

import argparse
import copy
import re
from pathlib import Path
from typing import Dict, List, Optional

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from torch import Tensor

from ..errors import FastWeightError
from ..models.options import FastWeightOptions
from .checkpoint import dropped_from_state, read_softmax, write
from .command import converted_arch, next_commands
from .swap import Converted, convert


def parser() -> argparse.ArgumentParser:
    """The command line: the two files, and the flags that the models have."""
    p = argparse.ArgumentParser(
        "fastweights-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", metavar="IN.pt", help="of a transformer or transformer_lm, of any fairseq")
    p.add_argument("out", metavar="OUT.pt", help="the converted checkpoint")
    p.add_argument("--seed", type=int, default=1, help="of what is made new; default: 1")
    gen_parser_from_dataclass(p.add_argument_group("as for the models"), FastWeightOptions())
    return p


def grouped(tensors: Dict[str, Tensor], factors: Dict[str, float]) -> List[str]:
    """A line for each kind of tensor, the layers of a stack together."""
    groups: Dict[str, List[str]] = {}
    for name in tensors:
        groups.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), []).append(name)
    lines = []
    for pattern, names in groups.items():
        numbers = sum(tensors[name].numel() for name in names)
        times = f"  times {factors[names[0]]:.4g}" if names[0] in factors else ""
        lines.append(
            f"  {pattern:<52} {len(names):>3} x {str(tuple(tensors[names[0]].shape)):<16}{numbers:>14,}{times}"
        )
    return lines


def report(converted: Converted, dropped: List[str]) -> str:
    """The three lists."""
    parts = {
        "kept": converted.kept,
        "made new": {name: converted.model[name] for name in converted.made},
        "dropped": converted.dropped,
    }
    lines = []
    for title, tensors in parts.items():
        numbers = sum({x.data_ptr(): x.numel() for x in tensors.values()}.values())  # shared ones once
        lines.append(f"{title}: {len(tensors)} tensors, {numbers:,} numbers")
        lines += grouped(tensors, converted.factors if title == "kept" else {})
    return "\n".join(lines + [f"  {line}" for line in dropped])


def main(argv: Optional[List[str]] = None) -> None:
    """The command. A user's mistake is a FastWeightError, which the plugin prints as one line; the exit status is 1."""
    options = vars(parser().parse_args(argv))
    checkpoint, out, seed = (options.pop(name) for name in ("checkpoint", "out", "seed"))
    if Path(out).exists() and Path(checkpoint).exists() and Path(out).samefile(checkpoint):
        raise FastWeightError(f"OUT.pt must be another file than IN.pt, got {out} twice")
    source = read_softmax(checkpoint)
    args = copy.copy(source.args)
    vars(args).update(options)
    torch.manual_seed(seed)
    converted = convert(source, args)
    arch = converted_arch(source)
    write(out, source, arch, args, converted.model)
    print(report(converted, dropped_from_state(source.state)))
    first, then = next_commands(source, checkpoint, out, arch, args)
    print(
        f"\nwrote {out}. Go on with these, each a tenth of the softmax model's updates (change what you like):"
    )
    print(f"\n{first}\n\n{then}")


if __name__ == "__main__":
    main()
