"""The flags of every fast-weight model, and the checks that need no tensor."""

import argparse
import logging
from dataclasses import dataclass, field, fields
from typing import Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import FastWeightError
from ..modules import FastWeightAttention

logger = logging.getLogger(__name__)

SOFTMAX = "softmax"  # the choice that leaves fairseq's own attention in place
SITES = ("update_rule", "update_rule_encoder", "update_rule_cross")


@dataclass
class FastWeightOptions(FairseqDataclass):
    """Names must not begin with decoder_, encoder_ or quant_noise_: fairseq's TransformerConfig reroutes those.

    Values are checked by the modules, not by argparse choices, so that a mistake is one line wherever the
    option comes from: a flag, a hydra config, --model-overrides or a call from Python.
    """

    update_rule: str = field(
        default="delta",
        metadata={
            "help": "decoder self-attention: softmax, sum, delta, gated-sum, gated-delta, gated-sum-peng; serial in "
            "time, slower: delta-rnn, delta-lstm, recurrent-delta-net; serial in depth: delta-mlp, delta-delta-net"
        },
    )
    update_rule_encoder: str = field(
        default=SOFTMAX, metadata={"help": "encoder self-attention: as --update-rule, but no serial rule"}
    )
    update_rule_cross: str = field(
        default=SOFTMAX, metadata={"help": "cross-attention: as --update-rule, but no serial rule"}
    )
    delta_mlp_depth: int = field(
        default=1, metadata={"help": "feed-forward blocks of the fast network of delta-mlp"}
    )
    feature_map: str = field(
        default="elu", metadata={"help": "elu, relu, dpfp, favor, tanh, identity or softmax"}
    )
    dpfp_nu: int = field(default=1, metadata={"help": "rolls of DPFP: 2 nu head_dim features"})
    favor_features: Optional[int] = field(
        default=None, metadata={"help": "random directions m of FAVOR+: 2 m features"}
    )
    favor_redraw_interval: int = field(
        default=1,
        metadata={"help": "training updates between draws of FAVOR+'s directions, 0: never"},
    )
    favor_stabilizer: bool = field(
        default=False, metadata={"help": "FAVOR+: subtract each token's largest exponent"}
    )
    favor_scale_input: bool = field(
        default=False, metadata={"help": "FAVOR+: scale queries and keys by head_dim^-1/4"}
    )
    key_normalization: str = field(
        default="auto",
        metadata={"help": "of the features of keys and queries: sum, l2, none or auto"},
    )
    attention_normalization: str = field(
        default="auto", metadata={"help": "divide what is read by z . q: true, false or auto"}
    )
    kappa_clamp: bool = field(
        default=False,
        metadata={"help": "attention-normalised delta rule: keep beta |k|^2 / kappa below 2"},
    )
    fast_weight_chunk_size: Optional[int] = field(
        default=None, metadata={"help": "longest chunk of the parallel form"}
    )
    fast_weight_backend: str = field(
        default="auto", metadata={"help": "auto, reference, chunked, numba or cuda"}
    )
    no_projection_bias: bool = field(
        default=False, metadata={"help": "fast-weight attention without biases in its projections"}
    )
    fast_weight_stats: int = field(
        default=0,
        metadata={"help": "log state norms, write strengths, ... every N updates, 0: never"},
    )
    train_only: str = field(
        default="all",
        metadata={"help": "all, or attention: parameters outside of fast-weight attention stay as they are"},
    )


def set_defaults(args) -> None:
    """Fill in every option that ``args`` lacks; architecture functions set theirs before."""
    for option in fields(FastWeightOptions):
        if option.name != "_name":
            setattr(args, option.name, safe_getattr(args, option.name, option.default))


def flat_namespace(args) -> argparse.Namespace:
    """args as a Namespace: fairseq copies options it does not know from no other type (hydra: DictConfig)."""
    if isinstance(args, DictConfig):
        return argparse.Namespace(**OmegaConf.to_container(args))
    return args


def transformer_config(args) -> TransformerConfig:
    """fairseq's config of ``args`` with the options above beside its own."""
    args = flat_namespace(args)
    cfg = TransformerConfig.from_namespace(args)
    for option in fields(FastWeightOptions):
        if option.name != "_name":
            setattr(cfg, option.name, safe_getattr(args, option.name, option.default))
    return cfg


def build_attention(cfg: TransformerConfig, update_rule: str, embed_dim: int, num_heads: int, **site):
    """The fast-weight attention of one site; ``site`` says which."""
    return FastWeightAttention(
        embed_dim,
        num_heads,
        bias=not cfg.no_projection_bias,
        dropout=cfg.attention_dropout,
        q_noise=cfg.quant_noise.pq,
        qn_block_size=cfg.quant_noise.pq_block_size,
        update_rule=update_rule,
        feature_map=cfg.feature_map,
        key_normalization=cfg.key_normalization,
        attention_normalization=cfg.attention_normalization,
        kappa_clamp=cfg.kappa_clamp,
        chunk_size=cfg.fast_weight_chunk_size,
        backend=cfg.fast_weight_backend,
        dpfp_nu=cfg.dpfp_nu,
        favor_features=cfg.favor_features,
        favor_redraw_interval=cfg.favor_redraw_interval,
        favor_stabilizer=cfg.favor_stabilizer,
        favor_scale_input=cfg.favor_scale_input,
        delta_mlp_depth=cfg.delta_mlp_depth,
        **site,
    )


def build_site(cfg: TransformerConfig, site: str) -> FastWeightAttention:
    """The fast-weight attention of ``site``, a name in ``SITES``; its rule must not be softmax."""
    stack = cfg.encoder if site == "update_rule_encoder" else cfg.decoder
    where = {"self_attention": True, "causal": site == "update_rule"}
    if site == "update_rule_cross":
        width = cfg.encoder.embed_dim
        where = {"kdim": width, "vdim": width, "encoder_decoder_attention": True}
    return build_attention(cfg, getattr(cfg, site), stack.embed_dim, stack.attention_heads, **where)


def freeze(model: nn.Module, train_only: str) -> None:
    """With ``train_only`` "attention", parameters outside of fast-weight attention need no gradient any more.

    fairseq's trainer hands the optimizer those that need one, once the model is built.

    Raises:
        FastWeightError (a ValueError): another word than all or attention, or a model without fast weights.
    """
    if train_only == "all":
        return
    if train_only != "attention":
        raise FastWeightError(f"--train-only must be all or attention, got {train_only!r}")
    attentions = [module for module in model.modules() if isinstance(module, FastWeightAttention)]
    if not attentions:
        raise FastWeightError("--train-only attention: the model has no fast-weight attention to train")
    model.requires_grad_(False)
    for attention in attentions:
        attention.requires_grad_(True)


def check_args(args, sites: tuple) -> None:
    """Refuse what fast weights cannot do, before anything is built. ``sites`` are names of rule options."""
    if safe_getattr(args, "train_only", "all") != "all" and safe_getattr(
        args, "checkpoint_activations", False
    ):
        raise FastWeightError(
            "--train-only attention and --checkpoint-activations exclude each other: a layer whose input needs no "
            "gradient would get none"
        )
    rules = [safe_getattr(args, site, SOFTMAX) for site in sites]
    if all(rule == SOFTMAX for rule in rules):
        return
    if safe_getattr(args, "cross_self_attention", False) and rules[0] != SOFTMAX:
        raise FastWeightError(
            "--cross-self-attention attends to source and target in one softmax and has no fast-weight form: "
            "drop it, or use --update-rule softmax"
        )
    if safe_getattr(args, "attention_dropout", 0.0) > 0:
        logger.info("attention dropout has no effect at fast-weight sites: they have no attention weights")
