"""Backend "cuda" of ``fast_weight_scan``: how a scan is cut into blocks, and its gradient."""

import functools
from dataclasses import dataclass
from typing import Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..errors import FastWeightError
from . import cuda
from .chunked import chunked_scan
from .cuda import ceil_div
from .numba_scan import decay_gradient, result_like, split_erase

# tokens from which S0 of every chunk is kept: S_C - K^T R would lose digits of early, small states
LONG = 1024
WIDEST_TILE = 64  # columns of keys that a block holds at once
WIDEST_VALUES = 68  # of values: 64 and the sum rule's normaliser
NARROWEST_BLOCK = 8  # columns of values, where shared memory is short


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


@dataclass(frozen=True)
class Plan:
    """How a scan is cut into blocks."""

    chunk: int  # tokens
    tile: int  # columns of keys that are in shared memory at once
    columns: int  # of the values, a block
    splits: int  # blocks of a head
    threads: int
    state_in_memory: bool
    shared: Dict[str, int]  # bytes by kernel

    def state_rows(self, dk: int) -> int:
        return round_up(dk, self.tile)


def tile_width(width: int, widest: int) -> int:
    """The narrowest multiple of 4 that covers ``width`` in as few tiles as ``widest`` does."""
    return round_up(ceil_div(width, ceil_div(width, widest)), 4)


def shared_bytes(chunk: int, tile: int, columns: int, dk: int, erase: int, decay: bool, states: int) -> Dict:
    """Shared memory of both kernels as ``scan.cu`` lays it out; ``states``: 1 if S (and dS) lie there."""
    keys, values, pairs = chunk * (tile + 4), chunk * (columns + 4), chunk * (chunk + 4)
    state = states * round_up(dk, tile) * (columns + 4)
    triangles = (2 if erase else 1) * pairs
    rows = (3 if erase else 2) * keys
    dots = ((erase == 1) + decay) * chunk * (tile // 4)
    forward = rows + triangles + values + 2 * chunk + state
    backward = rows + triangles + 3 * values + 3 * chunk + dots + 2 * state
    return {"scan_forward": 4 * forward, "scan_backward": 4 * backward}


@functools.lru_cache(1024)
def plan(
    heads: int,
    tokens: int,
    dk: int,
    dv: int,
    erase: int,
    decay: bool,
    keeps_state: bool,
    chunk_size: int,
    limits: cuda.Limits,
) -> Plan:
    """The cut for ``heads`` (batch x heads) sequences: all values in one block if they fit.

    keeps_state: whether there is a state to start from or one to return; else one chunk alone needs none.
    A wide value is split over blocks (each computes P and A again), the more so where heads alone would leave
    multiprocessors idle for many chunks.
    """
    small = max(dk, dv) <= 32 or tokens <= 16
    chunk = 16 if small or 0 < chunk_size < 32 else 32
    tile = tile_width(dk, WIDEST_TILE)
    splits = ceil_div(dv, WIDEST_VALUES)
    while tokens > 4 * chunk and heads * splits < limits.multiprocessors and dv > 16 * splits:
        splits *= 2
    in_memory = False
    while True:
        builds = keeps_state or tokens > chunk
        columns = tile_width(dv, ceil_div(dv, splits))
        shared = shared_bytes(chunk, tile, columns, dk, erase, decay, int(builds and not in_memory))
        if max(shared.values()) <= limits.shared:
            break
        if columns > NARROWEST_BLOCK and builds and not in_memory:
            splits = ceil_div(dv, max(NARROWEST_BLOCK, columns // 2))
        elif builds and not in_memory:
            splits, in_memory = ceil_div(dv, WIDEST_VALUES), True
        elif chunk > 16:
            chunk = 16
        elif tile > 16:
            tile = tile_width(dk, tile // 2)
        else:
            raise FastWeightError(
                f"the CUDA kernels need {max(shared.values())} bytes of shared memory a block for dk {dk}, dv {dv}, "
                f"and this device has {limits.shared}: use backend='chunked'"
            )
    threads = 64 if chunk * max(columns, chunk) <= 512 else 128
    return Plan(chunk, tile, columns, ceil_div(dv, columns), threads, in_memory, shared)


def kind_of_erase(erase: Optional[Tensor]) -> int:
    """The macro ERASE."""
    return 0 if erase is None else 1 if erase.dim() == 3 else 2


def common_dtype(q, k, v, erase) -> torch.dtype:
    """float32 for all where an operand is not of v's dtype: whole erase keys may be float32 beside half precision."""
    wide = [x for x in (q, k, v) if x is not None] + ([erase] if kind_of_erase(erase) == 2 else [])
    return v.dtype if all(x.dtype == v.dtype for x in wide) else torch.float32


def defines_of(
    cut: Plan,
    dtype: torch.dtype,
    dk: int,
    dv: int,
    erase: int,
    decay: bool,
    inserts: bool,
    kept: bool,
    is_aligned: int,
) -> Dict[str, int]:
    return {
        "NUMBER": cuda.NUMBERS[dtype],
        "ALIGNED": is_aligned,
        "THREADS": cut.threads,
        "CHUNK": cut.chunk,
        "DK": dk,
        "DV": dv,
        "KT": cut.tile,
        "DVB": cut.columns,
        "SPLITS": cut.splits,
        "ERASE": erase,
        "DECAY": int(decay),
        "INSERTS": int(inserts),
        "KEPT": int(kept),
        "STATE_IN_MEMORY": int(cut.state_in_memory),
    }


class CudaScan(torch.autograd.Function):
    """Saves the inputs, R, and the final state or, with decay or many tokens, the state before every chunk."""

    @staticmethod
    def forward(ctx, q, k, v, write, erase, log_decay, state, need_state, chunk_size):
        dtype, kind, decays = common_dtype(q, k, v, erase), kind_of_erase(erase), log_decay is not None
        inputs = kernel_operands(dtype, q, k, v, write, erase, log_decay, state)
        batch, heads, tokens, dk = k.shape
        dv = v.shape[-1]
        ctx.set_materialize_grads(False)
        keeps = state is not None or need_state
        cut = plan(batch * heads, tokens, dk, dv, kind, decays, keeps, chunk_size or 0, cuda.limits(k.device))
        builds = state is not None or tokens > cut.chunk
        trains = any(ctx.needs_input_grad)
        f32 = {"dtype": torch.float32, "device": k.device}
        out = None if q is None else result_like(inputs[2], dtype)
        inserted = None
        inserts = bool(kind) or write is not None
        if trains and inserts:
            inserted = result_like(inputs[2], torch.float32)
        end = kept = workspace = None
        keeps_starts = trains and builds and (decays or tokens >= LONG)
        if need_state or (trains and builds and not keeps_starts):
            end = torch.empty(batch, heads, dk, dv, **f32)
        if keeps_starts:
            kept = torch.empty(batch, heads, ceil_div(tokens, cut.chunk), dk, dv, **f32)
        if cut.state_in_memory:
            workspace = torch.empty(batch * heads, cut.splits, cut.state_rows(dk), cut.columns + 4, **f32)
        tensors = [*inputs, out, inserted, state, end, kept]
        wide = [x for x in tensors if x is not None and x.dim() >= 4]
        cuda.launch(
            "scan",
            "scan_forward",
            defines_of(cut, dtype, dk, dv, kind, decays, inserts, keeps_starts, cuda.aligned(*wide)),
            (batch * heads, cut.splits),
            cut.shared["scan_forward"],
            [
                *cuda.operands(*inputs),
                cuda.address(state),
                *cuda.operands(out, inserted),
                *map(cuda.address, (end, kept, workspace)),
                np.int32(heads),
                np.int32(tokens),
            ],
            k.device,
        )
        ctx.cut = cut
        ctx.save_for_backward(q, k, v, write, erase, log_decay, state, inserted, end, kept)
        return None if out is None else out.to(v.dtype), end if need_state else None

    @staticmethod
    def backward(ctx, d_out, d_end):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "fast_weight_scan has no second derivative (create_graph=True reached its backward): "
                "use backend='reference', which autograd can differentiate any number of times"
            )
        if d_out is None and d_end is None:
            return (None,) * 9
        q, k, v, write, erase, log_decay, state, inserted, end, kept = ctx.saved_tensors
        cut = ctx.cut
        dtype, kind, decays = common_dtype(q, k, v, erase), kind_of_erase(erase), log_decay is not None
        inputs = kernel_operands(dtype, q, k, v, write, erase, log_decay, state)
        batch, heads, tokens, dk = k.shape
        dv = v.shape[-1]
        if inserted is None:
            inserted = inputs[2]
        d_out = None if q is None else cuda.rows(d_out, dtype)
        d_end = None if d_end is None else d_end.contiguous()
        results = [None if x is None else result_like(x, x.dtype) for x in inputs]
        d_q, d_k, d_v, d_w, d_strength, d_erase, d_decay = results
        d_state = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
        if d_q is not None and d_out is None:
            d_q.zero_()
        f32 = {"dtype": torch.float32, "device": k.device}
        written = [None if d_out is None else d_q, d_k, d_v, d_w, d_strength, d_erase, d_decay]
        if cut.splits > 1:  # a part a block, summed below; dV is whole in each
            written = [
                x if x is None or x is d_v else torch.empty(cut.splits, *x.shape, **f32) for x in written
            ]
        workspace = None
        if cut.state_in_memory:
            workspace = torch.empty(2 * batch * heads, cut.splits, cut.state_rows(dk), cut.columns + 4, **f32)
        parts = (written[0], written[1], written[5])  # those of gates are read number by number
        tensors = [*inputs, *results, *parts, state, inserted, end, kept, d_out, d_end, d_state]
        is_aligned = cuda.aligned(*(x for x in tensors if x is not None and x.dim() >= 4))
        inserts = bool(kind) or write is not None
        defines = defines_of(cut, dtype, dk, dv, kind, decays, inserts, kept is not None, is_aligned)
        rows = batch * heads * tokens
        cuda.launch(
            "scan",
            "scan_backward",
            defines,
            (batch * heads, cut.splits),
            cut.shared["scan_backward"],
            [
                *cuda.operands(*inputs),
                cuda.address(state),
                *cuda.operand(inserted),
                *map(cuda.address, (end, kept)),
                *cuda.operand(d_out),
                cuda.address(d_end),
                *(
                    argument
                    for x in written
                    for argument in cuda.operand(x, parts=cut.splits > 1 and x is not d_v)
                ),
                *map(cuda.address, (d_state, workspace)),
                np.int32(heads),
                np.int32(tokens),
                np.int64(rows * dk),
                np.int64(rows),
            ],
            k.device,
        )
        if cut.splits > 1:
            results[3:5] = (
                None if x is None else x.new_empty(batch, heads, tokens) for x in (d_w, d_strength)
            )
            results[6] = None if d_decay is None else d_decay.new_empty(batch, heads, tokens)
            cuda.launch(
                "scan",
                "scan_reduce",
                defines,
                (ceil_div(rows * ceil_div(dk, 4), cut.threads),),
                0,
                [
                    *map(cuda.address, (written[0], written[1], written[5])),
                    *cuda.operands(d_q, d_k, d_erase),
                    *map(cuda.address, (written[3], written[4], written[6])),
                    *map(cuda.address, (results[3], results[4], results[6])),
                    np.int32(heads),
                    np.int32(tokens),
                    np.int64(rows),
                ],
                k.device,
            )
        d_q, d_k, d_v, d_w, d_strength, d_erase, d_decay = results
        if d_decay is not None:
            d_decay = decay_gradient(d_decay, end, d_end)
        grads = (d_q, d_k, d_v, d_w, d_strength if kind == 1 else d_erase, d_decay, d_state)
        given = (q, k, v, write, erase, log_decay, state)
        return (*(None if g is None else g.to(x.dtype) for g, x in zip(grads, given)), None, None)


def kernel_operands(dtype, q, k, v, write, erase, log_decay, state) -> list:
    """q, k, v, w, strength, erase keys and decay as ``scan.cu`` takes them."""
    q, k, v, write, erase, strength, log_decay, _ = split_erase(q, k, v, write, erase, log_decay, state)
    q, k, v, erase = (cuda.rows(x, dtype) for x in (q, k, v, erase))
    return [q, k, v, cuda.gate(write), cuda.gate(strength), erase, cuda.gate(log_decay)]


def cuda_scan(
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
    """Backend "cuda" of ``fast_weight_scan``; same arguments, already checked. float64 runs in PyTorch."""
    if k.shape[2] == 0 or k.numel() == 0 or v.numel() == 0 or v.dtype == torch.float64:
        return chunked_scan(q, k, v, write, erase, log_decay, state, need_state, chunk_size)
    state = None if state is None else state.contiguous()
    return CudaScan.apply(q, k, v, write, erase, log_decay, state, need_state, chunk_size)
