"""Argument checks of the public operators: a wrong call is one line that says what came and what is allowed."""

from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import FastWeightError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_operands(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Optional[Tensor],
    tokens: bool,
) -> None:
    """Raise FastWeightError (a ValueError) unless the operands fit each other.

    tokens: whether the operands have a T axis (scan) or not (step).
    """
    axes = "(B, H, T, {})" if tokens else "(B, H, {})"
    ndim = 4 if tokens else 3
    for name, x in (("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.dim() != ndim:
            wanted = axes.format("dk" if name == "k" else "dv")
            raise FastWeightError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    *rows, dk = k.shape
    rows, dv = tuple(rows), v.shape[-1]
    shapes: Dict[str, Tuple[int, ...]] = {
        "q": (*rows, dk),
        "v": (*rows, dv),
        "write": rows,
        "erase": (*rows, dk),
        "log_decay": rows,
        "state": (*rows[:2], dk, dv),
    }
    operands = {
        "q": q,
        "v": v,
        "write": write,
        "erase": erase,
        "log_decay": log_decay,
        "state": state,
    }
    for name, x in operands.items():
        if x is None:
            continue
        _check_tensor(name, x)
        if x.shape != shapes[name] and not (name == "erase" and x.shape == rows):
            wanted = f"{shapes[name]} or {rows}" if name == "erase" else shapes[name]
            raise FastWeightError(
                f"{name} must have shape {wanted} to fit k {tuple(k.shape)} and v {tuple(v.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if x.device != k.device:
            raise FastWeightError(f"{name} is on {x.device} but k is on {k.device}: move one of them")
    _check_dtypes(operands, k.dtype)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise FastWeightError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise FastWeightError(f"{name} must be one of {_names(FLOATS)}, got {_names([x.dtype])}")


def _check_dtypes(operands: Dict[str, Optional[Tensor]], dtype: torch.dtype) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name, x in operands.items():
        if name in ("q", "v"):
            allowed: Sequence[torch.dtype] = (dtype,)
        elif name == "state":
            allowed = (sums,)
        else:
            allowed = (dtype, sums)
        if x is not None and x.dtype not in allowed:
            raise FastWeightError(
                f"{name} must be {_names(dict.fromkeys(allowed))} beside k of {_names([dtype])}, "
                f"got {_names([x.dtype])}"
            )


def _names(dtypes) -> str:
    return " or ".join(str(d).replace("torch.", "") for d in dtypes)


def check_chunk_size(chunk_size: Optional[int]) -> None:
    """chunk_size is None (chosen by the backend) or a positive int."""
    if chunk_size is not None and (
        not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1
    ):
        raise FastWeightError(f"chunk_size must be a positive int or None, got {chunk_size!r}")


def check_beta(beta: object, k: Tensor) -> None:
    """Raise FastWeightError unless beta is a tensor with one number for every key."""
    if not isinstance(beta, Tensor) or beta.shape != k.shape[:-1]:
        came = tuple(beta.shape) if isinstance(beta, Tensor) else type(beta).__name__
        raise FastWeightError(f"beta must have shape {tuple(k.shape[:-1])}, got {came}")
