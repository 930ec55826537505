"""The norm-clipped delta rule and its backward, as CPU kernels: the host and the formulas are in ``norm_clipped``.

Serial in time. A token takes one pass over W forward, the write folded into the read of the next key; the backward
computes the states of a stretch of tokens again from the one kept at its beginning: going back by reversing the writes
would multiply the rounding by 1 / scale at every token. This file imports numba; import it only through ``numba_scan``.
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
def through_scale(grad, along, state, scale):
    """grad = scale (grad - along state): the derivative of X / |X|, whose result is ``state``"""
    for i in range(grad.shape[0]):
        for j in range(grad.shape[1]):
            grad[i, j] = scale * (grad[i, j] - along * state[i, j])


@njit(**OPTIONS)
def write_backward(grad, k, r, dk, dr):
    """dk = grad r, dr = grad^T k"""
    dr[:] = 0
    for i in range(grad.shape[0]):
        dk[i] = dot(grad[i], r)
        for j in range(grad.shape[1]):
            dr[j] += k[i] * grad[i, j]


@njit(**OPTIONS)
def read_backward(grad, state, k, d_old, dk):
    """grad += k d_old^T, dk += state d_old; <grad, state> is returned"""
    along = grad.dtype.type(0)
    for i in range(grad.shape[0]):
        dk[i] += dot(state[i], d_old)
        for j in range(grad.shape[1]):
            grad[i, j] += k[i] * d_old[j]
        along += dot(grad[i], state[i])
    return along


@njit(**OPTIONS)
def norm_clipped_backward(job, number):
    """dk, dv, d_beta from d_state, which is used up."""
    K, BETA, ERRORS, SCALES, KEPT, D_STATE, D_K, D_V, D_BETA, STATE = range(10)
    stretch, tokens, dk_, dv_ = job[3], job[4], job[5], job[6]
    stretches = (tokens + stretch - 1) // stretch
    states = np.empty((stretch + 1, dk_, dv_), number)
    r, dr, d_old, unused = (
        np.empty(dv_, number),
        np.empty(dv_, number),
        np.empty(dv_, number),
        np.empty(dv_, number),
    )
    head = take_next(job)
    while head < job[1]:
        k, beta = matrix(job, K, head, tokens, dk_, number), matrix(job, BETA, head, 1, tokens, number)[0]
        errors = matrix(job, ERRORS, head, tokens, dv_, number)
        scales = matrix(job, SCALES, head, 1, tokens, number)[0]
        kept = matrix(job, KEPT, head, stretches, dk_ * dv_, number)
        grad = matrix(job, D_STATE, head, dk_, dv_, number)
        dk, dv = matrix(job, D_K, head, tokens, dk_, number), matrix(job, D_V, head, tokens, dv_, number)
        d_beta = matrix(job, D_BETA, head, 1, tokens, number)[0]
        along = dot(grad.ravel(), matrix(job, STATE, head, 1, dk_ * dv_, number)[0])  # <dW, W>
        for part in range(stretches - 1, -1, -1):
            first, last = part * stretch, min((part + 1) * stretch, tokens)
            states[0] = kept[part].reshape(dk_, dv_)
            for t in range(first, last):
                for j in range(dv_):
                    r[j] = beta[t] * errors[t, j]
                states[t - first + 1] = states[t - first]
                write_and_read(states[t - first + 1], scales[t], k[t], r, k[t], unused)
            for t in range(last - 1, first - 1, -1):
                before, after = states[t - first], states[t - first + 1]
                for j in range(dv_):
                    r[j] = beta[t] * errors[t, j]
                if scales[t] < 1:
                    through_scale(grad, along, after, scales[t])
                write_backward(grad, k[t], r, dk[t], dr)
                d_beta[t] = dot(dr, errors[t])
                for j in range(dv_):
                    dv[t, j] = beta[t] * dr[j]
                    d_old[j] = -dv[t, j]
                along = read_backward(grad, before, k[t], d_old, dk[t])
        head = take_next(job)
