"""Backend "numba": the kernels of ``numba_kernels`` on torch tensors, over torch's number of threads.

Nothing of numba is imported before the first scan. The compiled code is kept beside the package (or, where that
cannot be written, in the user's cache), so that only the first run on a machine waits for the compiler.
"""

import functools
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor

from ..errors import FastWeightError
from .chunked import chunk_length, chunked_scan, sum_dtype

logger = logging.getLogger(__name__)

NUMBA_CHUNK = 32  # fastest of 8 to 64 at head widths 16 to 64: benchmarks/README.md
WORTH_A_THREAD = 2**16  # multiplications of a scan below which starting a thread costs more than it saves


@functools.lru_cache(None)
def refusal() -> Optional[str]:
    """Why numba cannot be used here, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'fairseq_fastweights[cpu]')"
    return None


@functools.lru_cache(None)
def kernel(name: str, dtype: torch.dtype) -> Callable:
    """The kernel ``name`` of ``numba_kernels`` for one dtype, compiled or loaded from the cache."""
    logging.getLogger("numba").setLevel(logging.WARNING)  # it writes a line an instruction at level DEBUG
    from . import numba_kernels

    return numba_kernels.compiled(name, str(dtype).replace("torch.", ""))


@functools.lru_cache(None)
def helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fast_weights")


os.register_at_fork(after_in_child=helpers.cache_clear)  # threads do not survive a fork


def run(compute: Callable, heads: int, cost: int, *arguments) -> None:
    """compute(first, last, *arguments) over all heads, shared out to torch's number of threads."""
    shares = 1 if cost < WORTH_A_THREAD else min(torch.get_num_threads(), heads)
    borders = [heads * n // shares for n in range(shares + 1)]
    others = [
        helpers(shares - 1).submit(compute, first, last, *arguments)
        for first, last in zip(borders[1:-1], borders[2:])
    ]
    compute(0, borders[1], *arguments)
    for other in others:
        other.result()


def arrays(tensors: List[Optional[Tensor]], ranks: List[int], dtype: torch.dtype) -> list:
    """The tensors as numpy arrays of one dtype, without a copy where rows are contiguous; None as an empty array."""
    return [
        torch.empty([0] * rank, dtype=dtype).numpy() if x is None else rows(x, dtype).numpy()
        for x, rank in zip(tensors, ranks)
    ]


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, with neighbouring numbers in its last axis."""
    x = x.detach().to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


INPUTS = [4, 4, 4, 3, 4, 3, 4]  # axes of q, k, v, write, erase, log_decay, state


class NumbaScan(torch.autograd.Function):
    """Saves the inputs as they came and the inserted values; the states are computed again by the backward."""

    @staticmethod
    def forward(ctx, q, k, v, write, erase, log_decay, state, need_state, chunk_size):
        dtype = sum_dtype(v)
        inputs = [q, k, v, write, erase, log_decay, state]
        batch, heads, tokens, dk = k.shape
        dv = v.shape[-1]
        ctx.chunk = chunk_length(tokens, chunk_size, NUMBA_CHUNK)
        ctx.set_materialize_grads(False)
        out = None if q is None else torch.empty_like(v, dtype=dtype)
        erases_in_backward = erase is not None and any(ctx.needs_input_grad)
        inserted = torch.empty_like(v, dtype=dtype) if erases_in_backward or write is not None else None
        end = v.new_empty(batch, heads, dk, dv, dtype=dtype) if need_state else None
        operands = arrays(inputs, INPUTS, dtype)
        results = arrays([out, inserted, end], [4, 4, 4], dtype)
        run(kernel("forward", dtype), batch * heads, k.numel() * dv, ctx.chunk, *operands, *results)
        ctx.save_for_backward(*inputs, v if inserted is None else inserted, None if log_decay is None else end)
        return None if out is None else out.to(v.dtype), end

    @staticmethod
    def backward(ctx, d_out, d_end):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "fast_weight_scan has no second derivative (create_graph=True reached its backward): "
                "use backend='reference', which autograd can differentiate any number of times"
            )
        *inputs, inserted, end = ctx.saved_tensors
        q, k, v, write, erase, log_decay, state = inputs
        dtype = sum_dtype(v)
        if q is None:
            d_out = None
        # a missing input has no gradient; nothing read: no gradient for q
        dq, dk, dv, dw, de, d_state = (
            None if x is None else torch.empty_like(x, dtype=dtype) for x in (q, k, v, write, erase, state)
        )
        if d_out is None and q is not None:
            dq.zero_()
        operands = arrays(inputs, INPUTS, dtype)
        gradients = arrays([inserted, d_out, d_end], [4, 4, 4], dtype)
        results = arrays([dq, dk, dv, dw, de, d_state], [4, 4, 4, 3, 4, 4], dtype)
        heads = k.shape[0] * k.shape[1]
        run(
            kernel("backward", dtype),
            heads,
            k.numel() * v.shape[-1],
            ctx.chunk,
            *operands,
            *gradients,
            *results,
        )
        d_decay = None
        if log_decay is not None:
            d_decay = decay_gradient([(q, dq), (erase, de)], k, dk, end, d_end)
        grads = [
            None if g is None else g.to(x.dtype) for g, x in zip((dq, dk, dv, dw, de, d_decay, d_state), inputs)
        ]
        return (*grads, None, None)


def decay_gradient(read_by, k, dk, end, d_end) -> Tensor:
    """d log_decay_t = sum over i >= t of (q_i . dq_i + e_i . de_i - k_i . dk_i) + <dS, S> at the end.

    Summed in float64: what is added in one place is taken off in another.
    """
    local = -(k * dk).sum(-1, dtype=torch.float64)  # (B, H, T)
    for x, dx in read_by:
        if x is not None:
            local += (x * dx).sum(-1, dtype=torch.float64)
    if d_end is not None:
        local[:, :, -1] += (d_end * end).sum((-1, -2), dtype=torch.float64)
    return local.flip(-1).cumsum(-1).flip(-1)


def numba_scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Optional[Tensor],
    need_state: bool,
    chunk_size: Optional[int],
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Backend "numba" of ``fast_weight_scan``; same arguments, already checked."""
    if k.shape[2] == 0:
        return chunked_scan(q, k, v, write, erase, log_decay, state, need_state, chunk_size)
    return NumbaScan.apply(q, k, v, write, erase, log_decay, state, need_state, chunk_size)
