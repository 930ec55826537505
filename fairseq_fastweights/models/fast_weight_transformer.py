"""Translation: fairseq's transformer with fast weights in decoder self-, encoder self- or cross-attention."""

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerModel,
    base_architecture,
    tiny_architecture,
    transformer_iwslt_de_en,
    transformer_vaswani_wmt_en_de_big,
    transformer_wmt_en_de,
)
from fairseq.utils import safe_getattr

from ..errors import FastWeightError
from ..modules import FastWeightAttention
from ..modules.stats import attach_stats
from .layers import FastWeightEncoder, decoder_class
from .loading import ClearLoading
from .options import (
    SITES,
    SOFTMAX,
    FastWeightOptions,
    check_args,
    flat_namespace,
    freeze,
    set_defaults,
    transformer_config,
)


@register_model("fast_weight_transformer")
class FastWeightTransformerModel(ClearLoading, TransformerModel):
    """With softmax at all three sites this is fairseq's transformer: same parameters, same outputs."""

    @classmethod
    def add_args(cls, parser):
        """fairseq's flags and ours, without defaults, which architectures set."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, FastWeightOptions(), delete_default=True)

    @classmethod
    def build_model(cls, args, task):
        """Refuse what cannot work, then let fairseq build."""
        args = flat_namespace(args)
        set_defaults(args)
        check_args(args, SITES)
        model = super().build_model(args, task)
        attach_stats(model, args.fast_weight_stats)
        freeze(model, args.train_only)
        return model

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        return FastWeightEncoder(transformer_config(args), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        cfg = transformer_config(args)
        return decoder_class(cfg)(
            cfg,
            tgt_dict,
            embed_tokens,
            no_encoder_attn=safe_getattr(cfg, "no_cross_attention", False),
        )

    def prepare_for_inference_(self, cfg):
        """Called by fairseq-generate and -interactive before they start."""
        if cfg.generation.print_alignment and self.cfg.update_rule_cross != SOFTMAX:
            raise FastWeightError(
                "--print-alignment needs attention weights, and fast-weight cross-attention has none: "
                "drop it, or train with --update-rule-cross softmax"
            )
        super().prepare_for_inference_(cfg)

    def set_beam_size(self, beam_size: int) -> None:
        """Called by the sequence generator: beams of a sentence share its cross-attention state."""
        for module in self.modules():
            if isinstance(module, FastWeightAttention):
                module.set_beam_size(beam_size)


def _architecture(name: str, fairseq_architecture):
    """Register ``name``: a fairseq architecture with our defaults."""

    def architecture(args):
        set_defaults(args)
        fairseq_architecture(args)

    register_model_architecture("fast_weight_transformer", name)(architecture)


_architecture("fast_weight_transformer", base_architecture)
_architecture("fast_weight_transformer_tiny", tiny_architecture)
_architecture("fast_weight_transformer_iwslt_de_en", transformer_iwslt_de_en)
_architecture("fast_weight_transformer_wmt_en_de", transformer_wmt_en_de)
_architecture("fast_weight_transformer_vaswani_wmt_en_de_big", transformer_vaswani_wmt_en_de_big)
