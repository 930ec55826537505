"""The state of decoding as pairs and a matrix: equal to the recurrence of every row's own ancestors."""

import pytest
import torch
from operands import RULES, operands

from fairseq_fastweights.ops import fast_weight_scan
from fairseq_fastweights.ops.lazy_state import LazyState

TOKENS, ROWS = 70, 3  # dk 20, dv 9: folded every 16 tokens


def token(inputs, rows, t):
    names = ("q", "k", "v", "write", "erase", "log_decay")
    return [None if inputs[n] is None else inputs[n][:rows, :, t : t + 1] for n in names]


def expected_of(inputs, history, start):
    """(out, state) of one row that came by these rows of the inputs, one a token."""
    whole = {
        n: None if x is None else torch.stack([x[row, :, t] for t, row in enumerate(history)], dim=1)[None]
        for n, x in inputs.items()
        if n != "state"
    }
    state = None if inputs["state"] is None else inputs["state"][start : start + 1]
    return fast_weight_scan(**whole, state=state, backend="reference")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("along_key", [False, True])
def test_equals_the_recurrence_under_any_reorder(rule, state, along_key):
    inputs = operands(rule, batch=ROWS, tokens=TOKENS, dk=20, dv=9, state=state)
    if along_key and inputs["erase"] is not None:
        inputs["erase"] = torch.rand(ROWS, 2, TOKENS, dtype=torch.float64)
    lazy = LazyState(inputs["state"])
    histories, starts = [[] for _ in range(ROWS)], list(range(ROWS))
    for t in range(TOKENS):
        out = lazy.step(*token(inputs, len(histories), t))
        histories = [history + [row] for row, history in enumerate(histories)]
        if t in (0, 1, 15, 16, 33, TOKENS - 1):
            for row, history in enumerate(histories):
                expected = dict(inputs)
                if along_key and inputs["erase"] is not None:
                    expected["erase"] = inputs["erase"][..., None] * inputs["k"]
                reads, end = expected_of(expected, history, starts[row])
                torch.testing.assert_close(out[row, :, 0], reads[0, :, -1], atol=1e-10, rtol=0)
                torch.testing.assert_close(lazy.dense()[row], end[0], atol=1e-10, rtol=0)
        # beams swap at every token; now and then sentences end or return
        order = torch.randint(
            len(histories), (int(torch.randint(1, ROWS + 1, ())) if t % 5 == 4 else len(histories),)
        )
        lazy.reorder(order)
        histories, starts = [histories[i] for i in order], [starts[i] for i in order]
    assert lazy.count < 16 and lazy.base is not None, "nothing was folded"


def test_a_reorder_moves_no_keys_and_no_states():
    inputs = operands("delta", batch=ROWS, tokens=2, state=True)
    lazy = LazyState(inputs["state"])
    lazy.step(*token(inputs, ROWS, 0))
    before = lazy.base, lazy.keys, lazy.inserted
    lazy.reorder(torch.tensor([2, 2, 0]))
    assert all(a is b for a, b in zip(before, (lazy.base, lazy.keys, lazy.inserted)))


def test_nothing_written_is_nothing():
    lazy = LazyState()
    lazy.fold()
    assert lazy.dense() is None
