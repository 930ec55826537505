"""The recurrence itself, one token after another: the specification every other backend is tested against.

    r_t = w_t v_t - a_t S_{t-1}^T e_t        what is inserted
    S_t = a_t S_{t-1} + k_t r_t^T            the write
    o_t = S_t^T q_t                          the read, after the write

with w = ``write``, e = ``erase``, a = exp(``log_decay``). Differentiable by autograd, any number of times.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor


def recurrence_step(
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Tensor,
) -> Tensor:
    """One write. k, erase (B, H, dk); v (B, H, dv); write, log_decay (B, H); state (B, H, dk, dv)."""
    if log_decay is not None:
        state = state * log_decay.exp()[..., None, None]
    insert = v if write is None else write[..., None] * v
    if erase is not None:
        insert = insert - (erase[..., None, :] @ state)[..., 0, :]
    return state + k[..., :, None] * insert[..., None, :]


def reference_scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Optional[Tensor],
) -> Tuple[Optional[Tensor], Tensor]:
    """Same arguments as ``fast_weight_scan``, all of one dtype. Returns (out, state); out is None without q."""
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3])
    reads = []
    for t in range(k.shape[2]):
        state = recurrence_step(
            k[:, :, t],
            v[:, :, t],
            None if write is None else write[:, :, t],
            None if erase is None else erase[:, :, t],
            None if log_decay is None else log_decay[:, :, t],
            state,
        )
        if q is not None:
            reads.append((q[:, :, t, None, :] @ state)[:, :, 0])
    if q is None:
        return None, state
    return (torch.stack(reads, dim=2) if reads else v.new_zeros(v.shape)), state
