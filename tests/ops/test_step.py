"""Decoding one token at a time: the scan, with the state in the caller's hands."""

import pytest
import torch
from operands import RULES, operands, written_out

from fairseq_fastweights.ops import fast_weight_scan, fast_weight_step


def token(inputs, t):
    return {n: None if x is None else x[:, :, t] for n, x in inputs.items() if n != "state"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_place", [False, True])
def test_scan_equals_step_by_step(rule, in_place):
    inputs = operands(rule, tokens=20, state=True)
    expected, expected_state = fast_weight_scan(**inputs, backend="reference")
    state, reads = inputs["state"].clone(), []
    for t in range(20):
        out, state = fast_weight_step(**token(inputs, t), state=state, out_state=state if in_place else None)
        reads.append(out)
    torch.testing.assert_close(torch.stack(reads, dim=2), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, expected_state, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ["delta", "gated-delta", "erase without write"])
def test_erase_as_its_strength_along_the_key(rule):
    inputs = operands(rule, tokens=20, state=True, along_key=True)
    expected, expected_state = fast_weight_scan(**written_out(inputs), backend="reference")
    state, reads = inputs["state"].clone(), []
    for t in range(20):
        one = token(inputs, t)
        assert one["erase"].dim() == 2
        out, state = fast_weight_step(**one, state=state)
        reads.append(out)
    torch.testing.assert_close(torch.stack(reads, dim=2), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, expected_state, atol=1e-12, rtol=0)


def test_parent_reorders_with_repeats_and_fewer_rows():
    inputs = operands("gated-delta", batch=2, tokens=1)
    beams = operands("delta", batch=4, tokens=1, state=True)["state"]
    parent = torch.tensor([3, 3])
    out, state = fast_weight_step(**token(inputs, 0), state=beams, parent=parent)
    expected, expected_state = fast_weight_step(**token(inputs, 0), state=beams[parent].clone())
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


def test_out_state_may_be_the_state_that_is_reordered():
    inputs = operands("delta", batch=3, tokens=1, state=True)
    state, parent = inputs["state"], torch.tensor([2, 0, 0])
    expected, expected_state = fast_weight_step(**token(inputs, 0), state=state.clone(), parent=parent)
    out, returned = fast_weight_step(**token(inputs, 0), state=state, parent=parent, out_state=state)
    assert returned is state
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


def test_state_is_left_alone_without_out_state():
    inputs = operands("gated-delta", tokens=1, state=True)
    before = inputs["state"].clone()
    fast_weight_step(**token(inputs, 0), state=inputs["state"])
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("gates", [torch.bfloat16, torch.float32])
def test_half_precision_keeps_a_float32_state(along_key, gates):
    inputs = operands("delta", tokens=1, dk=16, dtype=torch.bfloat16, state=True, along_key=along_key)
    inputs["erase"] = inputs["erase"].to(gates)
    out, state = fast_weight_step(**token(inputs, 0), state=inputs["state"])
    exact = written_out({n: None if x is None else x.double() for n, x in inputs.items()})
    expected, _ = fast_weight_scan(**exact, backend="reference")
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[:, :, 0], atol=0.05, rtol=1e-2)


def test_gradient_is_refused():
    inputs = operands("delta", tokens=1, state=True)
    inputs["v"].requires_grad_()
    with pytest.raises(ValueError, match="inference only"):
        fast_weight_step(**token(inputs, 0), state=inputs["state"])
    with torch.no_grad():
        fast_weight_step(**token(inputs, 0), state=inputs["state"])
