"""The commands that go on from a converted checkpoint."""

import argparse
import math
import shlex
from pathlib import Path
from typing import List

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf

from .checkpoint import Softmax


def converted_arch(source: Softmax) -> str:
    """The name under which the converted model is built: that of the same sizes, else the basic one."""
    if not source.translates:
        return "fast_weight_lm"  # an architecture function would change what the options say
    for arch in (source.arch, f"fast_weight_{source.arch}"):
        if arch.startswith("fast_weight_") and arch in ARCH_MODEL_REGISTRY:
            return arch
    return "fast_weight_transformer"


def model_flags(arch: str, args: argparse.Namespace) -> List[str]:
    """The flags with which fairseq-train builds the model of ``args``: --arch, and what differs from its defaults."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    defaults = parser.parse_args([])
    ARCH_CONFIG_REGISTRY[arch](defaults)
    if arch in MODEL_DATACLASS_REGISTRY:
        defaults = argparse.Namespace(**vars(MODEL_DATACLASS_REGISTRY[arch]()))
    flags = ["--arch", arch]
    for action in parser._actions:
        if action.dest == "help":
            continue
        value, default = getattr(args, action.dest, None), getattr(defaults, action.dest, None)
        if isinstance(default, str) and default.startswith("${"):
            owner, _, name = default[2:-1].partition(".")
            if owner != "model":  # set by the task's flags
                continue
            default = getattr(args, name, None)
        if value == default or value is None or value is False:
            continue
        flags += [action.option_strings[-1]] + ([] if action.nargs == 0 else [str(value)])
    return flags


def task_flags(source: Softmax) -> List[str]:
    """Data and task, as the softmax model was trained."""
    task = source.state["cfg"].task
    options = OmegaConf.to_container(task, resolve=True) if isinstance(task, DictConfig) else vars(task)
    names = ("source_lang", "target_lang", "tokens_per_sample", "sample_break_mode")
    flags = [str(options.get("data") or "DATA"), "--task", str(options.get("_name") or options.get("task"))]
    for name in names:
        if options.get(name) not in (None, ""):
            flags += [f"--{name.replace('_', '-')}", str(options[name])]
    if options.get("add_bos_token"):
        flags.append("--add-bos-token")
    return flags


def batch_flags(source: Softmax) -> List[str]:
    """Batches and precision as the softmax model had, where its checkpoint says; for one process."""
    cfg = source.state["cfg"]
    dataset, optimization, common, distributed = (
        cfg.get(group) or {} for group in ("dataset", "optimization", "common", "distributed_training")
    )
    sizes = [name for name in ("max_tokens", "batch_size") if dataset.get(name)] or [None]
    flags = ["--max-tokens", "4096"]
    if sizes[0]:
        flags = [f"--{sizes[0].replace('_', '-')}", str(dataset[sizes[0]])]
    (steps, *_) = optimization.get("update_freq") or [1]
    steps *= distributed.get("distributed_world_size") or 1
    if steps > 1:
        flags += ["--update-freq", str(steps)]
    return flags + [f"--{name}" for name in ("fp16", "bf16") if common.get(name)]


def criterion_flags(source: Softmax) -> List[str]:
    """The loss that the softmax model was trained with, where its checkpoint says."""
    criterion = source.state["cfg"].get("criterion") or {}
    options = vars(criterion) if isinstance(criterion, argparse.Namespace) else criterion
    name = options.get("_name")
    if name not in CRITERION_REGISTRY or name == "attention_distillation":
        return ["--criterion", "cross_entropy"]
    smoothing = options.get("label_smoothing")
    return ["--criterion", name] + (["--label-smoothing", str(smoothing)] if smoothing else [])


def next_commands(source: Softmax, teacher: str, out: str, arch: str, args: argparse.Namespace) -> List[str]:
    """Two lines for a shell: distillation of the attention, then ordinary training.

    Each has a tenth of the updates that the softmax model had, or 1000 where its checkpoint does not say.
    """
    folder = Path(out).with_suffix("")
    updates = source.state["optimizer_history"][-1].get("num_updates", 0)
    common = ["fairseq-train", *task_flags(source), "--user-dir", str(Path(__file__).resolve().parents[1])]
    common += [*model_flags(arch, args), *batch_flags(source), "--ddp-backend", "legacy_ddp"]
    common += [
        "--max-update",
        str(math.ceil(updates / 10) or 1000),
        "--optimizer",
        "adam",
        "--clip-norm",
        "1.0",
    ]
    first = ["--lr", "1e-3", "--criterion", "attention_distillation", "--teacher", str(teacher)]
    first += [
        "--train-only",
        "attention",
        "--finetune-from-model",
        str(out),
        "--save-dir",
        f"{folder}-distilled",
    ]
    then = ["--lr", "3e-4", *criterion_flags(source)]
    then += [
        "--finetune-from-model",
        f"{folder}-distilled/checkpoint_best.pt",
        "--save-dir",
        f"{folder}-trained",
    ]
    return [shlex.join([*common, *flags]) for flags in (first, then)]
