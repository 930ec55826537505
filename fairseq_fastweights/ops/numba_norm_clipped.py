"""The norm-clipped delta rule and its backward, as CPU kernels: the host and the formulas are in ``norm_clipped``.

Serial in time. A token takes one pass over W forward, the write folded into the read of the next key, and one over W
and its gradient backward. The states of a stretch of tokens are computed again from the one kept at its beginning:
going back by reversing the writes would multiply the rounding by 1 / scale at every token. This file imports numba;
import it only through ``numba_scan``.
"""

import numpy as np
from numba import carray, njit

from .numba_decode import dot
from .numba_kernels import OPTIONS, of_head, pointer, take_next


@njit(**OPTIONS)
def matrix(job, operand, head, rows, columns, number):
    """The contiguous rows of an operand that belong to a head."""
    return carray(pointer(of_head(job, operand, head)[0]), (rows, columns), number)


@njit(**OPTIONS)
def write_and_read(state, scale, k, r, next_k, old):
    """state = scale (state + k r^T), old = state^T next_k"""
    old[:] = 0
    for i in range(state.shape[0]):
        row, inserted, read = state[i], scale * k[i], next_k[i]
        for j in range(row.shape[0]):
            row[j] = scale * row[j] + inserted * r[j]
            old[j] += read * row[j]


@njit(**OPTIONS)
def norm_clipped_forward(job, number):
    """state, and for the backward: error = v - old, scale = 1 / max(1, |X|), the states before every stretch."""
    K, V, BETA, STATE, ERRORS, SCALES, KEPT = range(7)
    stretch, tokens, dk, dv = job[3], job[4], job[5], job[6]
    stretches = (tokens + stretch - 1) // stretch
    old, r = np.zeros(dv, number), np.empty(dv, number)
    head = take_next(job)
    while head < job[1]:
        k, v = matrix(job, K, head, tokens, dk, number), matrix(job, V, head, tokens, dv, number)
        beta = matrix(job, BETA, head, 1, tokens, number)[0]
        state = matrix(job, STATE, head, dk, dv, number)
        errors = matrix(job, ERRORS, head, tokens, dv, number)
        scales = matrix(job, SCALES, head, 1, tokens, number)[0]
        kept = matrix(job, KEPT, head, stretches, dk * dv, number)
        state[:] = 0
        old[:] = 0
        square = number(0)  # |W|^2
        for t in range(tokens):
            if t % stretch == 0:
                kept[t // stretch] = state.ravel()
            for j in range(dv):
                errors[t, j] = v[t, j] - old[j]
                r[j] = beta[t] * errors[t, j]
            square += number(2) * dot(r, old) + dot(k[t], k[t]) * dot(r, r)  # |X|^2
            scales[t] = number(1)
            if t > 0 and square > 1:
                scales[t] = number(1) / np.sqrt(square)
                square = number(1)
            write_and_read(state, scales[t], k[t], r, k[min(t + 1, tokens - 1)], old)
        head = take_next(job)


@njit(**OPTIONS)
def write(before, scale, k, r, after):
    """after = scale (before + k r^T)"""
    for i in range(before.shape[0]):
        row, result, inserted = before[i], after[i], scale * k[i]
        for j in range(row.shape[0]):
            result[j] = scale * row[j] + inserted * r[j]


@njit(**OPTIONS)
def back_to_write(grad, state, scale, along, next_k, d_old, next_dk, k, r, dk, dr):
    """From dX of the next token to that of this one, in one pass; ``state`` is W between the two.

    next_dk += state d_old, dW = grad + next_k d_old^T; grad = scale (dW - along state); dk = grad r, dr = grad^T k
    """
    dr[:] = 0
    for i in range(grad.shape[0]):
        row, kept, read, written = grad[i], state[i], next_k[i], k[i]
        of_read = of_write = grad.dtype.type(0)
        for j in range(row.shape[0]):
            of_read += kept[j] * d_old[j]
            row[j] = scale * (row[j] + read * d_old[j] - along * kept[j])
            of_write += row[j] * r[j]
            dr[j] += written * row[j]
        next_dk[i] += of_read
        dk[i] = of_write


@njit(**OPTIONS)
def norm_clipped_backward(job, number):
    """dk, dv, d_beta from d_state, which is used up."""
    K, V, BETA, ERRORS, SCALES, KEPT, D_STATE, D_K, D_V, D_BETA, STATE = range(11)
    stretch, tokens, dk_, dv_ = job[3], job[4], job[5], job[6]
    stretches = (tokens + stretch - 1) // stretch
    states = np.empty((stretch, dk_, dv_), number)  # after every token of a stretch
    r, dr, d_old = np.empty(dv_, number), np.empty(dv_, number), np.empty(dv_, number)
    head = take_next(job)
    while head < job[1]:
        k, v = matrix(job, K, head, tokens, dk_, number), matrix(job, V, head, tokens, dv_, number)
        beta = matrix(job, BETA, head, 1, tokens, number)[0]
        errors = matrix(job, ERRORS, head, tokens, dv_, number)
        scales = matrix(job, SCALES, head, 1, tokens, number)[0]
        kept = matrix(job, KEPT, head, stretches, dk_ * dv_, number)
        grad = matrix(job, D_STATE, head, dk_, dv_, number)
        dk, dv = matrix(job, D_K, head, tokens, dk_, number), matrix(job, D_V, head, tokens, dv_, number)
        d_beta = matrix(job, D_BETA, head, 1, tokens, number)[0]
        along = dot(grad.ravel(), matrix(job, STATE, head, 1, dk_ * dv_, number)[0])  # <dW, W>
        d_old[:] = 0  # nothing reads after the last token
        for part in range(stretches - 1, -1, -1):
            first, last = part * stretch, min((part + 1) * stretch, tokens)
            before = kept[part].reshape(dk_, dv_)
            for t in range(first, last):
                for j in range(dv_):
                    r[j] = beta[t] * errors[t, j]
                write(before, scales[t], k[t], r, states[t - first])
                before = states[t - first]
            for t in range(last - 1, first - 1, -1):
                for j in range(dv_):
                    r[j] = beta[t] * errors[t, j]
                scaled, after, state = scales[t] < 1, min(t + 1, tokens - 1), states[t - first]
                projected = along if scaled else number(0)
                back_to_write(
                    grad, state, scales[t], projected, k[after], d_old, dk[after], k[t], r, dk[t], dr
                )
                d_beta[t] = dot(dr, errors[t])
                # <dX, X> is 0 where scaled, <dW, W> elsewhere; X and W before differ by k r^T, dX and dW by k d_old^T
                along -= projected + dot(r, dr)
                for j in range(dv_):
                    dv[t, j] = beta[t] * dr[j]
                    d_old[j] = -dv[t, j]
                    along += d_old[j] * (v[t, j] - errors[t, j])
        head = take_next(job)
