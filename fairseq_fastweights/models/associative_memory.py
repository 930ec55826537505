"""The model of the paper's synthetic experiments: one head, one-hot values, no output projection."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass, field, fields
from typing import Callable, Dict, Optional

import torch
import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ..errors import FastWeightError
from ..feature_maps import build_feature_map, normalize, options_of
from ..ops import delta_rule
from ..ops.norm_clipped import norm_clipped_write
from .options import SOFTMAX

EPS = 1e-6  # of the authors' synthetic code; their language model has 1e-5
UNSET_LR = 0.0  # stands for the authors' rate: fairseq takes no None here
EVALUATION_DRAWS = 10**9  # FAVOR+'s draws at evaluation are numbered from here


@dataclass
class AssociativeMemoryOptions(FairseqDataclass):
    update_rule: str = field(default="sum", metadata={"help": "sum, delta, fwm or softmax"})
    feature_map: str = field(default="elu", metadata={"help": "elu, favor, dpfp, tanh, ..."})
    dpfp_nu: int = field(default=1, metadata={"help": "rolls of DPFP: 2 nu key_dim features"})
    favor_features: Optional[int] = field(
        default=None, metadata={"help": "random directions m of FAVOR+: 2 m features"}
    )
    key_dim: int = field(default=64, metadata={"help": "width of keys and queries before the feature map"})


def softmax_memory(q: Tensor, k: Tensor, v: Tensor, beta: Optional[Tensor]) -> Tensor:
    """softmax(K q / sqrt(d)) over the keys, no fast weights."""
    weights = (torch.einsum("bld,bd->bl", k, q) * k.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bl,blv->bv", weights, v)


def sum_memory(q: Tensor, k: Tensor, v: Tensor, beta: Optional[Tensor]) -> Tensor:
    """y = W q / (z . q + eps) with W = sum v k^T, read once: as sum v (k . q), W need not be built."""
    read = torch.einsum("bld,bd->bl", k, q)
    return torch.einsum("bl,blv->bv", read, v) / (read.sum(-1, keepdim=True) + EPS)


def delta_memory(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule with sum-normalised keys and query."""
    k = normalize(k, "sum")
    q = q / (q.sum(-1, keepdim=True) + EPS)
    _, state = delta_rule(None, k[:, None], v[:, None], beta[:, None])  # (B, 1, dk, dv)
    return torch.einsum("bd,bdv->bv", q, state[:, 0])


def fwm_memory(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule of Schlag et al. (2021), its memory kept within norm 1; what is read is layer-normalised."""
    state = norm_clipped_write(k[:, None], v[:, None], beta[:, None])[:, 0]  # (B, dk, dv)
    read = torch.einsum("bd,bdv->bv", q, state)
    return F.layer_norm(read, read.shape[-1:])


# rule: (q (B, dk), k (B, L, dk), v (B, L, dv), beta (B, L)) -> (B, dv)
MEMORIES: Dict[str, Callable[..., Tensor]] = {
    SOFTMAX: softmax_memory,
    "sum": sum_memory,
    "delta": delta_memory,
    "fwm": fwm_memory,
}


@register_model("associative_memory")
class AssociativeMemory(BaseFairseqModel):
    """k = W_k [v; e(key)], q = W_q e(query), beta = sigmoid(W_b [v; e(key)]), v one-hot; then a rule of ``MEMORIES``.

    Parameters are drawn in the order of the authors' code, with what that code draws and does not use.
    """

    @classmethod
    def add_args(cls, parser):
        gen_parser_from_dataclass(parser, AssociativeMemoryOptions(), delete_default=True)

    @classmethod
    def build_model(cls, args, task):
        if not hasattr(task.cfg, "num_keys"):
            raise FastWeightError("--arch associative_memory needs --task associative_retrieval")
        return cls(task.cfg.num_keys, args)

    def __init__(self, num_keys: int, args):
        super().__init__()
        rule = args.update_rule
        if rule not in MEMORIES:
            raise FastWeightError(f"--update-rule must be one of {', '.join(MEMORIES)} here, got {rule!r}")
        self.num_keys = num_keys
        self.memory = MEMORIES[rule]
        width, d = int(2 * num_keys * 1.1), args.key_dim
        self.draw_projections(num_keys, width, d, rule)
        self.phi = None
        if rule != SOFTMAX:
            # (drawn below, for every batch)
            options = options_of(args.feature_map, {**vars(args), "favor_redraw_interval": 0})
            self.phi = build_feature_map(args.feature_map, d, **options)
            if self.phi.signed and rule != "fwm":
                raise FastWeightError(
                    f"feature map {args.feature_map} has negative features, and the {rule} rule divides by their sum: "
                    "use it with --update-rule fwm"
                )
            self.phi.eps = 0.0  # FAVOR+'s; the authors' synthetic code adds nothing
        self.updates, self.evaluations = 0, 0

    def draw_projections(self, num_keys: int, width: int, d: int, rule: str) -> None:
        """The parameters, in the authors' order."""
        nn.Embedding(num_keys, num_keys)  # theirs of the values, then set to the identity
        self.embed_keys = nn.Embedding(2 * num_keys, width)
        self.k_proj = nn.Linear(width + num_keys, d)
        v_proj = nn.Linear(width + num_keys, d)  # not used
        self.q_proj = nn.Linear(width, d)
        self.beta_proj = None
        if rule != SOFTMAX:
            nn.Linear(width + num_keys, d)  # a "forget key", not used
            self.beta_proj = nn.Linear(width + num_keys, 1)
        nn.init.normal_(self.embed_keys.weight)
        nn.init.xavier_uniform_(v_proj.weight)
        for projection in (self.k_proj, self.q_proj):
            if rule == SOFTMAX:
                nn.init.xavier_uniform_(projection.weight)
            else:
                nn.init.uniform_(projection.weight, -(d**-0.5), d**-0.5)

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        """keys, values (B, L) and query (B,), numbers below num_keys -> (B, num_keys), the value read."""
        one_hot = torch.eye(self.num_keys, dtype=self.k_proj.weight.dtype, device=values.device)
        v = one_hot[values]  # (B, L, num_keys)
        k, q = self.of_pairs(self.k_proj, keys, values), self.q_proj(self.embed_keys(query))
        if self.phi is None:
            return self.memory(q, k, v, None)
        self.redraw()
        beta = self.of_pairs(self.beta_proj, keys, values).squeeze(-1).sigmoid()  # (B, L)
        return self.memory(self.phi(q), self.phi(k), v, beta)

    def of_pairs(self, projection: nn.Linear, keys: Tensor, values: Tensor) -> Tensor:
        """projection([v; e(key)]) -> (B, L, its width). Every key and value is projected once, then looked up."""
        of_value, of_key = projection.weight.split([self.num_keys, self.embed_keys.embedding_dim], dim=1)
        by_key = F.linear(self.embed_keys.weight, of_key, projection.bias)  # (2 num_keys, width)
        return F.embedding(values, of_value.t()) + F.embedding(keys, by_key)

    def redraw(self) -> None:
        """FAVOR+ has new directions for every batch, at evaluation too, as in the authors' synthetic code."""
        if not hasattr(self.phi, "redraw"):
            return
        if self.training:
            self.phi.redraw(self.updates)
        else:
            self.phi.redraw(EVALUATION_DRAWS + 1000 * self.updates + self.evaluations)
            self.evaluations += 1

    def set_num_updates(self, num_updates):
        super().set_num_updates(num_updates)
        self.updates, self.evaluations = num_updates, 0

    def max_positions(self):
        return None


@register_model_architecture("associative_memory", "associative_memory")
def associative_memory(args):
    """The authors' settings. The fwm rule with tanh features does not learn with the others' rate and batches."""
    for option in fields(AssociativeMemoryOptions):
        if option.name != "_name":
            setattr(args, option.name, safe_getattr(args, option.name, option.default))
    slow = (args.update_rule, args.feature_map) == ("fwm", "tanh")
    args.batch_size = args.batch_size or (128 if slow else 32)
    args.batch_size_valid = args.batch_size_valid or args.batch_size
    if args.lr == [UNSET_LR]:
        args.lr = [1e-4 if slow else 1e-3]
    if not args.save_dir:
        args.no_save, args.save_dir = True, passing_folder()


def passing_folder() -> str:
    """An empty folder while this process lives: fairseq makes --save-dir and tries it even with --no-save."""
    folder = tempfile.mkdtemp(prefix="fairseq-not-saved-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
