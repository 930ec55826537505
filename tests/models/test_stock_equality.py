"""With softmax at every site the models are fairseq's own, to the bit; at one site, that site is fairseq's own."""

import pytest
import torch
from fairseq.modules import MultiheadAttention
from tiny_models import SOFTMAX, WORDS, lm_model, source_batch, translation_model

from fairseq_fastweights.modules import FastWeightAttention

TRANSLATION = [
    ("fast_weight_transformer", "transformer"),
    ("fast_weight_transformer_tiny", "transformer_tiny"),
    ("fast_weight_transformer_iwslt_de_en", "transformer_iwslt_de_en"),
    ("fast_weight_transformer_wmt_en_de", "transformer_wmt_en_de"),
    ("fast_weight_transformer_vaswani_wmt_en_de_big", "transformer_vaswani_wmt_en_de_big"),
]
ATTENTIONS = {
    "update_rule": lambda model: model.decoder.layers[0].self_attn,
    "update_rule_encoder": lambda model: model.encoder.layers[0].self_attn,
    "update_rule_cross": lambda model: model.decoder.layers[0].encoder_attn,
}


def assert_same_parameters(ours, stock):
    expected = stock.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(x, expected[name]) for name, x in ours.state_dict().items())


def translation_input():
    tokens, lengths = source_batch()
    target, _ = source_batch(lengths=(3, 5, 1, 4), left_pad=False)
    return tokens, lengths, target.roll(1, 1)


@pytest.mark.parametrize("ours, stock", TRANSLATION, ids=[stock for _, stock in TRANSLATION])
def test_softmax_translation_is_fairseq_s_transformer(ours, stock):
    ours, stock = translation_model(ours, **SOFTMAX), translation_model(stock)
    assert_same_parameters(ours, stock)
    for train in (False, True):  # dropout too draws the same numbers
        outs = []
        for model in (ours, stock):
            torch.manual_seed(2)
            outs.append(model.train(train)(*translation_input())[0])
        assert torch.equal(*outs)


def test_softmax_translation_has_fairseq_s_gradients():
    grads = []
    for arch, rules in (("fast_weight_transformer", SOFTMAX), ("transformer", {})):
        model = translation_model(arch, dropout=0.3, **rules)
        torch.manual_seed(2)
        model.train()(*translation_input())[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_softmax_language_model_is_fairseq_s():
    ours, stock = lm_model(update_rule="softmax"), lm_model("transformer_lm")
    assert_same_parameters(ours, stock)
    tokens, _ = source_batch(left_pad=False)
    assert torch.equal(ours.eval()(tokens)[0], stock.eval()(tokens)[0])


@pytest.mark.parametrize("site", SOFTMAX)
def test_softmax_at_one_site_is_fairseq_s_class_there(site):
    others = {name: "delta" for name in SOFTMAX if name != site}
    model = translation_model(**others, **{site: "softmax"})
    assert type(ATTENTIONS[site](model)) is MultiheadAttention
    for other in others:
        assert type(ATTENTIONS[other](model)) is FastWeightAttention


def test_delta_in_the_decoder_alone_is_the_default():
    model = translation_model()
    kinds = {site: type(find(model)).__name__ for site, find in ATTENTIONS.items()}
    assert kinds == {
        "update_rule": "FastWeightAttention",
        "update_rule_encoder": "MultiheadAttention",
        "update_rule_cross": "MultiheadAttention",
    }
    assert model.decoder.layers[0].self_attn.rule._get_name() == "DeltaRule"


@pytest.mark.parametrize("build", [translation_model, lm_model])
def test_no_future_mask_where_no_attention_needs_it(build):
    model = build(update_rule="delta").eval()
    previous, _ = source_batch(left_pad=False)
    if build is lm_model:
        model(previous)
    else:
        model(*source_batch(), previous)
    assert model.decoder.buffered_future_mask(torch.zeros(9, 1, 1)) is None
    assert model.decoder._future_mask.numel() == 0


def test_softmax_decoder_keeps_its_future_mask():
    model = translation_model(update_rule="softmax", update_rule_encoder="delta")
    mask = model.decoder.buffered_future_mask(torch.zeros(3, 1, 1))
    assert torch.equal(mask.isinf(), torch.ones(3, 3).triu(1).bool())


@pytest.mark.parametrize("rule", ["sum", "delta", "gated-sum", "gated-delta", "gated-sum-peng"])
@pytest.mark.parametrize("build", [translation_model, lm_model])
def test_decoder_does_not_see_the_future(build, rule):
    model = build(update_rule=rule).double().eval()
    words = torch.arange(WORDS.nspecial, WORDS.nspecial + 8)[None]
    changed = words.clone()
    changed[0, 5:] = WORDS.nspecial + 9
    source = () if build is lm_model else source_batch(lengths=(4,))
    before, after = (model(*source, x)[0][0, :5] for x in (words, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["sum", "delta", "gated-sum", "gated-delta", "gated-sum-peng"])
def test_encoder_sees_the_whole_sentence_from_every_word(rule):
    encoder = translation_model(update_rule_encoder=rule).double().eval().encoder
    words = torch.arange(WORDS.nspecial, WORDS.nspecial + 6)[None]
    for changed in range(6):
        other = words.clone()
        other[0, changed] = WORDS.nspecial + 9
        one, two = (encoder(x, torch.tensor([6]))["encoder_out"][0] for x in (words, other))
        assert ((one - two).abs().amax((1, 2)) > 1e-6).all()
