"""Random operands of the operators, for every rule of the table in update_rules."""

from typing import Dict, Optional

import pytest
import torch
from torch import Tensor

from fairseq_fastweights.ops import numba_scan

# which optional operands each rule gives to the scan
RULES = {
    "sum": (),
    "delta": ("write", "erase"),
    "gated-sum": ("log_decay",),
    "gated-delta": ("write", "erase", "log_decay"),
    "gated-sum-peng": ("write", "log_decay"),
    "erase without write": ("erase",),
}
# backends to parametrise a test with
NUMBA = pytest.param(
    "numba", marks=pytest.mark.skipif(numba_scan.refusal() is not None, reason=str(numba_scan.refusal()))
)
FAST = ["chunked", NUMBA]
ALL = ["reference", *FAST]
INPUTS = ("q", "k", "v", "write", "erase", "log_decay", "state")


def operands(
    rule: str = "delta",
    batch: int = 2,
    heads: int = 2,
    tokens: int = 9,
    dk: int = 4,
    dv: int = 3,
    state: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    along_key: bool = False,
) -> Dict[str, Optional[Tensor]]:
    """Keys of length at most 1 and beta in (0, 1), so that the recurrence is a contraction, as with real keys.

    The erase key is not parallel to k, which no special case of the delta rule would get right; with ``along_key``
    it is, and given as its strength (B, H, T).
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = (batch, heads, tokens)
    k = randn(*rows, dk)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    beta = rand(*rows)
    given = {
        "q": randn(*rows, dk),
        "k": k,
        "v": randn(*rows, dv),
        "write": beta,
        "erase": beta[..., None] * k + 0.1 * randn(*rows, dk) if not along_key else rand(*rows),
        "log_decay": -rand(*rows),
        "state": randn(batch, heads, dk, dv),
    }
    for name in ("write", "erase", "log_decay"):
        if name not in RULES[rule]:
            given[name] = None
    if not state:
        given["state"] = None
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: None if x is None else x.to(sums if n == "state" else dtype) for n, x in given.items()}


def require_grad(inputs: Dict[str, Optional[Tensor]]) -> Dict[str, Optional[Tensor]]:
    """Leaves on the same memory, whatever its layout."""
    return {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}


def written_out(inputs: Dict[str, Optional[Tensor]]) -> Dict[str, Optional[Tensor]]:
    """The same with the erase keys in full where they are given as their strength along k."""
    erase = inputs["erase"]
    return (
        {**inputs, "erase": erase[..., None] * inputs["k"]}
        if erase is not None and erase.dim() == 3
        else inputs
    )


def relative_error(x: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected, or over 1 where that is smaller.

    A gradient may be exactly zero (of a decay before anything is stored) and its rounding error is not.
    """
    assert x.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = max(expected.abs().max().item(), 1.0)
    return ((x.double() - expected.double()).abs().max() / scale).item()
