"""Language modelling: fairseq's transformer_lm with fast weights in place of its self-attention."""

from dataclasses import dataclass, field

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
)
from fairseq.utils import safe_getattr
from torch import nn

from ..errors import FastWeightError
from ..modules.biased_softmax import WordScores, tie_with_biases
from ..modules.stats import attach_stats
from ..update_rules import Decay
from .layers import MaskFreeDecoder
from .loading import ClearLoading
from .options import SOFTMAX, FastWeightOptions, check_args, freeze, set_defaults, transformer_config
from .streams import CarriesStates


@dataclass
class FastWeightLanguageModelConfig(TransformerLanguageModelConfig, FastWeightOptions):
    """transformer_lm's options and ours. The encoder's and cross-attention's rules are not used."""

    biased_adaptive_softmax: bool = field(
        default=False,
        metadata={
            "help": "tie adaptive input and softmax as the paper's models do: no projections of the bands, "
            "and a bias for every word and cluster"
        },
    )
    initial_std: float = field(
        default=0.0,
        metadata={
            "help": "draw matrices and embeddings from N(0, std^2), norms' weights from N(1, std^2), as the paper's "
            "models do with 0.02; 0: as fairseq does"
        },
    )


@register_model("fast_weight_lm", dataclass=FastWeightLanguageModelConfig)
class FastWeightLanguageModel(ClearLoading, CarriesStates, TransformerLanguageModel):
    """With --update-rule softmax this is fairseq's transformer_lm: same parameters, same outputs.
    (But for --biased-adaptive-softmax.)

    A text can be read in segments whose states are carried: see ``CarriesStates``.
    """

    @classmethod
    def build_model(cls, args, task):
        """fairseq's model, its decoder rebuilt around the same embeddings unless its attention is softmax."""
        check_args(args, ("update_rule",))
        model = super().build_model(args, task)
        if args.update_rule != SOFTMAX:
            cfg, embed_tokens = transformer_config(args), model.decoder.embed_tokens
            model = cls(MaskFreeDecoder(cfg, task.target_dictionary, embed_tokens, no_encoder_attn=True))
        if safe_getattr(args, "biased_adaptive_softmax", False):
            tie_with_biases(model.decoder.embed_tokens, model.decoder.adaptive_softmax)
        redraw(model, safe_getattr(args, "initial_std", 0.0))
        attach_stats(model, safe_getattr(args, "fast_weight_stats", 0))
        freeze(model, safe_getattr(args, "train_only", "all"))
        return model


def redraw(model: nn.Module, std: float) -> None:
    """Draw matrices and embeddings from N(0, std^2), weights of norms from N(1, std^2); biases and padding are 0.

    Decays and parameters of other modules stay as they are; with ``std`` 0 all do.

    Raises:
        FastWeightError (a ValueError): std is negative.
    """
    if std < 0:
        raise FastWeightError(f"--initial-std must be at least 0, got {std}")
    if std == 0:
        return
    decays = {module.proj for module in model.modules() if isinstance(module, Decay)}
    for module in model.modules():
        if module in decays:  # begin with memories of many tokens
            continue
        if isinstance(module, (nn.Linear, nn.Embedding, WordScores)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=std)
        else:
            continue
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():  # last: tied matrices are drawn twice
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


# "fast_weight_lm" itself is registered as an architecture by register_model


@register_model_architecture("fast_weight_lm", "fast_weight_lm_tiny")
def fast_weight_lm_tiny(args):
    """2 layers of width 64, for trials."""
    args.decoder_embed_dim = safe_getattr(args, "decoder_embed_dim", 64)
    args.decoder_ffn_embed_dim = safe_getattr(args, "decoder_ffn_embed_dim", 128)
    args.decoder_layers = safe_getattr(args, "decoder_layers", 2)
    args.decoder_attention_heads = safe_getattr(args, "decoder_attention_heads", 4)
    set_defaults(args)
    base_lm_architecture(args)


def _wikitext103(args, width: int) -> None:
    """The paper's WikiText-103 models: 16 post-norm layers of 8 heads, one tied embedding, no attention biases.

    The authors' code has one dropout rate: of the embeddings, after every sublayer, inside the feed-forward layers
    and of what the adaptive softmax reads.
    """
    args.decoder_embed_dim = safe_getattr(args, "decoder_embed_dim", width)
    args.decoder_input_dim = safe_getattr(args, "decoder_input_dim", args.decoder_embed_dim)
    args.decoder_output_dim = safe_getattr(args, "decoder_output_dim", args.decoder_embed_dim)
    args.decoder_ffn_embed_dim = safe_getattr(args, "decoder_ffn_embed_dim", 2048)
    args.decoder_layers = safe_getattr(args, "decoder_layers", 16)
    args.decoder_attention_heads = safe_getattr(args, "decoder_attention_heads", 8)
    args.dropout = safe_getattr(args, "dropout", 0.1)
    args.activation_dropout = safe_getattr(args, "activation_dropout", args.dropout)
    args.adaptive_softmax_dropout = safe_getattr(args, "adaptive_softmax_dropout", args.dropout)
    args.adaptive_input = safe_getattr(args, "adaptive_input", True)
    args.adaptive_input_factor = safe_getattr(args, "adaptive_input_factor", 1)
    args.adaptive_softmax_factor = safe_getattr(args, "adaptive_softmax_factor", 1)
    args.adaptive_input_cutoff = safe_getattr(args, "adaptive_input_cutoff", "20000,40000,200000")
    args.adaptive_softmax_cutoff = safe_getattr(args, "adaptive_softmax_cutoff", "20000,40000,200000")
    args.initial_std = safe_getattr(args, "initial_std", 0.02)
    args.biased_adaptive_softmax = safe_getattr(args, "biased_adaptive_softmax", True)
    args.tie_adaptive_weights = safe_getattr(args, "tie_adaptive_weights", True)
    args.tie_adaptive_proj = safe_getattr(args, "tie_adaptive_proj", True)
    args.no_projection_bias = safe_getattr(args, "no_projection_bias", True)
    pre_norm = safe_getattr(args, "decoder_normalize_before", False)
    set_defaults(args)
    base_lm_architecture(args)
    args.decoder_normalize_before = pre_norm  # base_lm_architecture turns it on


@register_model_architecture("fast_weight_lm", "fast_weight_lm_wt103_small")
def fast_weight_lm_wt103_small(args):
    """Width 128, heads of 16; segments of 256 in the paper."""
    _wikitext103(args, 128)


@register_model_architecture("fast_weight_lm", "fast_weight_lm_wt103_medium")
def fast_weight_lm_wt103_medium(args):
    """Width 256, heads of 32; segments of 384 in the paper."""
    _wikitext103(args, 256)
