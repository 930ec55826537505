"""Shims that let fairseq 0.12.x run on current torch, numpy and hydra.

:func:`apply` is called when the plugin is imported, which fairseq does before it reads a
checkpoint. Every shim is one function that says why it is there and when it can go. A shim leaves
alone what it does not find, and the function it wraps stays reachable as ``__wrapped__``.
"""

import argparse
import ast
import collections
import contextlib
import functools
import importlib.util
import inspect
import logging
import operator
import os
import pickle
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import omegaconf
import torch

from .errors import FastWeightError, install_excepthook, user_mistake

logger = logging.getLogger(__name__)

Entry = Callable | tuple[Callable, str]


def apply() -> None:
    """Install every shim. Calling it again changes nothing."""
    install_excepthook()
    print_user_mistakes_under_hydra()
    allow_checkpoint_data()
    allow_config_broadcast()
    read_literals_without_eval()
    name_unreadable_checkpoints()
    name_missing_checkpoints()
    keep_last_partial_batch()
    make_the_same_batches_on_resume()
    gather_streams_before_saving()
    read_prompts_at_once()
    block_repeats_on_the_cpu()
    log_a_bleu_of_zero()
    train_fp16_on_the_cpu()
    train_bf16_without_tpu()
    restore_numpy_compat_long()


# --- checkpoints are data -------------------------------------------------------------------------


def allow_checkpoint_data() -> None:
    """Let torch.load(weights_only=True), the default since torch 2.6, read fairseq's checkpoints.

    Architectures that are set up through argparse (every encoder-decoder model) are stored as an
    argparse.Namespace, and the meters of --eval-bleu as numpy numbers. Nothing on the list can run
    code: a Namespace only takes attributes, and for numpy's constructors the stand-ins below are
    called, which build arrays of plain numbers and nothing else.
    Can go when fairseq stores plain dicts and Python numbers.
    """
    if _torch_takes_named_globals():
        torch.serialization.add_safe_globals(_checkpoint_globals())


def _torch_takes_named_globals() -> bool:
    # add_safe_globals came with torch 2.4, its (callable, name) entries later
    add = getattr(torch.serialization, "add_safe_globals", None)
    return add is not None and "tuple" in str(inspect.signature(add)).lower()


def _checkpoint_globals() -> list[Entry]:
    entries: list[Entry] = [
        argparse.Namespace,
        (PlainArray, "numpy.ndarray"),
        (PlainDtype, "numpy.dtype"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1, numpy 2
        entries.append((plain_array, module + "._reconstruct"))
        entries.append((plain_scalar, module + ".scalar"))
    return entries


class PlainDtype:
    """Stands in for numpy.dtype while a checkpoint is read: numbers and bool only.

    numpy's own dtype takes flags from the pickle, which can make it read bytes as pointers.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc][0-9]{1,2}", code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r} is not a plain number")
        self._dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, subtype, names, fields = state[:5]
        if byte_order not in ("<", ">", "=", "|") or (subtype, names, fields) != (None,) * 3:
            raise pickle.UnpicklingError("numpy dtype is not a plain number")
        self._dtype = self._dtype.newbyteorder(byte_order)

    @staticmethod
    def unwrap(dtype: Any) -> np.dtype:
        """The numpy dtype behind a stand-in that a checkpoint gave."""
        if type(dtype) is not PlainDtype:
            raise pickle.UnpicklingError("a numpy value in the checkpoint has no plain dtype")
        return dtype._dtype


class PlainArray(np.ndarray):
    """Stands in for numpy.ndarray while a checkpoint is read. It is pickled as a numpy.ndarray."""

    def __new__(cls):
        return np.zeros(0, np.int8).view(cls)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran_order, data = state
        super().__setstate__((1, shape, PlainDtype.unwrap(dtype), fortran_order, data))

    def __reduce_ex__(self, protocol: int) -> tuple:  # type: ignore[override]
        return np.asarray(self).__reduce_ex__(protocol)


def plain_array(subtype: type, shape: tuple, code: bytes) -> PlainArray:
    """Stands in for numpy's _reconstruct: an empty array that __setstate__ then fills."""
    return PlainArray()


def plain_scalar(dtype: PlainDtype, data: bytes) -> np.generic:
    """Stands in for numpy's scalar: one number from its bytes."""
    return np.frombuffer(data, PlainDtype.unwrap(dtype), count=1)[0]


def allow_config_broadcast() -> None:
    """Let a run of several processes resume: rank 0 broadcasts the checkpoint with its DictConfig.

    The receiver reads it with torch.load, which refuses omegaconf's nodes since torch 2.6. They
    are allowed only during the broadcast, since no checkpoint file of fairseq 0.12 holds any.
    Can go when fairseq broadcasts plain dicts.
    """
    if not _torch_takes_named_globals() or not hasattr(torch.serialization, "safe_globals"):
        return
    from fairseq.distributed import utils as distributed_utils

    def make(broadcast: Callable) -> Callable:
        def broadcast_config(*args: Any, **kwargs: Any) -> Any:
            with torch.serialization.safe_globals(_config_globals()):
                return broadcast(*args, **kwargs)

        return broadcast_config

    _wrap(distributed_utils, "_broadcast_object_slow", make)


def _config_globals() -> list[Entry]:
    from fairseq.distributed import utils as distributed_utils
    from omegaconf.base import ContainerMetadata, Metadata

    nodes = "DictConfig ListConfig AnyNode StringNode IntegerNode FloatNode BooleanNode UnionNode"
    entries = [getattr(omegaconf, name) for name in nodes.split() if hasattr(omegaconf, name)]
    entries += [ContainerMetadata, Metadata, distributed_utils._TensorPlaceholder]
    # the types and the empty cache that a node's metadata names
    entries += [typing.Any, collections.defaultdict, dict, list, int, float, str, bool]
    return entries


def read_literals_without_eval() -> None:
    """Shadow ``eval`` in fairseq's modules by a reader of literals.

    fairseq calls eval on option values such as --adaptive-softmax-cutoff when it builds a model,
    and at generation those values come from the checkpoint: a string in it could run any code.
    Numbers, strings, containers and + - * between them cover every value that fairseq documents.
    fairseq_cli, which evaluates only what its user types, is left alone.
    Can go when fairseq reads its options with ast.literal_eval.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and module is not None:
            module.eval = read_literal  # type: ignore[attr-defined]


_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def read_literal(text: str) -> Any:
    """The value of a Python literal, which may use + - * as in ``[(512, 3)] * 2 + [(512, 2)]``."""
    if not isinstance(text, str):  # as eval; fairseq's eval_bool relies on it
        raise TypeError(f"a literal must be a str, not {type(text).__name__}")
    try:
        return _literal_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError):
        raise FastWeightError(
            f"option value {text!r} is not a literal (number, string, tuple, list, dict; + - *)"
        ) from None


def _literal_value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _literal_value(node.left), _literal_value(node.right)
        return _ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.List):
        return [_literal_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal_value(item) for item in node.elts)
    return ast.literal_eval(node)


# --- files that are no checkpoints ----------------------------------------------------------------


class CheckpointFileError(FastWeightError, OSError):
    """A checkpoint is missing or cannot be read. An OSError too, as callers of fairseq expect."""


def name_unreadable_checkpoints() -> None:
    """Say which checkpoint cannot be read and why, instead of a traceback from inside torch.

    Also makes torch.load refuse code where fairseq asks for weights_only=False, as its
    development branch does since 2025.
    Can go when fairseq names the file itself and never passes weights_only=False.
    """
    from fairseq import checkpoint_utils

    def make(load: Callable) -> Callable:
        def load_checkpoint(path: str, *args: Any, **kwargs: Any) -> Any:
            try:
                with _torch_load_reads_data_only():
                    return load(path, *args, **kwargs)
            except FileNotFoundError:
                raise
            except Exception as error:
                complaint = _complaint_about_file(path)
                if complaint is None:  # the file is fine: say what fairseq says
                    raise
                raise CheckpointFileError(f"checkpoint {path} {complaint}") from error

        return load_checkpoint

    _wrap(checkpoint_utils, "load_checkpoint_to_cpu", make)


def name_missing_checkpoints() -> None:
    """Make fairseq's "Model file not found: PATH" one line instead of a traceback.

    Can go when fairseq's commands report it without a traceback.
    """
    from fairseq import checkpoint_utils

    def make(load: Callable) -> Callable:
        def load_models(*args: Any, **kwargs: Any) -> Any:
            try:
                return load(*args, **kwargs)
            except OSError as error:
                if not str(error).startswith("Model file not found"):
                    raise
                raise CheckpointFileError(str(error)) from error

        return load_models

    _wrap(checkpoint_utils, "load_model_ensemble_and_task", make)


@contextlib.contextmanager
def _torch_load_reads_data_only() -> Iterator[None]:
    # torch's own switch beats a weights_only=False at the call. Not where torch is too old for the
    # allow-list, nor where the user has thrown torch's opposite switch.
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if not _torch_takes_named_globals() or forbid in os.environ or force in os.environ:
        yield
        return
    os.environ[force] = "1"
    try:
        yield
    finally:
        os.environ.pop(force, None)


def _complaint_about_file(path: str) -> str | None:
    """What is wrong with the file itself: read it again, as data, without fairseq's conversions."""
    from fairseq.file_io import PathManager

    try:
        file = open(PathManager.get_local_path(path), "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    with file:
        try:
            state = _load_as_data(file)
        except Exception as error:  # noqa: BLE001 - a damaged file can raise anything
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused:
                return f"is refused: it holds {refused[1]}, and a checkpoint may hold data only"
            return f"cannot be read (truncated or not a checkpoint): {_short(error)}"
    if not isinstance(state, dict) or "model" not in state or not {"args", "cfg"} & set(state):
        return "cannot be read (truncated or not a checkpoint): no 'model' and 'cfg' in it"
    return None


def _load_as_data(file: BinaryIO) -> Any:
    data_only = {"weights_only": True} if _torch_takes_named_globals() else {}
    return torch.load(file, map_location="cpu", **data_only)


def _short(error: BaseException) -> str:
    # torch puts advice around the reason and a C++ stack behind it
    reason = str(error).split("WeightsUnpickler error:")[-1].strip()
    return (reason.splitlines() or [type(error).__name__])[0][:200]


# --- silent losses and crashes --------------------------------------------------------------------


def keep_last_partial_batch() -> None:
    """Keep every sentence of a split, as fairseq 0.12.2 does.

    Later versions drop the last batch of a split if its size is no multiple of
    --required-batch-size-multiple (8 by default), so validation and generation silently miss up to
    7 sentences. They also fail on an empty split.
    Can go when data_utils.batch_by_size no longer drops batches.
    """
    from fairseq.data import data_utils

    def make(batch_by_size: Callable) -> Callable:
        def batch_every_sentence(indices: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64, count=-1)
            if len(indices) == 0:
                return []
            batches = batch_by_size(indices, *args, **kwargs)
            # batches follow the order of the indices, so what was dropped is the end of them
            dropped = indices[sum(len(batch) for batch in batches) :]
            return [*batches, dropped] if len(dropped) else batches

        return batch_every_sentence

    _wrap(data_utils, "batch_by_size", make)


def make_the_same_batches_on_resume() -> None:
    """Let a run that is resumed after its first epoch see the batches of the run that was not stopped.

    Batches are made once per process, from a permutation that fairseq 0.12.2 seeds with the run's
    seed. Later versions add the epoch in which the process started, so a resumed run gets others.
    Can go when FairseqTask.get_batch_iterator no longer adds the epoch to the seed.
    """
    from fairseq.tasks import FairseqTask

    def make(get_batch_iterator: Callable) -> Callable:
        signature = inspect.signature(get_batch_iterator)

        def same_batches_in_every_epoch(task: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(task.cfg, "rebuild_batches", False):  # anew in every epoch: fairseq is right
                return get_batch_iterator(task, *args, **kwargs)
            bound = signature.bind(task, *args, **kwargs)
            bound.apply_defaults()
            seed, epoch = bound.arguments["seed"], bound.arguments["epoch"]
            bound.arguments["seed"] = seed + 1 - epoch  # + epoch makes it that of the first epoch
            iterator = get_batch_iterator(*bound.args, **bound.kwargs)
            iterator.seed = seed  # the order of the batches is another in every epoch
            return iterator

        return same_batches_in_every_epoch

    if "seed + epoch" in inspect.getsource(FairseqTask.get_batch_iterator):
        _wrap(FairseqTask, "get_batch_iterator", make)


def gather_streams_before_saving() -> None:
    """Let every rank hand over the states of its streams before a checkpoint is written.

    Rank 0 writes the checkpoint, and fairseq asks the others for nothing but a sharded optimizer.
    Can go when fairseq calls task.state_dict() on all ranks.
    """
    from fairseq import checkpoint_utils

    def make(save: Callable) -> Callable:
        def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
            if hasattr(epoch_itr, "gather_states") and not cfg.no_save:
                epoch_itr.gather_states(trainer.get_model())
            return save(cfg, trainer, epoch_itr, val_loss)

        return save_checkpoint

    _wrap(checkpoint_utils, "save_checkpoint", make)


def read_prompts_at_once() -> None:
    """Let fast-weight language models know the prompt that fairseq's generator will feed them token by token.

    Can go when SequenceGenerator hands the whole prompt to the decoder.
    """
    from fairseq.sequence_generator import SequenceGenerator

    def make(generate: Callable) -> Callable:
        def generate_from_prompts(generator: Any, models: Any, sample: Any, **kwargs: Any) -> Any:
            from .models.prompts import prompts_read_at_once  # the models come after the shims

            prompts, bos = kwargs.get("prefix_tokens"), kwargs.get("bos_token")
            bos = generator.eos if bos is None else bos
            known = (prompts, bos, generator.eos, generator.pad, generator.beam_size)
            with prompts_read_at_once(generator.model.models, *known):
                return generate(generator, models, sample, **kwargs)

        return generate_from_prompts

    # not _generate, which TorchScript compiles
    _wrap(SequenceGenerator, "generate", make)


def block_repeats_on_the_cpu() -> None:
    """Let --no-repeat-ngram-size work without fairseq's CUDA extension.

    The blocker takes the last words of a hypothesis from the end of the search's buffer, which is padding until the
    search is over, so that nothing is ever blocked (fairseq issues 4709 and 5206).
    Can go when SequenceGenerator hands it tokens[:, :step + 1].
    """
    from fairseq.ngram_repeat_block import NGramRepeatBlock

    def make(forward: Callable) -> Callable:
        def forward_words_so_far(blocker: Any, tokens: Any, lprobs: Any, bsz: int, beam_size: int, step: int):
            if not blocker.use_extension:  # which is told the step, and reads no further
                tokens = tokens[:, : step + 1]
            return forward(blocker, tokens, lprobs, bsz, beam_size, step)

        return forward_words_so_far

    _wrap(NGramRepeatBlock, "forward", make)


def log_a_bleu_of_zero() -> None:
    """Let --best-checkpoint-metric bleu survive a validation in which all translations are empty, as early ones can be.

    The task then logs no BLEU at all, and fairseq-train ends in KeyError: 'bleu'.
    Can go when TranslationTask.reduce_metrics logs 0.
    """
    from fairseq.logging import metrics
    from fairseq.tasks.translation import TranslationTask

    def make(reduce_metrics: Callable) -> Callable:
        def reduce_metrics_with_bleu(task: Any, logging_outputs: Any, criterion: Any) -> None:
            reduce_metrics(task, logging_outputs, criterion)
            measured = task.cfg.eval_bleu and any("_bleu_sys_len" in log for log in logging_outputs)
            if measured and not any(log.get("_bleu_totals_0") for log in logging_outputs):
                metrics.log_scalar("bleu", 0.0, round=2)

        return reduce_metrics_with_bleu

    _wrap(TranslationTask, "reduce_metrics", make)


def train_fp16_on_the_cpu() -> None:
    """Let --fp16 run with --cpu, as --memory-efficient-fp16 does.

    fairseq puts the float32 copy of the parameters on a GPU, unless --fp16-no-flatten-grads leaves them where they are.
    Can go when FP16Optimizer.build_fp32_params asks the parameters for their device.
    """
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    def make(build: Callable) -> Callable:
        def build_where_the_parameters_are(cfg: Any, params: Any, **kwargs: Any) -> Any:
            params = list(params)
            if cfg.common.fp16 and not any(x.is_cuda for x in params):
                cfg.common.fp16_no_flatten_grads = True
            return build(cfg, params, **kwargs)

        return build_where_the_parameters_are

    _wrap(FP16Optimizer, "build_optimizer", make)


def train_bf16_without_tpu() -> None:
    """Let --bf16 and --memory-efficient-bf16 run on GPU and CPU.

    The command line takes them for TPU options and sets --tpu, which fails where torch_xla is not
    installed. call_main is the first that sees the finished configuration, in every command that
    reads it (fairseq-generate has no TPU code; fairseq-hydra-train does not set tpu).
    Can go when options.py no longer sets args.tpu.
    """
    if importlib.util.find_spec("torch_xla") is not None:
        return
    from fairseq.distributed import utils as distributed_utils

    def make(call_main: Callable) -> Callable:
        def call_main_without_tpu(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if cfg.common.tpu and (cfg.common.bf16 or cfg.common.memory_efficient_bf16):
                logger.info("bf16 without TPU: torch_xla is not installed")
                _clear_tpu(cfg)
            return call_main(cfg, *args, **kwargs)

        return call_main_without_tpu

    _wrap(distributed_utils, "call_main", make)


def _clear_tpu(cfg: Any) -> None:
    # the parser has copied the flag to every group that has one: distributed_training, optimizer, ...
    for group in (cfg[name] for name in cfg):
        if isinstance(group, (omegaconf.DictConfig, argparse.Namespace)) and "tpu" in group:
            group.tpu = False


def restore_numpy_compat_long() -> None:
    """Give back np.compat.long, which numpy 2 removed.

    fairseq uses it for --sample-break-mode eos and --num-batch-buckets.
    Can go when fairseq writes np.int64.
    """
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]


def print_user_mistakes_under_hydra() -> None:
    """Make a user's mistake one line under fairseq-hydra-train, as in the other commands.

    Hydra catches every exception of its job and prints a traceback of its own, so sys.excepthook
    is never asked. It fetches the outcome of a job from JobReturn.return_value (hydra 1.1 on).
    Can go when hydra offers a hook for errors of a job.
    """
    from hydra.core import utils as hydra_utils

    shown = inspect.getattr_static(hydra_utils.JobReturn, "return_value", None)
    if not isinstance(shown, property) or hasattr(shown.fget, "is_fast_weight_shim"):
        return

    @functools.wraps(shown.fget)
    def return_value(job: Any) -> Any:
        outcome = job._return_value
        line = user_mistake(outcome) if isinstance(outcome, BaseException) else None
        if line is not None:
            raise SystemExit(line)  # printed on stderr; the exit status is 1
        return shown.fget(job)

    return_value.is_fast_weight_shim = True  # type: ignore[attr-defined]
    hydra_utils.JobReturn.return_value = shown.getter(return_value)


def _wrap(module: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``module.name`` by ``make(module.name)``, once, if it exists."""
    original = getattr(module, name, None)
    if original is None or hasattr(original, "is_fast_weight_shim"):
        return
    wrapper = functools.wraps(original)(make(original))
    wrapper.is_fast_weight_shim = True  # type: ignore[attr-defined]
    setattr(module, name, wrapper)
