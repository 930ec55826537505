"""Each metric against a loop over rows, heads and tokens in float64; nothing else changes; where an inf came from."""

import logging
import math

import pytest
import torch
from attention_cases import (
    CASES,
    FEW_CASES,
    HEADS,
    SITES,
    SOURCE_DIM,
    Case,
    assert_same,
    attend,
    build_attention,
    sentences,
)
from attention_loop import Head
from fairseq.logging import metrics
from torch import nn

from fairseq_fastweights.errors import FastWeightError
from fairseq_fastweights.modules import FastWeightAttention, stats
from fairseq_fastweights.modules.stats import attach_stats

MEASURED = [case for case in CASES if case.feature_map == "elu"] + [c for c in FEW_CASES if c.rule != "sum"]
WITH_KAPPA = Case("delta", "elu", True)


def logged(call) -> dict:
    """The metrics that ``call`` logs."""
    with metrics.aggregate(new_root=True) as meters:
        call()
    return dict(meters.get_smoothed_values())


def measured_attention(case, site, interval=1, **options):
    attention = build_attention(case, site, **options)
    attach_stats(attention, interval)
    return attention


def inputs(site, tokens, rows):
    return sentences(tokens, rows), sentences(tokens, rows, SOURCE_DIM) if site == "cross" else None


def paddings(site, tokens, lengths):
    """True at pads, on the right of a causal batch and on the left of a source."""
    place, lengths = torch.arange(tokens), torch.tensor(lengths)[:, None]
    return place >= lengths if site == "causal" else place < tokens - lengths


def by_hand(attention, case, site, x, padding=None) -> dict:
    """The metrics of one batch, from the formulas."""
    weights = {name: p.detach().double() for name, p in attention.state_dict().items()}
    norms, ranks, writes, erased, decays, kappas = [], [], [], [], [], []
    for b in range(x.shape[1]):
        real = [t for t in range(len(x)) if padding is None or not padding[b, t]]
        for h in range(HEADS):
            head = Head(weights, attention, case, h, None)
            reverse = site != "causal" and h % 2 == 1
            for t in reversed(real) if reverse else real:
                token = x[t, b].double()
                k = head.address("k_proj", token)
                if "delta" in case.rule:
                    beta = head.beta(token)
                    kappa = 1.0 if head.z.eq(0).all() else float(head.z @ k)
                    kappas.append(kappa)
                    divisor = float(head.kappa(k, beta)) if case.normalized else 1.0
                    writes.append(float(beta))
                    erased.append(float(beta * (k @ k)) / divisor)
                if case.rule == "gated-sum-peng":
                    writes.append(float(head.beta(token)))
                    decays.append(1 - float(head.beta(token)))
                elif "gated" in case.rule:
                    decays.append(float(head.decay(token)))
                head.write(token)
            norms.append(math.sqrt(float((head.state**2).sum())))
            if b < stats.RANK_ROWS:
                ranks.append(rank_by_hand(head.state))
    expected = {"state_norm": mean(norms), "effective_rank": mean(ranks)}
    if writes:
        expected["write"] = mean(writes)
    if erased:
        expected["erased"], expected["erased_max"] = mean(erased), max(erased)
    if decays:
        expected["decay"] = mean(decays)
    if case.normalized and case.rule == "delta":
        expected["kappa"], expected["kappa_min"] = mean(kappas), min(kappas)
    return {f"fw_0_{name}": value for name, value in expected.items()}


def mean(numbers):
    return sum(numbers) / len(numbers)


def rank_by_hand(state):
    """From the eigenvalues of S^T S."""
    singular = torch.linalg.eigvalsh(state.T @ state).clamp_min(0).sqrt().tolist()
    shares = [s / sum(singular) for s in singular]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 1e-12))


def assert_numbers(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_metrics_equal_the_loop(case, site):
    attention = measured_attention(case, site)
    x, source = inputs(site, 7, 5)
    found = logged(lambda: attend(attention, x, source))
    assert_numbers(found, by_hand(attention, case, site, x if source is None else source))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_padding_is_not_measured(case, site):
    attention = measured_attention(case, site)
    x, source = inputs(site, 6, 3)
    padding = paddings(site, 6, [6, 2, 4])
    found = logged(lambda: attend(attention, x, source, key_padding_mask=padding))
    assert_numbers(found, by_hand(attention, case, site, x if source is None else source, padding))


def test_kappa_is_that_before_the_clamp():
    attention = measured_attention(WITH_KAPPA, "causal", kappa_clamp=True)
    x = sentences(9, 2)
    assert_numbers(logged(lambda: attend(attention, x)), by_hand(attention, WITH_KAPPA, "causal", x))


def test_kappa_counts_the_keys_before_this_segment():
    attention = build_attention(WITH_KAPPA, "causal")
    k, z = torch.rand(2, HEADS, 5, 4).double(), torch.rand(2, HEADS, 4).double()
    seen = {"k": k, "padding": None, "write": None, "erase": None, "log_decay": None, "z": z}
    found = stats.measure(attention, {**seen, "state": torch.zeros(2, HEADS, 4, 4)})
    expected = [
        float(k[b, h, t] @ (z[b, h] + k[b, h, :t].sum(0)))
        for b in range(2)
        for h in range(HEADS)
        for t in range(5)
    ]
    assert float(found["kappa"][0]) == pytest.approx(mean(expected))
    assert float(found["kappa_min"][0]) == pytest.approx(min(expected))


def test_nothing_is_logged_for_a_batch_of_padding():
    attention = measured_attention(WITH_KAPPA, "bidirectional")
    assert logged(lambda: attend(attention, sentences(3, 2), key_padding_mask=torch.ones(2, 3))) == {}


def test_batches_count_by_their_tokens():
    attention = measured_attention(WITH_KAPPA, "causal")
    batches = [sentences(3, 2), sentences(8, 1)]
    found = logged(lambda: [attend(attention, x) for x in batches])
    one, other = (by_hand(attention, WITH_KAPPA, "causal", x) for x in batches)
    write, norm = "fw_0_write", "fw_0_state_norm"
    assert found[write] == pytest.approx((6 * one[write] + 8 * other[write]) / 14)
    assert found[norm] == pytest.approx((2 * one[norm] + 1 * other[norm]) / 3)


def test_training_is_measured_at_every_third_update():
    attention = measured_attention(WITH_KAPPA, "causal", interval=3).train()
    measured = []
    for done in range(7):
        attention.stats.set_num_updates(done)
        if logged(lambda: attend(attention, sentences(4, 2))):
            measured.append(done + 1)
    assert measured == [3, 6]
    attention.eval()
    assert logged(lambda: attend(attention, sentences(4, 2)))  # evaluation: every batch


class Layers(nn.Module):
    """Attentions one after another, under the names that fairseq gives them."""

    def __init__(self, *attentions):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": x}) for x in attentions)

    def forward(self, x):
        for layer in self.layers:
            x = attend(layer["self_attn"], x)
        return x


def test_layers_have_metrics_of_their_own():
    case = Case("sum", "elu", True)
    model = Layers(build_attention(case, "causal"), build_attention(case, "causal"))
    attach_stats(model, 1)
    found = logged(lambda: model(sentences(4, 2)))
    assert list(found) == [f"fw_{i}_{name}" for i in (0, 1) for name in ("state_norm", "effective_rank")]


def test_the_name_says_the_site_if_there_are_several():
    case = Case("sum", "elu", True)
    model = Layers(build_attention(case, "bidirectional"), build_attention(case, "causal"))
    attach_stats(model, 1)
    found = logged(lambda: model(sentences(4, 2)))
    assert {name.rsplit("_", 2)[0] for name in found} == {"fw_encoder_0", "fw_decoder_1"}


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("backend", ["chunked", "numba"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_results_and_gradients_keep_their_bits(case, site, backend, tokens):
    plain, measured = (
        build_attention(case, site, backend=backend, chunk_size=16).float().train() for _ in range(2)
    )
    attach_stats(measured, 1)
    x, source = (None if s is None else s.float() for s in inputs(site, tokens, 2))
    padding = paddings(site, tokens, [tokens, 3])
    results = []
    for attention in (plain, measured):
        query = x.clone().requires_grad_()
        out = attend(attention, query, source, key_padding_mask=padding)
        out.square().sum().backward()
        results.append([out, query.grad, *(p.grad for p in attention.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_off_leaves_the_attention_as_it_is():
    attention = build_attention(WITH_KAPPA, "causal")
    attach_stats(attention, 0)
    assert attention.stats is None
    assert logged(lambda: attend(attention, sentences(3, 2))) == {}


@pytest.mark.parametrize("interval", [-1, "often", None])
def test_wrong_interval_is_refused(interval):
    with pytest.raises(FastWeightError, match="^fast_weight_stats must be .*, got"):
        attach_stats(build_attention(WITH_KAPPA, "causal"), interval)


@pytest.mark.parametrize("site", ["causal", "cross"])
def test_incremental_decoding_is_not_measured(site):
    attention = measured_attention(WITH_KAPPA, site)
    x, source = inputs(site, 4, 2)

    def decode():
        state = {}
        for token in x.split(1):
            attend(attention, token, source, incremental_state=state)

    with torch.no_grad():
        assert logged(decode) == {}
    assert attention.stats.seen == {}


@pytest.mark.parametrize("site", SITES)
def test_scripted_equals_eager(site):
    attention = measured_attention(WITH_KAPPA, site)
    scripted = torch.jit.script(attention)
    for _ in range(3):
        x, source = inputs(site, 5, 2)
        assert_same(attend(scripted, x, source), attend(attention, x, source))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_measured_in_float32(autocast):
    attention = measured_attention(WITH_KAPPA, "causal")
    x = sentences(6, 3)
    expected = by_hand(attention, WITH_KAPPA, "causal", x)
    attention = attention.float() if autocast else attention.bfloat16()
    x = x.float() if autocast else x.bfloat16()

    def half():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            attend(attention, x)

    found = logged(half)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.05), name


def test_generation_does_not_measure():
    attention = measured_attention(WITH_KAPPA, "causal")
    attention.make_generation_fast_(name="decoder.layers.0.self_attn")
    assert logged(lambda: attend(attention, sentences(3, 2))) == {}
    torch.jit.script(attention)


def poisoned(parameter, value=math.inf, case=WITH_KAPPA):
    """Three layers, the middle one with ``value`` in a weight."""
    model = Layers(*(build_attention(case, "causal") for _ in range(3))).train()
    attach_stats(model, 100)
    for layer in model.layers:
        layer["self_attn"].stats.set_num_updates(11)
    with torch.no_grad():
        model.layers[1]["self_attn"].get_parameter(parameter)[0, 0] = value
    return model


@pytest.fixture
def warnings(caplog):
    """Calls return what they warned of."""

    def warned(call):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fairseq_fastweights"):
            call()
        return [record.getMessage() for record in caplog.records]

    return warned


@pytest.mark.parametrize(
    "parameter, tensor",
    [
        ("q_proj.weight", "q"),
        ("k_proj.weight", "k"),
        ("v_proj.weight", "v"),
        ("rule.beta_proj.weight", "gates"),
    ],
)
def test_the_first_value_that_is_not_finite_is_named(warnings, parameter, tensor):
    model = poisoned(parameter, value=math.nan)
    (line,) = warnings(lambda: model(sentences(4, 2)))
    start = f"first non-finite value: decoder layer 1 self-attention (layers.1.self_attn), tensor {tensor} (nan in "
    assert line.startswith(start)
    assert line.endswith(" numbers), update 12")


def test_inf_and_nan_are_counted(warnings):
    identity = Case("sum", "identity", False)
    model = poisoned("v_proj.weight", case=identity)
    x = sentences(4, 2)
    (line,) = warnings(lambda: model(x))
    # one output in every token, and the sum rule has no column of ones without its normalisation
    assert "tensor v (inf in 8 of 96 numbers)" in line
    assert stats.census(torch.tensor([1, math.inf, -math.inf, math.nan])) == "inf in 2, nan in 1 of 4 numbers"


def test_overflow_within_the_state_is_named(warnings):
    model = Layers(build_attention(Case("sum", "identity", False), "causal").float())
    attach_stats(model, 100)
    attention = model.layers[0]["self_attn"]
    with torch.no_grad():
        attention.k_proj.weight.fill_(1e25)
        attention.v_proj.weight.fill_(1e25)
    (line,) = warnings(lambda: model(torch.ones(3, 2, 12)))
    assert "tensor state (inf in 96 of 96 numbers)" in line  # 2 rows, 3 heads, 4 x 4


def test_what_was_not_finite_before_the_attention_is_its_input(warnings):
    model = poisoned("q_proj.weight", value=0.0)
    x = sentences(4, 2)
    x[1, 1, 2] = math.nan
    (line,) = warnings(lambda: model(x))
    assert (
        "decoder layer 0 self-attention (layers.0.self_attn), tensor input (nan in 1 of 96 numbers)" in line
    )


def test_a_layer_warns_once_and_the_next_ones_are_not_blamed(warnings):
    model = poisoned("k_proj.weight", math.nan)

    def updates(*numbers):
        for done in numbers:
            for layer in model.layers:
                layer["self_attn"].stats.set_num_updates(done)
            model(sentences(4, 2))

    assert len(warnings(lambda: updates(11, 11, 12, 13))) == 1


def test_validation_says_so(warnings):
    model = poisoned("k_proj.weight", math.nan).eval()
    with torch.no_grad():
        (line,) = warnings(lambda: model(sentences(4, 2)))
    assert line.endswith("validation after update 12")


def test_large_and_finite_is_no_reason_to_warn(warnings):
    model = Layers(build_attention(Case("sum", "elu", False), "causal").float())
    attention = model.layers[0]["self_attn"]
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.fill_(1e36)
        attention.out_proj = nn.Identity()
        out = attend(attention, torch.ones(6, 40, 12))
    assert out.isfinite().all() and out.sum().isinf()  # what is looked at first
    attach_stats(model, 100)
    assert warnings(lambda: model(torch.ones(6, 40, 12))) == []


@pytest.mark.parametrize("rule, feature_map", [("delta-rnn", "dpfp"), ("recurrent-delta-net", "softmax")])
def test_a_serial_rule_shows_its_first_matrix(rule, feature_map):
    width, tokens, rows = 16, 5, 3
    attention = FastWeightAttention(
        width, 2, self_attention=True, update_rule=rule, feature_map=feature_map
    ).eval()
    x, pads = torch.randn(tokens, rows, width), torch.arange(tokens) >= torch.tensor([5, 3, 5])[:, None]
    incremental_state = {}
    with torch.no_grad():
        attention(x, x, x, key_padding_mask=pads, incremental_state=incremental_state)
    (kept,) = incremental_state.values()
    dk = attention.feature_map.output_dim
    matrices = kept["state"][..., : dk * 8].reshape(rows * 2, dk, 8).double()
    shares = [s / s.sum() for s in torch.linalg.svdvals(matrices)]
    ranks = [math.exp(-float((p * p.log()).sum())) for p in shares]
    attach_stats(attention, 1)
    found = logged(lambda: attention(x, x, x, key_padding_mask=pads))
    assert set(found) == {"fw_0_state_norm", "fw_0_effective_rank"}
    assert found["fw_0_state_norm"] == pytest.approx(float(matrices.flatten(1).norm(dim=-1).mean()), rel=1e-5)
    assert found["fw_0_effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
