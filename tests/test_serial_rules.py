"""Serial rules against their formulas, written out for one head, one sentence and one token at a time in float64."""

import pytest
import torch

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.modules import FastWeightAttention
from fairseq_fastweights.serial_rules import SerialRule
from fairseq_fastweights.update_rules import UPDATE_RULES, build_update_rule, rule_class

EMBED, HEADS, D = 12, 3, 4
SERIAL = [name for name, rule in UPDATE_RULES.items() if rule.serial]
CASES = [
    ("delta-rnn", "elu", {}),
    ("delta-rnn", "dpfp", {"dpfp_nu": 2}),
    ("delta-lstm", "elu", {}),
    ("delta-lstm", "favor", {"favor_features": 3}),
    ("recurrent-delta-net", "softmax", {}),
    ("delta-mlp", "elu", {}),
    ("delta-mlp", "elu", {"delta_mlp_depth": 3}),
    ("delta-delta-net", "elu", {}),
    ("delta-delta-net", "tanh", {}),
]
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c[0], c[1], *(str(x) for x in c[2].values())])
)
OWN_MAP = {"recurrent-delta-net": "softmax"}


def build(case, **options):
    """A float64 attention in eval mode whose parameters, biases included, are not zero."""
    rule, feature_map, more = case
    torch.manual_seed(1)
    attention = FastWeightAttention(
        EMBED, HEADS, update_rule=rule, feature_map=feature_map, **more, **options
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return attention.double().eval()


def inputs(tokens=6, rows=2):
    return torch.randn(tokens, rows, EMBED, dtype=torch.float64)


def attend(attention, x, padding=None, incremental_state=None):
    return attention(x, x, x, key_padding_mask=padding, incremental_state=incremental_state)[0]


def assert_same(one, other, tolerance=1e-10):
    assert one.shape == other.shape
    error = (one - other).abs().max().item() if one.numel() else 0.0
    assert error <= tolerance * max(1.0, other.abs().max().item() if other.numel() else 0.0), f"error {error}"


class Matrix:
    """A fast matrix in the paper's orientation, W (outputs, features), written by the delta rule."""

    def __init__(self, outputs, features):
        self.w = torch.zeros(outputs, features, dtype=torch.float64)

    def write(self, k, v, beta):
        v_bar = self.w @ k
        self.w = self.w + torch.outer(beta * v + (1 - beta) * v_bar, k) - torch.outer(v_bar, k)

    def read(self, q):
        return self.w @ q


def reference(attention, case, x):
    """What ``attention`` must return for x (T, B, C), and every head's state as its rule documents it."""
    rule, options = case[0], case[2]
    weights = {name: p.detach().double() for name, p in attention.state_dict().items()}
    out = torch.zeros_like(x)
    states = torch.zeros(x.shape[1], HEADS, 0, dtype=torch.float64)
    for b in range(x.shape[1]):
        for h in range(HEADS):
            head = REFERENCES[rule](weights, h, case[1], **options)
            for t in range(len(x)):
                out[t, b, h * D : (h + 1) * D] = head.token(x[t, b])
            state = torch.cat([part.flatten() for part in head.state()])
            if states.shape[-1] == 0:
                states = torch.zeros(x.shape[1], HEADS, len(state), dtype=torch.float64)
            states[b, h] = state
    return out @ weights["out_proj.weight"].T + weights["out_proj.bias"], states


class HeadReference:
    """What the rules' heads share: projections and the feature map."""

    def __init__(self, weights, h, feature_map, **options):
        self.weights, self.h, self.feature_map, self.options = weights, h, feature_map, options
        self.start()

    def qkv(self, x):
        rows = slice(self.h * D, (self.h + 1) * D)
        return [
            self.weights[f"{n}_proj.weight"][rows] @ x + self.weights[f"{n}_proj.bias"][rows] for n in "qkv"
        ]

    def more(self, x, *widths):
        """The rule's own projection of x, in parts."""
        weight = self.weights["rule.proj.weight"].view(HEADS, -1, EMBED)[self.h]
        assert len(weight) == sum(widths)
        return list((weight @ x).split(widths))

    def phi(self, x):
        if self.feature_map == "elu":
            y = torch.stack([a + 1 if a > 0 else a.exp() for a in x])
        elif self.feature_map == "dpfp":
            both = [*x.clamp(min=0), *(-x).clamp(min=0)]
            nu = self.options["dpfp_nu"]
            y = torch.stack([both[i] * both[i - j] for j in range(1, nu + 1) for i in range(len(both))])
        elif self.feature_map == "favor":
            p = x @ self.weights["feature_map.projection"]
            y = torch.exp(-(x @ x) / 2) * torch.cat([p.exp(), (-p).exp()]) + 1e-4
        elif self.feature_map == "tanh":
            return x.tanh() / x.tanh().norm()  # sums of signed features can vanish
        return y / y.sum()

    def features(self):
        return len(self.phi(torch.ones(D, dtype=torch.float64)))


class RnnReference(HeadReference):
    def start(self):
        self.w, self.r, self.h_t = Matrix(D, self.features()), Matrix(D, D), torch.zeros(D).double()

    def token(self, x):
        q, k, v = self.qkv(x)
        k_r, v_r, beta, beta_r = self.more(x, D, D, 1, 1)
        self.w.write(self.phi(k), v, beta.sigmoid())
        self.r.write(k_r.softmax(0), v_r, beta_r.sigmoid())
        self.h_t = self.w.read(self.phi(q)) + self.r.read(self.h_t.softmax(0))
        return self.h_t * D**-0.5

    def state(self):
        return [self.w.w.T, self.r.w.T, self.h_t]


class LstmReference(HeadReference):
    def start(self):
        self.w = [Matrix(D, self.features()) for _ in "iuo"]
        self.r = [Matrix(D, D) for _ in "iuo"]
        self.h_t, self.c = torch.zeros(D).double(), torch.zeros(D).double()

    def token(self, x):
        q, k, v = self.qkv(x)
        parts = self.more(x, *[D] * 12, *[1] * 6)
        q_i, q_o, k_i, k_o, v_i, v_o = parts[:6]
        q, k, v = (q_i, q, q_o), (k_i, k, k_o), (v_i, v, v_o)
        k_r, v_r, beta, beta_r = parts[6:9], parts[9:12], parts[12:15], parts[15:18]
        before = self.h_t.softmax(0)
        p = []
        for g in range(3):
            self.w[g].write(self.phi(k[g]), v[g], beta[g].sigmoid())
            self.r[g].write(k_r[g].softmax(0), v_r[g], beta_r[g].sigmoid())
            p.append(self.w[g].read(self.phi(q[g])) + self.r[g].read(before))
        i, u, o = p[0].sigmoid(), p[1], p[2].sigmoid()
        self.c = i * u + (1 - i) * self.c
        self.h_t = o * self.c
        return self.h_t * D**-0.5

    def state(self):
        return [*(m.w.T for m in self.w), *(m.w.T for m in self.r), self.h_t, self.c]


class RecurrentReference(HeadReference):
    def start(self):
        self.w, self.y = Matrix(D, D), torch.zeros(D).double()

    def token(self, x):
        q, k, v = self.qkv(x)
        (beta,) = self.more(x, 1)
        r_q, r_k, r_v, r_beta = self.weights["rule.recurrent"][self.h].T.split([D, D, D, 1])
        past = self.y.tanh()
        q, k = (q + r_q @ past).softmax(0), (k + r_k @ past).softmax(0)
        self.w.write(k, v + r_v @ past, (beta + r_beta @ past).sigmoid())
        self.y = self.w.read(q)
        return self.y * D**-0.5

    def state(self):
        return [self.w.w.T, self.y]


class MlpReference(HeadReference):
    def start(self):
        self.blocks = [
            (Matrix(4 * D, D), Matrix(D, 4 * D)) for _ in range(self.options.get("delta_mlp_depth", 1))
        ]

    def token(self, x):
        q, k, v = self.qkv(x)
        later = [4 * D, 4 * D, 1, 1, D, D] * (len(self.blocks) - 1)
        parts = self.more(x, 4 * D, 4 * D, 1, 1, *later)
        parts[4:4] = [k, v]
        for n, (w1, w2) in enumerate(self.blocks):
            v1, k2, beta1, beta2, k1, v2 = parts[6 * n : 6 * n + 6]
            w1.write(self.phi(k1), v1, beta1.sigmoid())
            w2.write(self.phi(k2), v2, beta2.sigmoid())
            centred = q - q.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt()
            name = f"rule.layer_norms.{n}."
            normed = normed * self.weights[name + "weight"] + self.weights[name + "bias"]
            q = q + w2.read(self.phi(w1.read(self.phi(normed))))
        return q

    def state(self):
        return [m.w.T for block in self.blocks for m in block]


class DeltaDeltaReference(HeadReference):
    def start(self):
        self.outer, self.inner = Matrix(3 * D + 1, self.features()), Matrix(D, self.features())

    def token(self, x):
        q, k, v = self.qkv(x)
        v_q, v_k, v_beta, beta = self.more(x, D, D, 1, 1)
        self.outer.write(self.phi(k), torch.cat([v_q, v_k, v, v_beta]), beta.sigmoid())
        q, k, v, beta = self.outer.read(self.phi(q)).split([D, D, D, 1])
        self.inner.write(self.phi(k), v, beta.sigmoid())
        return self.inner.read(self.phi(q))

    def state(self):
        return [self.outer.w.T, self.inner.w.T]


REFERENCES = {
    "delta-rnn": RnnReference,
    "delta-lstm": LstmReference,
    "recurrent-delta-net": RecurrentReference,
    "delta-mlp": MlpReference,
    "delta-delta-net": DeltaDeltaReference,
}


def test_every_serial_rule_has_a_reference():
    assert set(SERIAL) == set(REFERENCES) == {case[0] for case in CASES}
    assert all(issubclass(UPDATE_RULES[name], SerialRule) for name in SERIAL)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@cases
def test_output_and_state_are_those_of_the_formula(case, grad):
    attention, x, state = build(case), inputs(), {}
    with torch.set_grad_enabled(grad):
        out = attend(attention, x)
        assert_same(attend(attention, x, incremental_state=state), out)
    expected, expected_state = reference(attention, case, x)
    assert_same(out, expected)
    assert_same(attention._get_input_buffer(state)["state"], expected_state)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rule", SERIAL)
def test_gradients_of_all_inputs_and_of_the_state(rule, backend):
    """Finite differences, through padding, a state that is carried in and the state that comes out."""
    attention = build((rule, OWN_MAP.get(rule, "elu"), {}), backend=backend)
    x = inputs(tokens=4).requires_grad_()
    padding = torch.tensor([[False] * 4, [True, False, False, True]])[:, None]
    q, k, v = (attention._heads(p(x)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    _, before, _ = attention._scan(q, k, v, attention.rule.gates(x), None, None, None, True)
    leaves = [y.detach().requires_grad_() for y in (q, k, v, attention.rule.gates(x), before)]
    parameters = [p for n, p in attention.rule.named_parameters() if not n.startswith("proj")]

    def scan(q, k, v, gates, state, *_):
        out, state, _ = attention._scan(q, k, v, gates, padding, state, None, True)
        return out.masked_fill(padding[..., None], 0.0), state

    assert torch.autograd.gradcheck(scan, (*leaves, *parameters), fast_mode=True)


@cases
@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_split_anywhere_and_carried_on(case, cut):
    attention, x, state = build(case), inputs(), {}
    whole = attend(attention, x)
    parts = [attend(attention, part, incremental_state=state) for part in (x[:cut], x[cut:])]
    assert_same(torch.cat(parts), whole)


@cases
def test_token_by_token_with_reordered_rows(case):
    attention, x, state, written = build(case), inputs(8, 3), {}, inputs(0, 3)
    rows = torch.arange(3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in range(len(x)):
            written = torch.cat([written[:, rows], x[t : t + 1]])
            out = attend(attention, x[t : t + 1], incremental_state=state)
            assert_same(out[0], attend(attention, written)[-1])
            rows = torch.randint(3, (3,), generator=generator)
            attention.reorder_incremental_state(state, rows)
        kept = attention._get_input_buffer(state)
    assert kept["z"] is None and kept["state"].dim() == 3


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@cases
def test_padding_is_the_identity_on_the_whole_state(case, left):
    attention, lengths = build(case), (5, 3, 1, 0)
    parts = [inputs(length, 1) for length in lengths]
    batch = inputs(5, 4) * 30
    padding = torch.ones(4, 5, dtype=torch.bool)
    for b, part in enumerate(parts):
        where = slice(5 - len(part), None) if left else slice(0, len(part))
        batch[where, b], padding[b, where] = part[:, 0], False
    batch.requires_grad_()
    together, state = {}, None
    out = attend(attention, batch, padding, together)
    state = attention._get_input_buffer(together)["state"]
    for b, part in enumerate(parts):
        alone = {}
        assert_same(out[~padding[b], b], attend(attention, part, incremental_state=alone)[:, 0])
        assert_same(state[b], attention._get_input_buffer(alone)["state"][0])
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out[~padding.T].square().sum() + state.square().sum(), batch)
    assert (grad[padding.T] == 0).all() and (grad[~padding.T] != 0).any(-1).all()


@pytest.mark.parametrize("rule", SERIAL)
def test_no_tokens_and_no_rows(rule):
    attention = build((rule, OWN_MAP.get(rule, "elu"), {}))
    for shape in [(0, 2, EMBED), (3, 0, EMBED)]:
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        state = {}
        out = attend(attention, x, incremental_state=state)
        out.sum().backward()
        assert out.shape == shape and (attention._get_input_buffer(state)["state"] == 0).all()


@pytest.mark.parametrize("rule", SERIAL)
def test_gradients_reach_every_parameter(rule):
    attention = build((rule, OWN_MAP.get(rule, "elu"), {}))
    attend(attention, inputs()).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("rule", SERIAL)
def test_half_precision_keeps_the_state_in_float32(rule):
    attention, x, state = build((rule, OWN_MAP.get(rule, "elu"), {})), inputs(20), {}
    expected = attend(attention, x)
    attention, x = attention.bfloat16(), x.bfloat16().requires_grad_()
    out = attend(attention, x, incremental_state=state)
    assert out.dtype == torch.bfloat16
    assert attention._get_input_buffer(state)["state"].dtype == torch.float32
    assert (out - expected).abs().max() < 0.06 * expected.abs().max()
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("rule", SERIAL)
def test_autocast_sums_in_float32(rule):
    attention, x = build((rule, OWN_MAP.get(rule, "elu"), {})).float(), inputs().float()
    q, k, v = torch.randn(3, 2, HEADS, 6, D)
    gates = attention.rule.gates(x)
    expected, state, _ = attention._scan(q, k, v, gates, None, None, None, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, again, _ = attention._scan(q, k, v, gates, None, None, None, True)
        attend(attention, x.requires_grad_()).float().sum().backward()
    assert_same(out, expected, 1e-6)
    assert_same(again, state, 1e-6)
    assert x.grad.isfinite().all()


def test_long_sequences_are_taken_back_exactly_enough():
    """The backward loop undoes 300 writes in float32; its gradients are those of float64."""
    for rule in ("delta-rnn", "delta-lstm", "recurrent-delta-net"):
        attention, x = build((rule, OWN_MAP.get(rule, "elu"), {})), inputs(300, 1)
        grads = []
        for dtype in (torch.float64, torch.float32):
            attention.zero_grad()
            attention.to(dtype)
            attend(attention, x.to(dtype)).square().mean().backward()
            grads.append({n: p.grad.double() for n, p in attention.named_parameters()})
        for name, expected in grads[0].items():
            assert_same(grads[1][name] / expected.abs().max(), expected / expected.abs().max(), 1e-4)


REFUSED = {
    "encoder": ({"causal": False}, ["causal self-attention only", "--update-rule"]),
    "cross": ({"encoder_decoder_attention": True}, ["causal self-attention only"]),
    "normalised": ({"attention_normalization": "true"}, ["attention_normalization false"]),
    "clamp": ({"kappa_clamp": True}, ["kappa_clamp"]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("rule", SERIAL)
def test_what_makes_no_sense_is_refused_in_one_line(rule, what):
    options, words = REFUSED[what]
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(EMBED, HEADS, update_rule=rule, feature_map=OWN_MAP.get(rule, "elu"), **options)
    assert "\n" not in str(error.value)
    for word in words if what == "clamp" else [rule, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"update_rule": "recurrent-delta-net"}, ["feature_map softmax", "'elu'"]),
        ({"update_rule": "delta-mlp", "feature_map": "dpfp"}, ["feature_map elu", "'dpfp'"]),
        (
            {"update_rule": "recurrent-delta-net", "feature_map": "softmax", "key_normalization": "l2"},
            ["key_normalization", "'l2'"],
        ),
        ({"update_rule": "delta-mlp", "delta_mlp_depth": 0}, ["delta_mlp_depth", "0"]),
        ({"update_rule": "delta-mlp", "delta_mlp_depth": 1.5}, ["delta_mlp_depth", "1.5"]),
    ],
)
def test_other_parts_than_the_formula_s_are_refused(options, words):
    with pytest.raises(FastWeightError) as error:
        FastWeightAttention(EMBED, HEADS, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("rule", SERIAL)
def test_torchscript_is_refused(rule):
    with pytest.raises(FastWeightError, match=f"{rule} .*TorchScript"):
        torch.jit.script(build((rule, OWN_MAP.get(rule, "elu"), {})))


def test_defaults_are_the_authors():
    for rule in SERIAL:
        attention = FastWeightAttention(EMBED, HEADS, update_rule=rule, feature_map=OWN_MAP.get(rule, "elu"))
        assert not attention.normalized
        assert attention.key_normalization == ("none" if rule in OWN_MAP else "sum")
    d = 16
    rule = build_update_rule("recurrent-delta-net", 8 * d, 8, False)
    assert abs(rule.recurrent.std().item() * d**0.5 - 1) < 0.05
    assert rule_class("delta-rnn").scales and not rule_class("delta-mlp").scales
    # as many outputs of x as the authors' projections have: 5 d + 2, 15 d + 6, 3 d + 1, 17 d + 2, 5 d + 2 a head
    rules = {"delta-rnn": 5 * d + 2, "delta-lstm": 15 * d + 6, "recurrent-delta-net": 3 * d + 1}
    # delta-mlp: q, and k and v (d + 4 d each) of two matrices
    rules |= {"delta-mlp": d + 4 * (d + 4 * d) // 2 + 2, "delta-delta-net": 5 * d + 2}
    for name, outputs in rules.items():
        rule = build_update_rule(name, 8 * d, 8, False)
        assert rule.proj.out_features == 8 * (outputs - 3 * d) and rule.proj.bias is None
