"""A wrong call is one line that names the argument, what came and what is allowed."""

import pytest
import torch
from operands import operands

from fairseq_fastweights.ops import delta_rule, fast_weight_scan, fast_weight_step


def changed(name, change, rule="gated-delta"):
    inputs = operands(rule, tokens=5, state=True)
    inputs[name] = change(inputs[name])
    return inputs


WRONG = {
    "q with another dk": (
        "q",
        lambda x: x[..., :-1],
        r"q must have shape \(2, 2, 5, 4\).*got \(2, 2, 5, 3\)",
    ),
    "k with another dk": ("k", lambda x: x[..., :-1], r"q must have shape \(2, 2, 5, 3\)"),
    "k of three axes": ("k", lambda x: x[0], r"k must have shape \(B, H, T, dk\), got \(2, 5, 4\)"),
    "v of another length": ("v", lambda x: x[:, :, :-1], r"v must have shape .*got \(2, 2, 4, 3\)"),
    "write per feature": ("write", lambda x: x[..., None], r"write must have shape \(2, 2, 5\)"),
    "erase per head": (
        "erase",
        lambda x: x[:, :, 0, 0],
        r"erase must have shape \(2, 2, 5, 4\) or \(2, 2, 5\) .*got \(2, 2\)",
    ),
    "erase with another dk": (
        "erase",
        lambda x: x[..., :1],
        r"erase must have shape \(2, 2, 5, 4\) or \(2, 2, 5\) .*got \(2, 2, 5, 1\)",
    ),
    "erase strengths of another length": (
        "erase",
        lambda x: x[:, :, :-1, 0],
        r"erase must have shape \(2, 2, 5, 4\) or \(2, 2, 5\) .*got \(2, 2, 4\)",
    ),
    "half-precision erase strengths": (
        "erase",
        lambda x: x[..., 0].half(),
        "erase must be float64 beside k of float64, got float16",
    ),
    "log_decay per feature": ("log_decay", lambda x: x[..., None], "log_decay must have shape"),
    "state of another width": (
        "state",
        lambda x: x[..., :-1],
        r"state must have shape \(2, 2, 4, 3\).*got \(2, 2, 4, 2\)",
    ),
    "integer keys": ("k", lambda x: x.long(), "k must be one of float64 or .*got int64"),
    "float32 queries": (
        "q",
        lambda x: x.float(),
        "q must be float64 beside k of float64, got float32",
    ),
    "half-precision state": ("state", lambda x: x.half(), "state must be float64 .*got float16"),
    "a list": ("v", lambda x: x.tolist(), "v must be a tensor, got list"),
    "another device": ("v", lambda x: x.to("meta"), "v is on meta but k is on cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands(case):
    name, change, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        fast_weight_scan(**changed(name, change))
    assert "\n" not in str(error.value)


def test_state_must_be_float32_beside_half_precision():
    inputs = operands("delta", tokens=5, dtype=torch.bfloat16, state=True)
    inputs["state"] = inputs["state"].bfloat16()
    with pytest.raises(ValueError, match="state must be float32 beside k of bfloat16, got bfloat16"):
        fast_weight_scan(**inputs)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True])
def test_wrong_chunk_size(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a positive int or None"):
        fast_weight_scan(**operands(), chunk_size=chunk_size)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, chunked, numba, cuda, got 'triton'"
    ):
        fast_weight_scan(**operands(), backend="triton")


def test_cuda_backend_says_why_it_cannot_run():
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here: the tensors are on cpu"):
        fast_weight_scan(**operands(), backend="cuda")


def test_erase_of_a_step_names_both_shapes():
    inputs = operands("delta", tokens=1, state=True)
    one = {n: None if x is None else x[:, :, 0] for n, x in inputs.items() if n != "state"}
    one["erase"] = one["erase"][:, 0]
    with pytest.raises(ValueError, match=r"erase must have shape \(2, 2, 4\) or \(2, 2\) .*got \(2, 4\)"):
        fast_weight_step(**one, state=inputs["state"])


def test_wrong_beta():
    x = operands()
    with pytest.raises(ValueError, match=r"beta must have shape \(2, 2, 9\), got \(2, 2, 9, 1\)"):
        delta_rule(x["q"], x["k"], x["v"], x["write"][..., None])
    with pytest.raises(ValueError, match="beta must have shape .*got float"):
        delta_rule(x["q"], x["k"], x["v"], 0.5)


def test_wrong_parent_and_state_of_a_step():
    inputs = operands("delta", tokens=1, state=True)
    one = {n: None if x is None else x[:, :, 0] for n, x in inputs.items() if n != "state"}
    state = inputs["state"]
    with pytest.raises(ValueError, match=r"parent must be int64 of shape \(2,\)"):
        fast_weight_step(**one, state=state, parent=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="state must have shape"):
        fast_weight_step(**one, state=state[:1])
    with pytest.raises(ValueError, match="state must have shape"):
        fast_weight_step(**one, state=state[..., :2], parent=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="state must have shape"):
        fast_weight_step(**one, state=state, out_state=state[..., :2])
