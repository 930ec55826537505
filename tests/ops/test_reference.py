"""The specification itself, against the formulas written out once more with explicit loops and by hand."""

import math

import torch
from operands import operands

from fairseq_fastweights.ops import delta_rule, fast_weight_scan, sum_rule


def by_the_formulas(q, k, v, w, e, la, s):
    """One row, one head, Python floats: nothing shared with the library."""
    tokens, dk, dv = len(k), len(k[0]), len(v[0])
    out = []
    for t in range(tokens):
        a = math.exp(la[t])
        r = [w[t] * v[t][j] - a * sum(s[i][j] * e[t][i] for i in range(dk)) for j in range(dv)]
        s = [[a * s[i][j] + k[t][i] * r[j] for j in range(dv)] for i in range(dk)]
        out.append([sum(s[i][j] * q[t][i] for i in range(dk)) for j in range(dv)])
    return out, s


def test_reference_follows_the_formulas():
    x = operands("gated-delta", tokens=6, state=True)
    out, state = fast_weight_scan(**x, backend="reference")
    for b in range(2):
        for h in range(2):
            row = [x[n][b, h].tolist() for n in ("q", "k", "v", "write", "erase", "log_decay", "state")]
            expected_out, expected_state = by_the_formulas(*row)
            torch.testing.assert_close(out[b, h], torch.tensor(expected_out).double(), atol=1e-6, rtol=0)
            torch.testing.assert_close(state[b, h], torch.tensor(expected_state).double(), atol=1e-6, rtol=0)


def test_sum_rule_is_unnormalised_linear_attention():
    x = operands("sum", tokens=7)
    out, state = sum_rule(x["q"], x["k"], x["v"], backend="reference")
    weights = (x["q"] @ x["k"].transpose(-1, -2)).tril()
    torch.testing.assert_close(out, weights @ x["v"])
    torch.testing.assert_close(state, x["k"].transpose(-1, -2) @ x["v"])


def test_delta_rule_with_beta_1_and_unit_key_stores_the_value():
    """After writing v at k, reading at k returns v, whatever was stored there before."""
    x = operands("delta", tokens=5, state=True)
    ones = torch.ones(2, 2, 5, dtype=torch.float64)
    out, _ = delta_rule(x["k"], x["k"], x["v"], ones, x["state"], backend="reference")
    torch.testing.assert_close(out, x["v"])


def test_delta_rule_interpolates_old_and_new_value():
    """v_new = beta v + (1 - beta) v_old, the paper's eq. 23 with a unit key."""
    x = operands("delta", tokens=1, state=True)
    beta = torch.full((2, 2, 1), 0.3, dtype=torch.float64)
    out, _ = delta_rule(x["k"], x["k"], x["v"], beta, x["state"], backend="reference")
    old = x["k"] @ x["state"]
    torch.testing.assert_close(out, 0.3 * x["v"] + 0.7 * old)
