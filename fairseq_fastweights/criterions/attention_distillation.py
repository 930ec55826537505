"""--criterion attention_distillation --teacher IN.pt: fast weights learn what softmax attention computes."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..convert.checkpoint import load_model
from ..errors import FastWeightError
from ..modules import FastWeightAttention
from ..modules.stats import layer_of, site_of

AFTER_FAIRSEQ = 2000  # priority in the log


@dataclass
class AttentionDistillationConfig(FairseqDataclass):
    teacher: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose attention outputs are to be matched"}
    )
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "of the label-smoothed cross entropy that is added, 0: distillation alone"},
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "of that cross entropy"})
    sentence_avg: bool = II("optimization.sentence_avg")


class Call(NamedTuple):
    """What an attention of the teacher was given, and what it answered: query and out (T, B, C), padding (B, S)."""

    query: Tensor
    key: Optional[Tensor]
    value: Optional[Tensor]
    padding: Optional[Tensor]
    out: Tensor


@register_criterion("attention_distillation", dataclass=AttentionDistillationConfig)
class AttentionDistillation(LabelSmoothedCrossEntropyCriterion):
    """Matches the outputs of every fast-weight attention with those of the teacher's attention of the same name.

    Each attention of the student gets the inputs of the teacher's, not its own: what it is to answer is then a
    function of what it sees, while on its own stream every layer would chase the errors of those below it, which
    change with every update. All layers learn at once and alone, as in the attention transfer of LoLCATs (Zhang et al.
    2024). It costs a pass of the teacher and the student's attentions, without its feed-forward layers. What it cannot
    teach is to live with the student's own errors: that is what the training after it is for, or
    ``--cross-entropy-weight``, whose part of the loss is the student's own forward pass.

    The loss of a layer is |student - teacher|^2 / |teacher|^2 over the tokens of a batch that are no padding, after the
    output projection: 0 is equal, 1 is what an attention has that answers 0. The loss is the mean over the layers plus
    weight times the cross entropy. Logged: ``distill`` and each layer's ``distill_SITE_LAYER``; in validation, or with
    a weight, ``nll_loss`` and ``ppl`` of the student as it would be used.

    Raises:
        FastWeightError (a ValueError): no teacher, or one of another shape; a student without fast weights;
            PyTorch's DDP, which synchronises only what runs in its own forward pass.
    """

    def __init__(self, task, sentence_avg, label_smoothing, teacher=None, cross_entropy_weight=0.0):
        super().__init__(task, sentence_avg, label_smoothing)
        if not teacher:
            raise FastWeightError("--criterion attention_distillation needs --teacher, a checkpoint")
        if not 0 <= cross_entropy_weight < math.inf:
            raise FastWeightError(
                f"--cross-entropy-weight must be a number of at least 0, got {cross_entropy_weight}"
            )
        self.cross_entropy_weight = cross_entropy_weight
        # in a list, so that it is no part of this module: neither saved nor trained
        self.teachers: List[nn.Module] = [load_model(teacher, task).eval().requires_grad_(False)]

    def forward(self, model, sample, reduce=True):
        """As of every fairseq criterion: (loss, sample size, what is logged)."""
        if "stream_start" in sample["net_input"]:
            raise FastWeightError(
                "attention_distillation reads whole samples: use --task language_modeling for it"
            )
        student = bare(model)
        layers = self.distances(student, sample)
        size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        distilled = torch.stack(list(layers.values())).mean() * size
        loss = distilled
        logged = {f"distill_{name}": x.data * size for name, x in layers.items()}
        if self.cross_entropy_weight > 0 or not model.training:
            entropy, nll = self.compute_loss(model, model(**sample["net_input"]), sample)
            loss = loss + self.cross_entropy_weight * entropy
            logged["nll_loss"] = nll.data
        logged.update(
            loss=loss.data,
            distill=distilled.data,
            ntokens=sample["ntokens"],
            nsentences=sample["target"].size(0),
            sample_size=size,
        )
        return loss, size, logged

    def distances(self, student: nn.Module, sample: dict) -> Dict[str, Tensor]:
        """SITE_LAYER -> how far that attention is from the teacher's on the teacher's inputs, a scalar."""
        attentions = {name: x for name, x in student.named_modules() if isinstance(x, FastWeightAttention)}
        if not attentions:
            raise FastWeightError(
                "attention_distillation: the model has no fast-weight attention (softmax at every site)"
            )
        net_input = sample["net_input"]
        real = {"decoder": sample["target"].ne(self.padding_idx)}
        real["cross"] = real["decoder"]
        if "encoder" in map(site_of, attentions.values()):
            real["encoder"] = net_input["src_tokens"].ne(self.task.source_dictionary.pad())
        calls = self.ask_teacher(list(attentions), net_input, next(student.parameters()))
        found = {}
        for name, attention in attentions.items():
            call, site = calls[name], site_of(attention)
            out, _ = attention(call.query, call.key, call.value, call.padding, need_weights=False)
            tokens = real[site].transpose(0, 1)
            answer = call.out[tokens].float()
            distance = (out[tokens].float() - answer).pow(2).sum()
            found[f"{site}_{layer_of(name)}"] = distance / answer.pow(2).sum().clamp_min(1e-12)
        return found

    @torch.no_grad()
    def ask_teacher(self, names: List[str], net_input: dict, like: Tensor) -> Dict[str, Call]:
        """One pass of the teacher, on the device and in the dtype of ``like``: its calls of these attentions."""
        teacher = self.teachers[0].to(device=like.device, dtype=like.dtype)
        calls: Dict[str, Call] = {}
        with watching(teacher, names, calls):
            teacher(**net_input)
        return calls

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Means over the tokens (or sentences) of all batches."""

        def total(name):
            return sum(log.get(name, 0) for log in logging_outputs)

        size, tokens = total("sample_size"), total("ntokens")
        metrics.log_scalar("loss", total("loss") / size, size, round=4)
        if any("nll_loss" in log for log in logging_outputs):
            metrics.log_scalar("nll_loss", total("nll_loss") / tokens / math.log(2), tokens, round=3)
            metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        names = sorted(
            {name for log in logging_outputs for name in log if name.startswith("distill")}, key=in_order
        )
        for name in names:
            metrics.log_scalar(name, total(name) / size, size, priority=AFTER_FAIRSEQ, round=4)


def in_order(name: str) -> Tuple[str, int]:
    """distill_decoder_10 after distill_decoder_9."""
    site, _, layer = name.rpartition("_")
    return (site, int(layer)) if layer.isdigit() else ("", 0)


@contextmanager
def watching(teacher: nn.Module, names: List[str], calls: Dict[str, Call]) -> Iterator[None]:
    """While this lasts, what the attentions ``names`` of ``teacher`` are given and answer is put into ``calls``."""

    def hook(name: str):
        def keep(module, args, kwargs, result):
            given = {**dict(zip(("query", "key", "value", "key_padding_mask"), args)), **kwargs}
            padding = given.get("key_padding_mask")
            calls[name] = Call(given["query"], given["key"], given["value"], padding, result[0])

        return keep

    known = dict(teacher.named_modules())
    lacking = [name for name in names if name not in known]
    if lacking:
        raise FastWeightError(
            f"--teacher has no attention {lacking[0]} (and {len(lacking) - 1} more): it must have the layers of the "
            "model that is trained"
        )
    handles = [known[name].register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare(model: nn.Module) -> nn.Module:
    """The model in fairseq's wrappers for several processes."""
    while isinstance(model, (ModuleProxyWrapper, LegacyDistributedDataParallel, DistributedDataParallel)):
        if isinstance(model, DistributedDataParallel):
            raise FastWeightError(
                "attention_distillation in several processes needs --ddp-backend legacy_ddp: PyTorch's DDP "
                "synchronises only what runs in its own forward pass"
            )
        model = model.module
    return model
