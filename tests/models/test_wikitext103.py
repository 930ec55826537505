"""The wt103 architectures: the authors' WikiText-103 models, and every difference that fairseq leaves, counted."""

import math
import re
from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.modules import MultiheadAttention
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler.cosine_lr_scheduler import CosineLRSchedule
from tiny_models import build

from fairseq_fastweights.errors import FastWeightError

TYPES = 267_735  # of the training text, with <eos> and <unk>
LAYERS, HEADS, FFN, BANDS = 16, 8, 2048, 4  # words up to 20k, 40k, 200k and the rest
WIDTHS = {"small": 128, "medium": 256}
# parameters of the authors' models; the medium ones are the 89.8 M and 89.9 M of the paper's table 4
PAPER = {
    ("small", "sum"): 44_018_394,
    ("small", "delta"): 44_034_778,
    ("medium", "sum"): 89_833_434,
    ("medium", "delta"): 89_866_202,
}


def differences(width: int, rule: str) -> dict[str, int]:
    """What our models have more than the authors', by part."""
    parts = {"embeddings of fairseq's <s> and <pad>": 2 * width, "biases of these two words": 2}
    if rule == "softmax":
        parts["fairseq's MultiheadAttention: biases of q, k, v and the output"] = LAYERS * 4 * width
    return parts


def authors_parameters(width: int, rule: str) -> dict[str, int]:
    """The authors' models by part, from the shapes in their code; softmax has the sum rule's."""
    gates = HEADS * width if rule == "delta" else 0
    return {
        "embeddings": TYPES * width,
        "word and cluster biases": TYPES + BANDS - 1,
        "cluster weights": (BANDS - 1) * width,
        "attention": LAYERS * (4 * width**2 + gates),
        "feed-forward": LAYERS * (2 * width * FFN + FFN + width),
        "layer norms": LAYERS * 2 * 2 * width,
    }


OURS = {  # part of a parameter's name -> the part of the model
    r"embed_tokens\.embeddings\.\d\.0\.": "embeddings",
    r"adaptive_softmax\..*bias$": "word and cluster biases",
    r"adaptive_softmax\.head\.class_proj\.weight": "cluster weights",
    r"self_attn\.": "attention",
    r"\.fc[12]\.": "feed-forward",
    r"layer_norm\.": "layer norms",
}


@pytest.fixture(scope="module")
def words() -> Dictionary:
    """As many words as fairseq-preprocess --padding-factor 1 finds: <eos> and <unk> are fairseq's symbols."""
    dictionary = Dictionary()
    for i in range(TYPES - 2):
        dictionary.add_symbol(f"w{i}")
    assert len(dictionary) == TYPES + 2
    return dictionary


def full_model(words, size, rule):
    """The model with the full vocabulary, without memory for its parameters."""
    args = Namespace(update_rule=rule, tokens_per_sample=256)
    ARCH_CONFIG_REGISTRY[f"fast_weight_lm_wt103_{size}"](args)
    task = Namespace(source_dictionary=words, target_dictionary=words)
    with torch.device("meta"):
        return ARCH_MODEL_REGISTRY[f"fast_weight_lm_wt103_{size}"].build_model(args, task)


def parameters_by_part(model) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        (part,) = [part for pattern, part in OURS.items() if re.search(pattern, name)]
        found[part] = found.get(part, 0) + parameter.numel()
    return found


@pytest.mark.parametrize("size, rule", PAPER)
def test_the_authors_shapes_give_the_papers_numbers(size, rule):
    assert sum(authors_parameters(WIDTHS[size], rule).values()) == PAPER[size, rule]


@pytest.mark.parametrize("rule", ["sum", "delta", "softmax"])
@pytest.mark.parametrize("size", WIDTHS)
def test_parameters_differ_from_the_papers_by_the_listed_parts_only(words, size, rule):
    width = WIDTHS[size]
    model = full_model(words, size, rule)
    listed = differences(width, rule)
    papers = PAPER[size, "delta" if rule == "delta" else "sum"]
    assert sum(p.numel() for p in model.parameters()) == papers + sum(listed.values())

    expected = authors_parameters(width, rule)
    expected["embeddings"] += listed["embeddings of fairseq's <s> and <pad>"]
    expected["word and cluster biases"] += listed["biases of these two words"]
    expected["attention"] += sum(n for part, n in listed.items() if "MultiheadAttention" in part)
    assert parameters_by_part(model) == expected


# at a toy vocabulary: four bands of the 20 symbols of tiny_models.WORDS
TOY = {"adaptive_input_cutoff": "6,9,14", "adaptive_softmax_cutoff": "6,9,14", "tokens_per_sample": 12}
KINDS = {  # of the paper: the options that make each of the architecture
    "Transformer": {"update_rule": "softmax"},
    "Linear Transformer": {"update_rule": "sum"},
    "Delta Network": {},
    "Performer, sum": {"update_rule": "sum", "feature_map": "favor", "favor_features": 8},
    "Performer, delta": {"feature_map": "favor", "favor_features": 8},
    "DPFP, sum": {"update_rule": "sum", "feature_map": "dpfp"},
    "DPFP, delta": {"feature_map": "dpfp"},
}
TOKENS = torch.randint(4, 20, (2, 12), generator=torch.Generator().manual_seed(1))


def toy(size="small", **options):
    """Of one layer, where the depth is not asked for."""
    return build(f"fast_weight_lm_wt103_{size}", **{**TOY, "decoder_layers": 1, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", WIDTHS)
def test_every_model_of_the_paper_trains(size, kind):
    model = toy(size, decoder_layers=LAYERS, **KINDS[kind]).train()
    decoder = model.decoder
    logits, targets = decoder.adaptive_softmax(model(TOKENS)[0], TOKENS.roll(-1, 1))
    loss = sum(
        torch.nn.functional.cross_entropy(x, target, reduction="sum")
        for x, target in zip(logits, targets, strict=True)
        if target is not None
    )
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        # a key's bias moves every score of a query alike
        no_effect = kind == "Transformer" and name.endswith("k_proj.bias")
        assert parameter.grad.isfinite().all(), name
        assert no_effect or parameter.grad.abs().max() > 0, name
    attention = decoder.layers[0].self_attn
    assert attention.num_heads == HEADS and attention.head_dim == WIDTHS[size] // HEADS


@pytest.mark.parametrize(
    "kind, keys, normalized",
    [
        ("Linear Transformer", "none", True),
        ("Delta Network", "sum", False),
        ("Performer, delta", "sum", False),
    ],
)
def test_normalisation_is_the_papers(kind, keys, normalized):
    attention = toy(**KINDS[kind]).decoder.layers[0].self_attn
    assert attention.key_normalization == keys
    assert attention.normalized is normalized
    assert attention.scaling == attention.head_dim**-0.5


def test_transformer_is_fairseqs():
    assert type(toy(**KINDS["Transformer"]).decoder.layers[0].self_attn) is MultiheadAttention


def test_post_norm_without_a_last_norm_and_without_one_of_the_embeddings():
    decoder = toy().decoder
    assert decoder.layer_norm is None and decoder.layernorm_embedding is None
    assert not any(layer.normalize_before for layer in decoder.layers)
    assert decoder.project_in_dim is None and decoder.project_out_dim is None
    assert decoder.adaptive_softmax.cutoff == [6, 9, 14, 20]


def test_one_rate_drops_at_every_place_of_the_authors():
    decoder = toy(dropout=0.25).decoder
    layer = decoder.layers[0]
    places = [decoder.dropout_module, layer.dropout_module, layer.activation_dropout_module]
    places.append(decoder.adaptive_softmax.dropout_module)
    assert [place.p for place in places] == [0.25] * 4
    assert toy(dropout=0.25, activation_dropout=0.5).decoder.layers[0].activation_dropout_module.p == 0.5
    assert toy().decoder.dropout_module.p == toy().decoder.adaptive_softmax.dropout_module.p == 0.1


@pytest.mark.parametrize("without", [False, True])
def test_embeddings_are_scaled_and_positions_are_added_unless_turned_off(without):
    decoder = toy(no_token_positional_embeddings=without).decoder.eval()
    embedded = math.sqrt(128) * decoder.embed_tokens(TOKENS)
    if not without:
        width, first = 64, 2  # sines, then cosines; fairseq counts from padding_idx + 1
        rates = torch.exp(-math.log(10000) * torch.arange(width) / (width - 1))
        angles = torch.arange(first, first + 12)[:, None] * rates
        embedded = embedded + torch.cat([angles.sin(), angles.cos()], dim=1)
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    decoder(TOKENS)
    torch.testing.assert_close(seen[0].transpose(0, 1), embedded, rtol=1e-5, atol=1e-5)


def test_one_embedding_matrix_for_input_and_output_and_no_projections():
    decoder = toy().decoder
    softmax, bands = decoder.adaptive_softmax, decoder.embed_tokens.embeddings
    for band, scores in zip(bands, [softmax.head.word_proj, *softmax.tail], strict=True):
        assert band[0].weight is scores.weight
    matrix = torch.cat([band[0].weight for band in bands])
    assert torch.equal(decoder.embed_tokens(TOKENS), matrix[TOKENS])


def test_log_probabilities_are_the_authors():
    """A word's is e . x + b in its band, beside the band's own w . x + b among the words of the first."""
    softmax = toy().decoder.adaptive_softmax.double()
    for name, parameter in softmax.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        assert name.endswith(("weight", "bias"))
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    scores = [x @ band.weight.t() + band.bias for band in (softmax.head.word_proj, *softmax.tail)]
    clusters = x @ softmax.head.class_proj.weight.t() + softmax.head.class_proj.bias
    first = torch.cat([scores[0], clusters], -1).log_softmax(-1)
    expected = [first[..., :6]]
    for band, words in enumerate(scores[1:]):
        expected.append(words.log_softmax(-1) + first[..., 6 + band, None])
    torch.testing.assert_close(
        softmax.eval().get_log_prob(x, None), torch.cat(expected, -1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"adaptive_input": False, "tie_adaptive_weights": False}, "needs --adaptive-input"),
        ({"tie_adaptive_weights": False}, "needs --adaptive-input"),
        ({"adaptive_input_factor": 2, "adaptive_softmax_factor": 2}, "all bands as wide as .* 128, got"),
    ],
)
def test_what_cannot_be_tied_is_refused_in_one_line(options, said):
    with pytest.raises(FastWeightError, match=f"^--biased-adaptive-softmax .*{said}"):
        toy(**options)


def test_fairseqs_adaptive_softmax_is_a_flag_away():
    softmax = toy(biased_adaptive_softmax=False).decoder.adaptive_softmax
    assert [type(softmax.head).__name__, type(softmax.tail[0]).__name__] == ["TiedHeadModule", "Sequential"]


def test_initial_values_are_the_authors():
    """Everything from N(0, 0.02^2), weights of norms around 1, biases 0; and the padding's embedding is 0."""
    model = toy("medium", decoder_layers=4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        centre = 1.0 if "layer_norm" in name else 0.0
        is_zero = (parameter == 0).view(len(parameter), -1).all(-1)  # row by row
        padding = [model.decoder.padding_idx] if "embeddings.0" in name else []
        assert is_zero.nonzero().flatten().tolist() == padding, name
        drawn = parameter[~is_zero]
        error = 6 / drawn.numel() ** 0.5  # six deviations of the mean and more of the deviation
        assert abs(drawn.mean().item() - centre) < 0.02 * error, name
        assert abs(drawn.std().item() / 0.02 - 1) < error, name


def test_decays_keep_their_own_initial_values():
    decays = [
        {
            n: p
            for n, p in toy(update_rule="gated-delta", initial_std=std).named_parameters()
            if ".decay." in n
        }
        for std in (0.0, 0.02)
    ]
    assert decays[0] and all(torch.equal(p, decays[1][name]) for name, p in decays[0].items())


def test_other_initial_values_are_flags_away():
    fairseqs = toy(initial_std=0.0).decoder
    assert (fairseqs.layers[0].final_layer_norm.weight == 1).all()
    assert fairseqs.embed_tokens.embeddings[1][0].weight.std() > 0.05
    assert toy(initial_std=0.1).decoder.layers[0].fc1.weight.std().item() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(FastWeightError, match="--initial-std must be at least 0, got -1"):
        toy(initial_std=-1.0)


class NoOptimizer(FairseqOptimizer):
    """Takes any learning rate."""

    def __init__(self):
        pass

    def set_lr(self, lr):
        pass


@pytest.mark.parametrize("updates", [500_000, 400_000])
def test_learning_rate_is_the_authors_within_half_a_percent_of_its_peak(updates):
    """They step onto a cosine that began at update 0, fairseq's begins at the end of the warm-up."""
    peak, warmup = 2.5e-4, 2000
    cfg = Namespace(lr=[peak], min_lr=0.0, warmup_init_lr=-1, warmup_updates=warmup, t_mult=1.0)
    cfg.lr_period_updates, cfg.lr_shrink, cfg.max_update = -1, 0.1, updates
    schedule = CosineLRSchedule(cfg, NoOptimizer())
    worst = 0.0
    for update in [*range(0, warmup, 100), *range(warmup, updates, 1000)]:
        theirs = peak / 2 * (1 + math.cos(math.pi * update / updates))
        if update < warmup:
            theirs = peak * update / warmup
        worst = max(worst, abs(schedule.step_update(update) - theirs) / peak)
    assert worst < 0.005
