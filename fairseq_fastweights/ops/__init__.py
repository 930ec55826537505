"""Fast-weight operators: plain functions of tensors. They import torch only and know nothing of fairseq.

from fairseq_fastweights.ops import delta_rule
out, state = delta_rule(q, k, v, beta)
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..errors import FastWeightError
from . import dispatch
from .checks import check_beta, check_chunk_size, check_operands
from .chunked import no_autocast

__all__ = ["fast_weight_scan", "fast_weight_step", "sum_rule", "delta_rule"]


def fast_weight_scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    *,
    write: Optional[Tensor] = None,
    erase: Optional[Tensor] = None,
    log_decay: Optional[Tensor] = None,
    state: Optional[Tensor] = None,
    return_state: bool = True,
    chunk_size: Optional[int] = None,
    backend: str = "auto",
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Program the fast weights token by token and read them after every write.

    Per batch row and head, with the state S in R^(dk x dv), w = write, e = erase, a = exp(log_decay):

        r_t = w_t v_t - a_t S_{t-1}^T e_t
        S_t = a_t S_{t-1} + k_t r_t^T
        o_t = S_t^T q_t

    Args:
        q: (B, H, T, dk), or None to write without reading (out is None then).
        k: (B, H, T, dk) keys, after feature map and normalisation.
        v: (B, H, T, dv) values. dk and dv are independent; T may be 0.
        write: (B, H, T), None means 1.
        erase: (B, H, T, dk), or (B, H, T) for the erase keys erase_t k_t; None means 0 (nothing is erased).
        log_decay: (B, H, T), finite and <= 0, None means 0 (nothing decays). A token below about -100 forgets
            everything; far below that, all backends but "reference" round what follows in its chunk (1e-4 at -1000).
        state: (B, H, dk, dv) to start from, None means zeros. Never modified.
        return_state: whether the final state is wanted. Without it, and without ``state``, a sequence of at
            most one chunk never builds a state.
        chunk_size: longest chunk of the chunked backend, None lets the backend choose.
        backend: "auto", "reference", "chunked", "numba" or "cuda".

    q, k, v share one dtype of float64, float32, bfloat16, float16; write, erase and log_decay may be float32
    beside half-precision ones. The state and all sums are float32 (float64 for float64 inputs).

    Returns:
        (out, state): out (B, H, T, dv) in the dtype of v; state (B, H, dk, dv), or None if not wanted.
        Differentiable once in every input, any number of times with backend="reference".

    Raises:
        FastWeightError (a ValueError): an argument has a wrong shape, dtype or device, or the backend is
            unknown or cannot run on this device.
    """
    check_operands(q, k, v, write, erase, log_decay, state, tokens=True)
    check_chunk_size(chunk_size)
    scan = dispatch.choose(backend, k.device)
    return scan(q, k, v, write, erase, log_decay, state, return_state, chunk_size)


def fast_weight_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    write: Optional[Tensor] = None,
    erase: Optional[Tensor] = None,
    log_decay: Optional[Tensor] = None,
    state: Tensor,
    parent: Optional[Tensor] = None,
    out_state: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """One token of ``fast_weight_scan``, for decoding: the same arguments without the T axis.

    Args:
        q, k: (B, H, dk). erase: (B, H, dk) or (B, H). v: (B, H, dv). write, log_decay: (B, H).
        state: (B', H, dk, dv); B' = B unless ``parent`` is given.
        parent: (B,) int64; row b continues from state[parent[b]], as beam search reorders its rows.
        out_state: (B, H, dk, dv), written in place and returned; may be ``state`` itself. None allocates.

    Returns:
        (out, state): out (B, H, dv) in the dtype of v, and the new state.

    Raises:
        FastWeightError (a ValueError): wrong shape, dtype or device, or a gradient is asked for: this
            function has none, use ``fast_weight_scan``.
    """
    _check_step(q, k, v, write, erase, log_decay, state, parent, out_state)
    with torch.no_grad(), no_autocast(v.device.type):
        return dispatch.choose_step(k, v)(q, k, v, write, erase, log_decay, state, parent, out_state)


def _check_step(q, k, v, write, erase, log_decay, state, parent, out_state) -> None:
    rows_given = state if parent is None else out_state
    check_operands(q, k, v, write, erase, log_decay, rows_given, tokens=False)
    if parent is not None:
        if parent.dtype != torch.int64 or tuple(parent.shape) != (k.shape[0],):
            raise FastWeightError(
                f"parent must be int64 of shape ({k.shape[0]},), got {parent.dtype} {tuple(parent.shape)}"
            )
        if parent.device != k.device:
            raise FastWeightError(f"parent is on {parent.device} but k is on {k.device}: move one of them")
        source = state[:1].expand(k.shape[0], *state.shape[1:]) if state.dim() == 4 else state
        check_operands(q, k, v, None, None, None, source, tokens=False)
    elif out_state is not None:
        check_operands(q, k, v, None, None, None, out_state, tokens=False)
    inputs = (q, k, v, write, erase, log_decay, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise FastWeightError(
            "fast_weight_step is for inference only: call it under torch.no_grad(), or use fast_weight_scan"
        )


def sum_rule(
    q: Optional[Tensor], k: Tensor, v: Tensor, state: Optional[Tensor] = None, **options
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """S_t = S_{t-1} + k_t v_t^T, o_t = S_t^T q_t: linear attention without its normaliser.

    Shapes, options (return_state, chunk_size, backend) and returns as in ``fast_weight_scan``.
    """
    return fast_weight_scan(q, k, v, state=state, **options)


def delta_rule(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Optional[Tensor] = None,
    **options,
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t: the paper's equations 20 to 25.

    beta (B, H, T), in [0, 1] with beta |k|^2 <= 2 for a stable recurrence; everything else as in
    ``fast_weight_scan``.
    """
    check_beta(beta, k)
    return fast_weight_scan(q, k, v, write=beta, erase=beta, state=state, **options)
