"""The delta rule whose memory is scaled back to norm 1 (Schlag, Munkhdalai and Schmidhuber, ICLR 2021).

    r_t = beta_t (v_t - W_{t-1}^T k_t)
    X_t = W_{t-1} + k_t r_t^T
    W_t = X_t / max(1, |X_t|)        Frobenius norm; W_1 = X_1

The scale depends on the memory, so the rule is serial in time. |X_t|^2 needs no pass over X_t: it is
|W_{t-1}|^2 + 2 r_t . (W_{t-1}^T k_t) + |k_t|^2 |r_t|^2. The backward, with d for the gradient and W = W_t:

    dX = (dW - <dW, W> W) / |X|      where scaled, else dW
    dk = dX r + W_{t-1} d_old,       dr = dX^T k,       dv = beta dr = -d_old,       d_beta = dr . (v - old)
    dW_{t-1} = dX + k d_old^T

<dW, W> needs no pass either: <dW_{t-1}, W_{t-1}> = <dX, X> - r . dr + d_old . old, and <dX, X> is 0 where scaled.
"""

import math

import torch
from torch import Tensor

from ..errors import FastWeightError
from . import numba_scan
from .checks import check_beta, check_operands
from .chunked import no_autocast, sum_dtype


def norm_clipped_reference(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The formulas as they stand; arguments and result as for ``norm_clipped_write``."""
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    for t in range(k.shape[2]):
        old = (k[:, :, t, None, :] @ state)[:, :, 0]  # (B, H, dv)
        inserted = beta[:, :, t, None] * (v[:, :, t] - old)
        state = state + k[:, :, t, :, None] * inserted[:, :, None, :]
        if t > 0:
            norm = state.flatten(2).norm(dim=-1)  # (B, H)
            state = state / norm.clamp(min=1)[..., None, None]
    return state


class NormClippedWrite(torch.autograd.Function):
    """``numba_norm_clipped`` on torch tensors."""

    @staticmethod
    def forward(ctx, k, v, beta):
        k, v, beta = k.contiguous(), v.contiguous(), beta.contiguous()
        rows, tokens, dk, dv = k.shape[:2], k.shape[2], k.shape[3], v.shape[3]
        ctx.sizes = sizes = (max(1, math.isqrt(tokens)), tokens, dk, dv)  # tokens of a stretch first
        stretches = -(-tokens // sizes[0])
        state, errors = k.new_empty(*rows, dk, dv), torch.empty_like(v)
        scales, kept = torch.empty_like(beta), k.new_empty(*rows, stretches, dk * dv)
        run("norm_clipped_forward", sizes, [k, v, beta, state, errors, scales, kept])
        ctx.save_for_backward(k, v, beta, errors, scales, kept, state)
        return state

    @staticmethod
    def backward(ctx, d_state):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "norm_clipped_write has no second derivative (create_graph=True reached its backward): "
                "use norm_clipped_reference"
            )
        k, v, beta, errors, scales, kept, state = ctx.saved_tensors
        dk, dv, d_beta = torch.empty_like(k), torch.empty_like(errors), torch.empty_like(beta)
        used_up = d_state.clone(memory_format=torch.contiguous_format)
        operands = [k, v, beta, errors, scales, kept, used_up, dk, dv, d_beta, state]
        run("norm_clipped_backward", ctx.sizes, operands)
        return dk, dv, d_beta


def run(name: str, sizes: tuple, operands: list) -> None:
    """beta and the scales (B, H, T) go as one row of T."""
    with_rows = [x if x.dim() == 4 else x[:, :, None] for x in operands]
    numba_scan.run(name, sizes, with_rows, operands[0].numel() * sizes[-1])


def norm_clipped_write(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The memory W_T after writing all tokens, from W_0 = 0.

    Args: k (B, H, T, dk), v (B, H, T, dv), beta (B, H, T), on any device; the CPU has a kernel.
    Returns: (B, H, dk, dv) in float32 (float64 for float64). Differentiable once (any number of times where there is
        no kernel).
    Raises: FastWeightError (a ValueError): wrong shapes, dtypes or devices.
    """
    check_beta(beta, k)
    check_operands(None, k, v, beta, None, None, None, tokens=True)
    k, v, beta = (x.to(sum_dtype(v)) for x in (k, v, beta))
    has_kernel = k.device.type == "cpu" and k.numel() > 0 and v.numel() > 0 and numba_scan.refusal() is None
    with no_autocast(k.device.type):
        return NormClippedWrite.apply(k, v, beta) if has_kernel else norm_clipped_reference(k, v, beta)
