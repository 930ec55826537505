"""Chunk-parallel form of the recurrence in plain PyTorch, with a backward written by hand.

The tokens are cut into chunks of C. Inside a chunk, with S0 the state at its start, l the running sum of
log_decay, g = exp(l) and Gam_ij = exp(l_i - l_j) for i >= j:

    A = stril((E K^T) . Gam)            B = diag(w) V - diag(g) E S0
    (I + A) R = B                       R holds the inserted values r_t, one row a token
    P = tril((Q K^T) . Gam)
    O = diag(g) Q S0 + P R
    S_C = g_C S0 + K^T diag(g_C / g) R

so a chunk costs a few matrix products and only the C-fold shorter chain of states is serial.
The derivation follows the WY form of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length" (2024), for erase and key vectors that need not be parallel.

Shapes in this file: M = batch x heads, N = chunks, C = tokens of a chunk, so q is (M, N, C, dk).
"""

import contextlib
import math
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FastWeightError

DEFAULT_CHUNK = 64
SUBSTITUTION_BLOCK = 16


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The sums below need full precision, also where the caller's autocast would cast each product down."""
    return torch.autocast(device_type, enabled=False)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float32, or float64 where the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def erase_keys(erase: Optional[Tensor], k: Tensor) -> Optional[Tensor]:
    """The erase keys e, like k, where they may be given as their strength along k: e = erase k."""
    if erase is not None and erase.dim() < k.dim():
        return erase[..., None] * k
    return erase


def unit_lower_inverse(a: Tensor, block: int = SUBSTITUTION_BLOCK) -> Tensor:
    """(I + a)^-1 for strictly lower triangular a (..., C, C).

    Diagonal blocks by forward substitution, then pairs of blocks are merged:
    inv([[L, 0], [X, L']]) = [[L^-1, 0], [-L'^-1 X L^-1, L'^-1]]. Unlike repeated squaring, no intermediate
    exceeds the entries of the result, which beta |k|^2 <= 2 bounds by beta |k_i| |k_j|.
    """
    size = a.shape[-1]
    block = min(block, size)
    padded = block
    while padded < size:
        padded *= 2
    flat = F.pad(a, [0, padded - size, 0, padded - size]).reshape(-1, padded, padded)
    inverse = _substitute(_diagonal_blocks(flat, block))  # (M N padded / block, block, block)
    while block < padded:
        pair = inverse.reshape(-1, 2, block, block)
        first, second = pair[:, 0], pair[:, 1]
        corner = -(second @ _diagonal_blocks(flat, 2 * block)[:, block:, :block] @ first)
        top = torch.cat([first, torch.zeros_like(corner)], dim=-1)
        inverse = torch.cat([top, torch.cat([corner, second], dim=-1)], dim=-2)
        block *= 2
    return inverse[:, :size, :size].reshape(a.shape)


def _diagonal_blocks(a: Tensor, block: int) -> Tensor:
    """(M, C, C) -> (M C/block, block, block), the blocks on the diagonal."""
    n = a.shape[-1] // block
    a = a.reshape(-1, n, block, n, block).diagonal(dim1=1, dim2=3)  # (M, block, block, n)
    return a.permute(0, 3, 1, 2).reshape(-1, block, block)


def _substitute(a: Tensor) -> Tensor:
    """(I + a)^-1 row by row: x_i = 1_i - a_i x."""
    x = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).repeat(a.shape[0], 1, 1)
    for i in range(1, a.shape[-1]):
        x[:, i : i + 1, :i] = -(a[:, i : i + 1, :i] @ x[:, :i, :i])
    return x


def chunk_length(tokens: int, chunk_size: Optional[int], default: int = DEFAULT_CHUNK) -> int:
    """Tokens per chunk: at most chunk_size, evened out so that the last chunk is hardly padded."""
    largest = default if chunk_size is None else chunk_size
    chunks = max(1, math.ceil(tokens / largest))
    return math.ceil(tokens / chunks)


def to_chunks(x: Tensor, length: int) -> Tensor:
    """(B, H, T, ...) -> (M, N, C, ...). Zeros fill the last chunk: k = e = 0 and log_decay = 0 change nothing."""
    batch, heads, tokens = x.shape[0], x.shape[1], x.shape[2]
    chunks = (tokens + length - 1) // length
    missing = chunks * length - tokens
    if missing > 0:
        x = F.pad(x, [0, 0, 0, missing]) if x.dim() == 4 else F.pad(x, [0, missing])
    shape: List[int] = [batch * heads, chunks, length]
    if x.dim() == 4:
        shape.append(x.shape[3])
    return x.reshape(shape)


def from_chunks(x: Tensor, batch: int, heads: int, tokens: int) -> Tensor:
    """(M, N, C, ...) -> (B, H, T, ...)."""
    shape: List[int] = [batch, heads, x.shape[1] * x.shape[2]]
    if x.dim() == 4:
        shape.append(x.shape[3])
    return x.reshape(shape)[:, :, :tokens]


def decay_factors(log_decay: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """(M, N, C) -> Gam (M, N, C, C), g (M, N, C, 1), g_C / g (M, N, C, 1).

    All from differences of l, never as g_i * (1 / g_j), which turns into 0 * inf after a few strong decays.
    """
    total = log_decay.cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    pairs = gap.clamp(max=0.0).exp()  # the clamp only touches i < j, which every user masks
    return pairs, total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]


def masked_product(a: Tensor, b: Tensor, pairs: Optional[Tensor], diagonal: int) -> Tensor:
    """tril((a b^T) . Gam), (M, N, C, C)."""
    product = a @ b.transpose(-1, -2)
    if pairs is not None:
        product = product * pairs
    return product.tril(diagonal)


def running_sum(terms: Tensor, first: Optional[Tensor]) -> Tensor:
    """(M, N, dk, dv) -> (M, N + 1, dk, dv): first, first + terms_1, ... One call of cumsum, which sums a
    float32 CPU tensor in float64: a plain loop drifts by 1e-5 in 1e5 tokens of positive keys and values.
    """
    start = torch.zeros_like(terms[:, 0]) if first is None else first
    return torch.cat([start[:, None], terms], dim=1).cumsum(1)


def chunked_forward(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Optional[Tensor],
    need_state: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything in chunks; state (M, dk, dv). Returns (out, R, S0 of every chunk, final state).

    With one chunk, no state given and none wanted, no (dk, dv) matrix is ever built; unused results are empty.
    """
    chunks = k.shape[1]
    nothing = k.new_empty(0)
    pairs: Optional[Tensor] = None
    since_start: Optional[Tensor] = None
    k_end = k  # diag(g_C / g) K
    if log_decay is not None:
        pairs, since_start, until_end = decay_factors(log_decay)
        k_end = k * until_end

    insert = v if write is None else v * write[..., None]  # (M, N, C, dv)
    solve: Optional[Tensor] = None  # (I + A)^-1
    if erase is not None:
        solve = unit_lower_inverse(masked_product(erase, k, pairs, -1))

    starts, end = nothing, nothing
    stateless = state is None and chunks == 1
    if stateless:
        if solve is not None:
            insert = solve @ insert
        if need_state:
            end = (k_end.transpose(-1, -2) @ insert)[:, 0]
    elif erase is None and log_decay is None:
        states = running_sum(k.transpose(-1, -2) @ insert, state)
        starts, end = states[:, :-1], states[:, -1]
    else:
        starts = k.new_empty(k.shape[0], chunks, k.shape[-1], v.shape[-1])
        inserted = torch.empty_like(insert)
        end = k.new_zeros(k.shape[0], k.shape[-1], v.shape[-1]) if state is None else state
        for n in range(chunks):
            starts[:, n] = end
            r = insert[:, n]
            if erase is not None:
                erased = torch.bmm(erase[:, n], end)
                r = r - (erased if since_start is None else erased * since_start[:, n])
            if solve is not None:
                r = torch.bmm(solve[:, n], r)
            inserted[:, n] = r
            if since_start is not None:
                end = end * since_start[:, n, -1:]
            if need_state or n < chunks - 1:
                end = torch.baddbmm(end, k_end[:, n].transpose(1, 2), r)
        insert = inserted

    out = nothing
    if q is not None:
        out = masked_product(q, k, pairs, 0) @ insert
        if not stateless:
            carried = q @ starts
            out = out + (carried if since_start is None else carried * since_start)
    return out, insert, starts, end


def chunked_backward(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    inserted: Tensor,
    starts: Tensor,
    d_out: Optional[Tensor],
    d_end: Optional[Tensor],
) -> Tuple[Optional[Tensor], ...]:
    """Gradients (dq, dk, dv, d write, d erase, d log_decay, d state) of ``chunked_forward``, in chunks.

        dR = P^T dO + diag(g_C / g) K dS      dB = (I + A)^-T dR
        dP = tril(dO R^T)                     dA = -stril(dB R^T)
        dQ = diag(g) dO S0^T + (dP . Gam) K
        dE = (dA . Gam) K - diag(g) dB S0^T
        dK = (dP . Gam)^T Q + (dA . Gam)^T E + diag(g_C / g) R dS^T
        dS0 = g_C dS + Q^T diag(g) dO - E^T diag(g) dB
        dl_i = q_i.dq_i + e_i.de_i - k_i.dk_i,   dl_C += <dS, S_C>

    The inserted values R and the states S0 are saved by the forward; P, A and its inverse are cheaper to redo.
    """
    chunks = k.shape[1]
    has_state = starts.dim() == 4  # else the forward built none
    pairs: Optional[Tensor] = None
    since_start: Optional[Tensor] = None
    until_end: Optional[Tensor] = None
    if log_decay is not None:
        pairs, since_start, until_end = decay_factors(log_decay)

    def from_start(x: Tensor) -> Tensor:
        return x if since_start is None else x * since_start

    def to_end(x: Tensor) -> Tensor:
        return x if until_end is None else x * until_end

    reads = q is not None and d_out is not None
    d_inserted = torch.zeros_like(inserted)  # dR
    if reads:
        d_inserted = masked_product(q, k, pairs, 0).transpose(-1, -2) @ d_out
    solve = None
    if erase is not None:
        solve = unit_lower_inverse(masked_product(erase, k, pairs, -1)).transpose(-1, -2)

    d_ends = None  # dS of every chunk, (M, N, dk, dv)
    d_state = None
    k_end = to_end(k)
    if not has_state and d_end is None:
        d_insert = d_inserted if solve is None else solve @ d_inserted  # dB
    elif solve is None and since_start is None:
        terms = q.transpose(-1, -2) @ d_out if reads else k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        d_states = running_sum(terms.flip(1), d_end).flip(1)
        d_state, d_ends = d_states[:, 0], d_states[:, 1:]
        d_insert = d_inserted + k @ d_ends
    else:
        q_start = from_start(q) if reads else None
        erase_start = None if erase is None else from_start(erase)
        shape = (k.shape[0], chunks, k.shape[-1], v.shape[-1])
        d_ends, d_insert = k.new_empty(shape), torch.empty_like(d_inserted)
        d_state = k.new_zeros(shape[0], shape[2], shape[3]) if d_end is None else d_end
        for n in range(chunks - 1, -1, -1):
            d_ends[:, n] = d_state
            r = torch.baddbmm(d_inserted[:, n], k_end[:, n], d_state)
            d_insert[:, n] = r if solve is None else torch.bmm(solve[:, n], r)
            if since_start is not None:
                d_state = d_state * since_start[:, n, -1:]
            if q_start is not None:
                d_state = torch.baddbmm(d_state, q_start[:, n].transpose(1, 2), d_out[:, n])
            if erase_start is not None:
                d_state = torch.baddbmm(d_state, erase_start[:, n].transpose(1, 2), d_insert[:, n], alpha=-1)

    dq, de = None, None
    dk = torch.zeros_like(k)
    dk_end = None
    if d_ends is not None:
        dk_end = to_end(inserted @ d_ends.transpose(-1, -2))
        dk = dk + dk_end
    if reads:
        d_read = masked_product(d_out, inserted, pairs, 0)  # dP . Gam
        dq = d_read @ k
        if has_state:
            dq = dq + from_start(d_out @ starts.transpose(-1, -2))
        dk = dk + d_read.transpose(-1, -2) @ q
    elif q is not None:
        dq = torch.zeros_like(q)
    if erase is not None:
        d_erase = -masked_product(d_insert, inserted, pairs, -1)  # dA . Gam
        de = d_erase @ k
        if has_state:
            de = de - from_start(d_insert @ starts.transpose(-1, -2))
        dk = dk + d_erase.transpose(-1, -2) @ erase

    d_decay = None
    if log_decay is not None:
        d_decay = -(k * dk).sum(-1)  # (M, N, C)
        if dq is not None:
            d_decay = d_decay + (q * dq).sum(-1)
        if de is not None:
            d_decay = d_decay + (erase * de).sum(-1)
        if d_ends is not None:  # <dS, S_C>, with S_C = g_C S0 + K^T diag(g_C / g) R
            at_end = (k * dk_end).sum((-1, -2))
            if has_state:
                kept = since_start[:, :, -1, 0] * (d_ends * starts).sum((-1, -2))
                at_end = at_end + kept
            d_decay[:, :, -1] += at_end
        d_decay = d_decay.flip(-1).cumsum(-1).flip(-1)

    dw = None if write is None else (d_insert * v).sum(-1)
    dv = d_insert if write is None else d_insert * write[..., None]
    return dq, dk, dv, dw, de, d_decay, d_state


class ChunkedScan(torch.autograd.Function):
    """Saves the inputs as they came, the inserted values and the state at the start of every chunk; nothing else."""

    @staticmethod
    def forward(ctx, q, k, v, write, erase, log_decay, state, need_state, chunk_size):
        batch, heads, tokens, dk = k.shape
        ctx.length = chunk_length(tokens, chunk_size)
        ctx.dtype = sum_dtype(v)
        ctx.set_materialize_grads(False)
        parts = in_chunks(ctx, (q, k, v, write, erase, log_decay))
        flat = None if state is None else state.reshape(batch * heads, dk, v.shape[-1])
        with no_autocast(v.device.type):
            out, inserted, starts, end = chunked_forward(*parts, flat, need_state)
        ctx.save_for_backward(q, k, v, write, erase, log_decay, inserted, starts)
        ctx.has_state = state is not None
        out = None if q is None else from_chunks(out, batch, heads, tokens).to(v.dtype)
        return out, end.view(batch, heads, dk, v.shape[-1]) if need_state else None

    @staticmethod
    def backward(ctx, d_out, d_end):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "fast_weight_scan has no second derivative (create_graph=True reached its backward): "
                "use backend='reference', which autograd can differentiate any number of times"
            )
        *inputs, inserted, starts = ctx.saved_tensors
        batch, heads, tokens, dk = inputs[1].shape
        if d_out is not None:
            d_out = to_chunks(d_out.to(ctx.dtype), ctx.length)
        if d_end is not None:
            d_end = d_end.to(ctx.dtype).reshape(batch * heads, dk, d_end.shape[-1])
        with no_autocast(inserted.device.type):
            *grads, d_state = chunked_backward(*in_chunks(ctx, inputs), inserted, starts, d_out, d_end)
        grads = [
            None if g is None else from_chunks(g, batch, heads, tokens).to(x.dtype)
            for g, x in zip(grads, inputs)
        ]
        if not ctx.has_state:
            d_state = None
        elif d_state is None:
            d_state = d_end.new_zeros(batch * heads, dk, inputs[2].shape[-1])
        if d_state is not None:
            d_state = d_state.view(batch, heads, dk, -1)
        return (*grads, d_state, None, None)


def in_chunks(ctx, inputs) -> list:
    """The inputs in float32 (or float64) and in chunks."""
    return [None if x is None else to_chunks(x.to(ctx.dtype), ctx.length) for x in inputs]


def chunked_scan(
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
    """Backend "chunked" of ``fast_weight_scan``; same arguments, already checked."""
    if k.shape[2] == 0:  # nothing to write: keep the graph to the state alone
        out = None if q is None else v.new_zeros(v.shape)
        if not need_state:
            return out, None
        shape = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
        return out, v.new_zeros(shape, dtype=sum_dtype(v)) if state is None else state.clone()
    return ChunkedScan.apply(q, k, v, write, erase_keys(erase, k), log_decay, state, need_state, chunk_size)


def scriptable_scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    log_decay: Optional[Tensor],
    state: Optional[Tensor],
    chunk_size: Optional[int],
) -> Tuple[Tensor, Tensor]:
    """The forward alone, for TorchScript, which knows no autograd.Function. All inputs of one dtype, T >= 1.

    Returns (out, state); out is empty without q.
    """
    batch, heads, tokens, dk = k.shape
    length = chunk_length(tokens, chunk_size)
    erase = erase_keys(erase, k)
    out, _, _, end = chunked_forward(
        None if q is None else to_chunks(q, length),
        to_chunks(k, length),
        to_chunks(v, length),
        None if write is None else to_chunks(write, length),
        None if erase is None else to_chunks(erase, length),
        None if log_decay is None else to_chunks(log_decay, length),
        None if state is None else state.reshape(batch * heads, dk, v.shape[-1]),
        True,
    )
    if q is not None:
        out = from_chunks(out, batch, heads, tokens)
    return out, end.view(batch, heads, dk, v.shape[-1])
