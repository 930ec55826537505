"""Models of a few hundred parameters, built as fairseq's commands build them, and searches in them."""

from argparse import Namespace

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.sequence_generator import SequenceGenerator

import fairseq_fastweights  # noqa: F401  (registers the models)

MAP_OPTIONS = {"dpfp_nu": 2, "favor_features": 6}
SOFTMAX = {"update_rule": "softmax", "update_rule_encoder": "softmax", "update_rule_cross": "softmax"}


def dictionary(words=16):
    """Special symbols and ``words`` words."""
    d = Dictionary()
    for i in range(words):
        d.add_symbol(f"w{i}")
    return d


WORDS = dictionary()
TASK = Namespace(source_dictionary=WORDS, target_dictionary=WORDS)


def build(arch, **options):
    """The model ``arch`` with its architecture's defaults, from a fixed seed."""
    args = Namespace(**options)
    ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(5)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, TASK)


def translation_options(**options):
    """One layer, heads of width 4, no dropout."""
    sizes = {"embed_dim": 12, "ffn_embed_dim": 8, "layers": 1, "attention_heads": 3}
    sides = {f"{side}_{n}": x for side in ("encoder", "decoder") for n, x in sizes.items()}
    return {**sides, "dropout": 0.0, **MAP_OPTIONS, **options}


def translation_model(arch="fast_weight_transformer", **options):
    return build(arch, **translation_options(**options))


def lm_model(arch="fast_weight_lm", **options):
    """fairseq's command line fills in a language model's defaults from its dataclass; so do we."""
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from omegaconf import OmegaConf

    sizes = {"embed_dim": 12, "ffn_embed_dim": 8, "layers": 1, "attention_heads": 3}
    args = Namespace(**{f"decoder_{n}": x for n, x in sizes.items()}, dropout=0.0, tokens_per_sample=64)
    for name, value in {**MAP_OPTIONS, **options}.items():
        setattr(args, name, value)
    if arch in ("fast_weight_lm", "transformer_lm"):
        config = OmegaConf.structured(MODEL_DATACLASS_REGISTRY[arch])
        known = [name for name in vars(args) if name in config]
        args = OmegaConf.merge(config, {name: getattr(args, name) for name in known})
        args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim
        args.max_target_positions = 64
    else:
        ARCH_CONFIG_REGISTRY[arch](args)
    torch.manual_seed(5)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, TASK)


def lively(model, seed=7):
    """In float64, with weights so large that hypotheses differ, and an end of sentence that is likely."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    decoder = model.decoder
    if decoder.adaptive_softmax is None:
        towards_end = decoder.output_projection.weight[WORDS.eos()].detach()
        last_norm = decoder.layer_norm or decoder.layers[-1].final_layer_norm
        last_norm.bias.data = towards_end / towards_end.norm()
    return model.double().eval()


def source_batch(lengths=(6, 2, 4, 1), left_pad=True):
    """Random sentences with their eos, left-padded as fairseq pads sources."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for length in lengths:
        words = torch.randint(WORDS.nspecial, len(WORDS), (length,), generator=generator)
        rows.append(torch.cat([words, torch.tensor([WORDS.eos()])]))
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), WORDS.pad())
    for b, row in enumerate(rows):
        tokens[b, longest - len(row) :] = row
        if not left_pad:
            tokens[b] = tokens[b].roll(len(row) - longest)
    return tokens, torch.tensor([len(row) for row in rows])


def single(tokens):
    """The sentences of a batch as batches of one, without padding."""
    for row in tokens:
        row = row[row != WORDS.pad()][None]
        yield row, torch.tensor([row.shape[1]])


def search(model, net_input, beam=4, **options):
    """fairseq's beam search; every hypothesis has at most 9 words."""
    generator = SequenceGenerator([model], WORDS, beam_size=beam, max_len_b=9, max_len_a=0)
    return generator.generate([model], {"net_input": net_input}, **options)


def translate(model, tokens, lengths, **options):
    return search(model, {"src_tokens": tokens, "src_lengths": lengths}, **options)


def teacher_forced_scores(model, hypothesis, *source):
    """Log-probabilities of the words of one hypothesis by one forward pass over all of them."""
    tokens = hypothesis["tokens"]
    previous = torch.cat([torch.tensor([WORDS.eos()]), tokens[:-1]])[None]
    with torch.no_grad():
        logits = model(*source, previous)[0]
    return utils.log_softmax(logits[0], dim=-1).gather(1, tokens[:, None])[:, 0]
