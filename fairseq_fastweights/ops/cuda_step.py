"""``fast_weight_step`` on the GPU: one kernel that moves the state once, from its parent's row."""

from typing import Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from . import cuda
from .cuda import ceil_div

MOST_THREADS = 512
WIDEST_BLOCK = 32  # columns of the values: rows of 128 bytes
MOST_HELD = {
    4: 64,
    1: 40,
}  # numbers of state and keys that a thread keeps in registers, by columns of a thread


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def step_cut(dk: int, dv: int, is_aligned: int) -> Tuple[int, int]:
    """(columns of the values, threads) of a block: whole stretches of rows, and no more numbers than registers."""
    columns = min(WIDEST_BLOCK, power_of_two(dv))
    while True:
        width = 4 if is_aligned and dv % 4 == 0 and columns % 4 == 0 else 1
        lanes = columns // width
        threads = min(MOST_THREADS, max(32, power_of_two(lanes * ceil_div(dk, 16 // width))))
        if ceil_div(dk, threads // lanes) * (width + 1) <= MOST_HELD[width] or columns == 1:
            return columns, threads
        columns //= 2


def step_defines(dtype: torch.dtype, dk: int, dv: int, is_aligned: int) -> Dict[str, int]:
    """The macros of ``step.cu``."""
    columns, threads = step_cut(dk, dv, is_aligned)
    return {
        "NUMBER": cuda.NUMBERS[dtype],
        "ALIGNED": is_aligned,
        "THREADS": threads,
        "DK": dk,
        "DV": dv,
        "DVB": columns,
    }


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors without gaps share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def cuda_step(
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
    """``fast_weight_step``; same arguments, already checked, in float32, float16 or bfloat16.

    The state is copied where it must be read or written in another order than (B, H, dk, dv) without gaps.
    """
    (batch, heads, dk), dv = k.shape, v.shape[-1]
    state = state.contiguous()
    parent = None if parent is None else parent.contiguous()
    target = out_state
    in_place = parent is None and target is not None and target.data_ptr() == state.data_ptr()
    if target is None or not target.is_contiguous() or (overlap(target, state) and not in_place):
        target = torch.empty(batch, heads, dk, dv, dtype=torch.float32, device=k.device)
    along_key = erase is not None and erase.dim() == 2
    strength, keys = (erase, None) if along_key else (None, erase)
    dtype = v.dtype if all(x is None or x.dtype == v.dtype for x in (q, k, keys)) else torch.float32
    q, k, values, keys = (cuda.rows(x, dtype) for x in (q, k, v, keys))
    write, strength, log_decay = (cuda.gate(x) for x in (write, strength, log_decay))
    out = torch.empty(batch, heads, dv, dtype=dtype, device=k.device)
    is_aligned = cuda.aligned(values, out, state, target)
    defines = step_defines(dtype, dk, dv, is_aligned)
    arguments = [
        *cuda.operands(q, k, values, write, strength, keys, log_decay),
        cuda.address(state),
        cuda.address(parent),
        *cuda.operand(out),
        cuda.address(target),
        np.int32(heads),
        np.int64(state.shape[0]),
    ]
    grid = (batch * heads, ceil_div(dv, defines["DVB"]))
    cuda.launch("step", "step", defines, grid, 0, arguments, k.device)
    if out_state is not None and out_state is not target:
        target = out_state.copy_(target)
    return out.to(v.dtype), target
