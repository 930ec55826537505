"""Rules: the operands they make of keys and gates, against the table and the paper's equations."""

import pytest
import torch

from fairseq_fastweights.ops import fast_weight_scan
from fairseq_fastweights.update_rules import UPDATE_RULES, build_update_rule

# the rows of the table; serial rules are tested in test_serial_rules.py
ROWS = [name for name, rule in UPDATE_RULES.items() if not rule.serial]
EMBED, HEADS, BATCH, TOKENS, DK, DV = 12, 3, 2, 10, 4, 5


def rule_inputs(rule, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, BATCH, EMBED, generator=g, dtype=torch.float64)
    k = torch.rand(BATCH, HEADS, TOKENS, DK, generator=g, dtype=torch.float64)
    q = torch.rand(BATCH, HEADS, TOKENS, DK, generator=g, dtype=torch.float64)
    v = torch.randn(BATCH, HEADS, TOKENS, DV, generator=g, dtype=torch.float64)
    return x, q, k / k.sum(-1, keepdim=True), v, rule.gates(x)


def build(name, normalized=False, **options):
    return build_update_rule(name, EMBED, HEADS, normalized, **options).double()


def scan(rule, q, k, v, gates, z=None, state=None):
    write, erase, log_decay, sums = rule(k, gates, z)
    out, state = fast_weight_scan(q, k, v, write=write, erase=erase, log_decay=log_decay, state=state)
    return out, state, sums


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_table(name):
    rule = build(name)
    x, q, k, v, gates = rule_inputs(rule)
    write, erase, log_decay, sums = rule(k, gates, None)
    assert sums is None
    if "delta" in name:
        beta = torch.sigmoid(x @ rule.beta_proj.weight.T).permute(1, 2, 0)
        torch.testing.assert_close(write, beta)
        torch.testing.assert_close(erase, beta)  # along k
    elif name == "gated-sum-peng":
        beta = torch.sigmoid(x @ rule.beta_proj.weight.T).permute(1, 2, 0)
        torch.testing.assert_close(write, beta)
        torch.testing.assert_close(log_decay.exp(), 1 - beta)
        assert erase is None
    else:
        assert write is None and erase is None
    if name in ("gated-sum", "gated-delta"):
        decay = rule.decay
        logits = x @ decay.proj.weight.T + decay.proj.bias
        expected = -decay.log_rate.exp() * torch.nn.functional.softplus(logits)
        torch.testing.assert_close(log_decay, expected.permute(1, 2, 0))
        assert (log_decay < 0).all()
    elif name != "gated-sum-peng":
        assert log_decay is None


def test_beta_has_no_bias():
    assert build("delta").beta_proj.bias is None


def test_gated_rules_begin_with_long_and_short_memories():
    log_decay = build_update_rule("gated-sum", EMBED, 8, False).gates(torch.zeros(1, 1, EMBED))
    half_lives = 1 / -log_decay.flatten()
    assert 5 < half_lives.min() < 20 and 500 < half_lives.max() < 2000


@pytest.mark.parametrize("clamp", [False, True])
def test_attention_normalised_delta_is_equations_26_to_28(clamp):
    """z(i) = z(i-1) + k; v_bar = W(i-1) k / (z(i-1) . k), and 0 at first; W(i) = W(i-1) + beta (v - v_bar) k^T."""
    rule = build("delta", normalized=True, kappa_clamp=clamp)
    _, q, k, v, gates = rule_inputs(rule)
    out, state, sums = scan(rule, q, k, v, gates)
    for b in range(BATCH):
        for h in range(HEADS):
            w, z = torch.zeros(DK, DV).double(), torch.zeros(DK).double()
            for t in range(TOKENS):
                key, beta = k[b, h, t], gates[b, h, t, 0]
                kappa = z @ key if t > 0 else torch.ones(()).double()
                if clamp:
                    kappa = torch.maximum(kappa, beta * key @ key / 2)
                v_bar = w.T @ key / (kappa + 1e-5)
                w = w + beta * torch.outer(key, v[b, h, t] - v_bar)
                z = z + key
                torch.testing.assert_close(out[b, h, t], w.T @ q[b, h, t], atol=1e-9, rtol=1e-9)
                torch.testing.assert_close(sums[b, h, t], z)
            torch.testing.assert_close(state[b, h], w, atol=1e-9, rtol=1e-9)


def test_kappa_clamp_makes_every_step_a_contraction():
    rule = build("delta", normalized=True, kappa_clamp=True)
    _, _, k, _, gates = rule_inputs(rule)
    _, erase, _, _ = rule(k, gates, None)
    assert (erase * k.square().sum(-1) <= 2 + 1e-9).all()
    free = build("delta", normalized=True)
    free.load_state_dict(rule.state_dict())
    peaked = torch.eye(DK).double()[torch.arange(TOKENS) % DK].expand_as(k) + 1e-3
    peaked = peaked / peaked.sum(-1, keepdim=True)
    _, erase, _, _ = free(peaked, torch.ones_like(gates), None)
    assert (erase * peaked.square().sum(-1) > 2).any(), "the clamp would have nothing to do"


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_normalised_delta_carries_z(cut):
    rule = build("delta", normalized=True)
    _, q, k, v, gates = rule_inputs(rule)
    whole, state, sums = scan(rule, q, k, v, gates)
    first, carried, z = scan(rule, q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], gates[:, :, :cut])
    second, last, z = scan(
        rule, q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], gates[:, :, cut:], z[:, :, -1], carried
    )
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(z[:, :, -1], sums[:, :, -1])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_zero_key_erases_nothing_and_leaves_z(name, normalized):
    if name == "gated-delta" and normalized:
        with pytest.raises(ValueError, match="gated-delta has no attention-normalised form"):
            build(name, normalized)
        return
    rule = build(name, normalized)
    _, _, k, _, gates = rule_inputs(rule)
    k[:, :, 0] = 0.0
    k[:, :, 3] = 0.0
    _, erase, _, sums = rule(k, gates, None)
    for t in (0, 3):
        assert erase is None or (erase[..., None] * k)[:, :, t].eq(0).all()
        before = 0.0 if t == 0 else 0.0 if sums is None else sums[:, :, t - 1]
        assert sums is None or (sums[:, :, t] == before).all()
    assert erase is None or erase.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_gradients_reach_every_parameter(name):
    rule = build(name)
    _, q, k, v, gates = rule_inputs(rule)
    out, _, _ = scan(rule, q, k, v, gates)
    parameters = list(rule.parameters())
    for grad in torch.autograd.grad(out.square().sum(), parameters) if parameters else []:
        assert grad.abs().sum() > 0


def test_sum_is_the_only_rule_whose_order_of_writing_does_not_matter():
    for name in ROWS:
        rule = build(name)
        _, q, k, v, gates = rule_inputs(rule)
        forward = scan(rule, q, k, v, gates)[1]
        backward = scan(rule, q, k.flip(2), v.flip(2), gates.flip(2))[1]
        assert torch.allclose(forward, backward) != rule.order_matters


@pytest.mark.parametrize("name", [n for n in ROWS if n != "delta"])
def test_kappa_clamp_is_refused_where_there_is_no_kappa(name):
    with pytest.raises(ValueError, match="kappa_clamp bounds the attention-normalised delta rule"):
        build(name, normalized=name != "gated-delta", kappa_clamp=True)


def test_unknown_rule():
    with pytest.raises(ValueError, match="update rule must be one of sum, delta, .*got 'hebb'"):
        build("hebb")
