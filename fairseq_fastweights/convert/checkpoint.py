"""Reading the checkpoint of a softmax transformer, old or new, as data; and writing a converted one."""

import argparse
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import torch
from fairseq import checkpoint_utils, models
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..errors import FastWeightError
from ..models.fast_weight_lm import FastWeightLanguageModel
from ..models.fast_weight_transformer import FastWeightTransformerModel
from ..models.loading import drop_fused_copies
from ..models.options import SITES, SOFTMAX

TRANSLATION = (TransformerModel, FastWeightTransformerModel)
LANGUAGE = (TransformerLanguageModel, FastWeightLanguageModel)


class Softmax(NamedTuple):
    """A softmax transformer from a checkpoint.

    state: the checkpoint as fairseq reads it, its ``cfg`` a DictConfig.
    arch: its architecture's name in fairseq.
    args: the model's options, the architecture's defaults filled in.
    parameters: under the names that fairseq's attention has today.
    dropped: what is left out of them because it repeats others, by name.
    translates: whether it is an encoder-decoder model.
    """

    state: dict
    arch: str
    args: argparse.Namespace
    parameters: Dict[str, Tensor]
    dropped: Dict[str, Tensor]
    translates: bool


def read_softmax(path: str) -> Softmax:
    """The checkpoint at ``path``. Nothing in it is executed: see ``compat``.

    Raises:
        FastWeightError (a ValueError): no such file, one that is no checkpoint or holds code, another kind of
            model, or one that has fast weights already.
    """
    state = load(path)
    arch, args = options_of_model(state["cfg"].model)
    kind = ARCH_MODEL_REGISTRY.get(arch)
    if kind not in TRANSLATION + LANGUAGE:
        raise FastWeightError(
            f"{path} holds a model {arch!r}: only fairseq's transformer and transformer_lm, their variants, and "
            "fast_weight_transformer and fast_weight_lm with softmax attention can be converted"
        )
    if arch not in MODEL_DATACLASS_REGISTRY:
        ARCH_CONFIG_REGISTRY[arch](args)  # what a checkpoint of an older fairseq does not name
    translates = kind in TRANSLATION
    if translates:
        base_architecture(args)  # as TransformerModel.build_model does
    refuse_fast_weights(path, kind, args, translates)
    parameters, dropped = current_names(state["model"])
    return Softmax(state, arch, args, parameters, dropped, translates)


def load(path: str) -> dict:
    """The checkpoint at ``path``, brought up to date by fairseq."""
    try:
        return checkpoint_utils.load_checkpoint_to_cpu(str(path))
    except FastWeightError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise FastWeightError(f"there is no checkpoint {path}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise FastWeightError(f"fairseq cannot read the checkpoint {path}: {reason}") from error


def load_model(path: str, task) -> nn.Module:
    """The model of any checkpoint, with the dictionaries of ``task``.

    Not by ``task.build_model``: the translation task would validate with the model it built last.

    Raises:
        FastWeightError (a ValueError): no such checkpoint, or it does not fit the task's dictionaries.
    """
    state = load(path)
    drop_fused_copies(state["model"])
    model = models.build_model(state["cfg"].model, task, from_checkpoint=True)
    try:
        model.load_state_dict(state["model"], strict=True, model_cfg=state["cfg"].model)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise FastWeightError(
            f"the model of {path} does not fit this task; are the dictionaries those it was trained with? {first}"
        ) from error
    return model


def options_of_model(model) -> Tuple[str, argparse.Namespace]:
    """(architecture, a copy of the options) of the ``model`` part of a checkpoint's cfg."""
    if isinstance(model, DictConfig):
        options = OmegaConf.to_container(model, resolve=True)
    elif isinstance(model, argparse.Namespace):
        options = dict(vars(model))
    else:
        options = {}
    arch = options.get("_name") or options.get("arch") or "without a name"
    return str(arch), argparse.Namespace(**options)


def refuse_fast_weights(path: str, kind: type, args: argparse.Namespace, translates: bool) -> None:
    if kind not in (FastWeightTransformerModel, FastWeightLanguageModel):
        return
    for site in SITES if translates else SITES[:1]:
        rule = getattr(args, site, SOFTMAX)
        if rule != SOFTMAX:
            raise FastWeightError(
                f"{path} has fast weights already ({site} is {rule}): only softmax attention can be converted"
            )


def current_names(model: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """(parameters under today's names, those that only repeat others).

    0.12.2 wrote fused copies beside an encoder layer's weights; before 0.8 q, k and v lay in one in_proj_weight.
    """
    parameters = dict(model)
    drop_fused_copies(parameters)
    dropped = {name: x for name, x in model.items() if name not in parameters}
    for name in list(parameters):
        parent, _, leaf = name.rpartition(".")
        if leaf in ("in_proj_weight", "in_proj_bias"):
            q, k, v = parameters.pop(name).chunk(3)
            kind = leaf[len("in_proj_") :]
            parameters.update(
                {f"{parent}.q_proj.{kind}": q, f"{parent}.k_proj.{kind}": k, f"{parent}.v_proj.{kind}": v}
            )
    return parameters, dropped


def write(path: str, source: Softmax, arch: str, args: argparse.Namespace, model: Dict[str, Tensor]) -> None:
    """A checkpoint without optimizer state, as of a run that has made no update yet.

    Raises:
        FastWeightError (a ValueError): the file cannot be written.
    """
    cfg = OmegaConf.to_container(source.state["cfg"], resolve=True, enum_to_str=True)
    options = {**vars(args), "_name": arch}
    cfg["model"] = argparse.Namespace(**{**options, "arch": arch}) if source.translates else options
    (last,) = source.state["optimizer_history"][-1:]
    state = {
        "args": None,
        "cfg": cfg,
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": last.get("criterion_name", ""),
                "optimizer_name": last["optimizer_name"],
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": source.state.get("task_state", {}),
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "version": 2}},
    }
    half = Path(f"{path}.half")
    try:
        torch.save(state, half)
        os.replace(half, path)
    except (OSError, RuntimeError) as error:  # torch's own: the folder does not exist
        half.unlink(missing_ok=True)
        raise FastWeightError(f"cannot write {path}: {' '.join(str(error).split())[:200]}") from error


def dropped_from_state(state: dict) -> List[str]:
    """What of a checkpoint beside its parameters is not taken along, in words."""
    optimizer = tensors_in(state.get("last_optimizer_state"))
    ema = tensors_in(state.get("extra_state", {}).get("ema"))
    found = (("the optimizer's state", optimizer), ("the moving average (EMA)", ema))
    return [f"{what} ({sum(x.numel() for x in tensors):,} numbers)" for what, tensors in found if tensors]


def tensors_in(tree) -> List[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [x for branch in branches for x in tensors_in(branch)]
