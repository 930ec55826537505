"""fairseq's transformer with fast weights at the chosen sites: only what builds an attention is overridden."""

from typing import Optional

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from .options import SOFTMAX, build_site


class FastWeightEncoderLayer(TransformerEncoderLayerBase):
    """An encoder layer whose self-attention follows ``cfg.update_rule_encoder``."""

    def build_self_attention(self, embed_dim, cfg):
        if cfg.update_rule_encoder == SOFTMAX:
            return super().build_self_attention(embed_dim, cfg)
        self.can_use_fastpath = False  # 0.12.2: torch's fused encoder layer would bypass a replaced attention
        return build_site(cfg, "update_rule_encoder")


class FastWeightDecoderLayer(TransformerDecoderLayerBase):
    """A decoder layer: self-attention by ``cfg.update_rule``, cross-attention by ``cfg.update_rule_cross``."""

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        if cfg.update_rule == SOFTMAX:
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return build_site(cfg, "update_rule")

    def build_encoder_attention(self, embed_dim, cfg):
        if cfg.update_rule_cross == SOFTMAX:
            return super().build_encoder_attention(embed_dim, cfg)
        return build_site(cfg, "update_rule_cross")


def wrap_layer(layer: nn.Module, cfg) -> nn.Module:
    """What fairseq wraps around each layer it builds: activation checkpointing and FSDP."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    # FSDP must wrap a checkpointed layer whatever its size
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class FastWeightEncoder(TransformerEncoderBase):
    """fairseq's encoder of ``FastWeightEncoderLayer``s."""

    def build_encoder_layer(self, cfg):
        return wrap_layer(FastWeightEncoderLayer(cfg, return_fc=self.return_fc), cfg)


class FastWeightDecoder(TransformerDecoderBase):
    """fairseq's decoder of ``FastWeightDecoderLayer``s."""

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return wrap_layer(FastWeightDecoderLayer(cfg, no_encoder_attn), cfg)


class MaskFreeDecoder(FastWeightDecoder):
    """One whose self-attention is causal by itself, without the (T, T) mask that softmax needs.

    A class of its own, because TorchScript cannot call an overridden method.
    """

    def buffered_future_mask(self, tensor) -> Optional[Tensor]:
        return None


def decoder_class(cfg):
    """The decoder for ``cfg``'s self-attention."""
    return FastWeightDecoder if cfg.update_rule == SOFTMAX else MaskFreeDecoder
