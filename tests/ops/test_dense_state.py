"""The matrices of decoding rows under any reorder, on the CUDA step run on the CPU, against the reference."""

import pytest
import torch
from operands import operands, relative_error

from fairseq_fastweights.ops import fast_weight_scan
from fairseq_fastweights.ops.dense_state import DenseState

# before which token which rows go on: twice at once, repeated, fewer, more, alone
ORDERS = {
    1: [[1, 0, 2], [2, 2, 0]],
    2: [[1, 0, 2]],
    3: [[0, 2]],
    4: [[1, 0, 0, 1]],
    6: [[3, 1, 1, 2]],
    7: [[0, 1]],
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rule", ["sum", "gated-delta"])
def test_rows_under_any_reorder(cupy, rule, given):
    whole = operands(
        rule, batch=3, heads=1, tokens=9, dk=4, dv=4, state=True, along_key=True, dtype=torch.float32
    )
    start = whole.pop("state") if given else None
    whole.pop("state", None)
    kept = None if start is None else start.clone()
    rows, ours = torch.arange(3), DenseState(start)
    state = start
    for t in range(9):
        for order in map(torch.tensor, ORDERS.get(t, [])):
            ours.reorder(order)
            rows = rows[order]
            state = None if state is None else state[order]
            if state is not None:
                assert relative_error(ours.dense(), state) <= 1e-5
        token = {n: None if x is None else x[rows, :, t : t + 1] for n, x in whole.items()}
        out = ours.step(*(token[n] for n in ("q", "k", "v", "write", "erase", "log_decay")))
        expected, state = fast_weight_scan(**token, state=state, backend="reference")
        assert relative_error(out, expected) <= 1e-5 and relative_error(ours.dense(), state) <= 1e-5
    assert start is None or torch.equal(start, kept)
