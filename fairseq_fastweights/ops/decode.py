"""One decoding token for every row and head; scriptable, no gradient."""

from typing import Optional, Tuple

import torch
from torch import Tensor


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Tensor,
) -> Tensor:
    """Write one token into ``state`` in place, then read it.

    q, k (B, H, dk); erase (B, H, dk), or (B, H) times k; v (B, H, dv); write, log_decay (B, H);
    state (B, H, dk, dv); all of one dtype.
    Returns out (B, H, dv).
    """
    if erase is not None and erase.dim() == 2:
        erase = erase[:, :, None] * k
    if log_decay is not None:
        state.mul_(log_decay.exp()[:, :, None, None])
    insert = v if write is None else v * write[:, :, None]
    if erase is not None:
        insert = insert - torch.matmul(erase[:, :, None, :], state)[:, :, 0]
    state.addcmul_(k[:, :, :, None], insert[:, :, None, :])
    return torch.matmul(q[:, :, None, :], state)[:, :, 0]


def parent_state(state: Tensor, parent: Optional[Tensor], out_state: Optional[Tensor]) -> Tensor:
    """The tensor the step may write into: ``out_state`` if given, else a new one, holding state[parent]."""
    if out_state is None:
        return state.clone() if parent is None else state.index_select(0, parent)
    if parent is not None:
        out_state.copy_(state.index_select(0, parent))
    elif out_state is not state:
        out_state.copy_(state)
    return out_state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Tensor,
    parent: Optional[Tensor],
    out_state: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """``fast_weight_step`` without the checks: any float dtypes in, out in v's dtype."""
    new = parent_state(state, parent, out_state)
    dtype = state.dtype
    out = step_(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        None if write is None else write.to(dtype),
        None if erase is None else erase.to(dtype),
        None if log_decay is None else log_decay.to(dtype),
        new,
    )
    return out.to(v.dtype), new
