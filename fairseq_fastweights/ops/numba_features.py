"""Feature map and key normalisation in one pass over the projections, as CPU kernels: the host is ``numba_scan``.

    y = phi(x);  out = scale y / sum(y)   (sum),   scale y / |y|   (l2)   or   scale y   (none)

One row is one token of one head. A map is two functions of rows and an entry in ``MAPS``. This file imports numba;
import it only through ``numba_scan``.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .numba_kernels import OPTIONS, load, of_head, store, take_next

MAPS = ("elu", "relu", "dpfp")
NORMALIZATIONS = ("sum", "l2", "none")
ELU, RELU, DPFP = range(3)
SUM, L2, NONE = range(3)
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693145751953125, 1.42860682030941723e-6


@intrinsic
def power_of_two(typing_context, n):
    """2.0**n as float32 for an int32 n from -126 to 127."""

    def codegen(context, builder, signature, arguments):
        exponent = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@njit(**OPTIONS)
def exp_of_negative(x, y):
    """y = exp(min(x, 0)), in float32 by a polynomial that fills vectors (Taylor to x^7 on |x| <= ln(2)/2: 1e-7)."""
    if x.itemsize == 8:
        for i in range(x.shape[0]):
            y[i] = np.exp(min(x[i], x.dtype.type(0)))
    else:
        for i in range(x.shape[0]):
            a = max(min(np.float32(x[i]), np.float32(0)), np.float32(-87))
            n = np.int32(a * np.float32(LOG2_E) - np.float32(0.5))  # rounds to the nearest, as a <= 0
            r = a - np.float32(n) * np.float32(LN2_HIGH) - np.float32(n) * np.float32(LN2_LOW)
            p = np.float32(1 / 5040)
            for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
                p = p * r + np.float32(c)
            y[i] = p * power_of_two(n)


@njit(**OPTIONS)
def positive(x, zero):
    """max(x, 0), and nan for nan; zero of the same type."""
    return x if not x <= zero else zero


@njit(**OPTIONS)
def elu(x, y):
    zero = x.dtype.type(0)
    exp_of_negative(x, y)
    for i in range(x.shape[0]):
        y[i] += positive(x[i], zero)


@njit(**OPTIONS)
def elu_backward(x, y, dy, dx):
    one = x.dtype.type(1)
    for i in range(x.shape[0]):
        dx[i] = dy[i] * min(y[i], one)  # exp(x) below 0, 1 above


@njit(**OPTIONS)
def relu(x, y):
    zero = x.dtype.type(0)
    for i in range(x.shape[0]):
        y[i] = positive(x[i], zero)


@njit(**OPTIONS)
def relu_backward(x, y, dy, dx):
    for i in range(x.shape[0]):
        dx[i] = dy[i] if x[i] > 0 else x.dtype.type(0)


@njit(**OPTIONS)
def both_signs(x, both):
    """both = [relu(x), relu(-x)]"""
    width, zero = x.shape[0], x.dtype.type(0)
    for i in range(width):
        both[i] = positive(x[i], zero)
        both[width + i] = positive(-x[i], zero)


@njit(**OPTIONS)
def dpfp(x, y, both):
    both_signs(x, both)
    size = both.shape[0]
    for roll in range(1, y.shape[0] // size + 1):
        part = y[(roll - 1) * size : roll * size]
        for i in range(roll):
            part[i] = both[i] * both[i - roll + size]
        for i in range(roll, size):
            part[i] = both[i] * both[i - roll]


@njit(**OPTIONS)
def dpfp_backward(x, dy, dx, both, d_both):
    size = both.shape[0]
    d_both[:] = 0
    for roll in range(1, dy.shape[0] // size + 1):
        part = dy[(roll - 1) * size : roll * size]
        for i in range(roll):
            d_both[i] += part[i] * both[i - roll + size]
            d_both[i - roll + size] += part[i] * both[i]
        for i in range(roll, size):
            d_both[i] += part[i] * both[i - roll]
        for i in range(roll, size):
            d_both[i - roll] += part[i] * both[i]
    width = x.shape[0]
    for i in range(width):
        dx[i] = (d_both[i] if x[i] > 0 else x.dtype.type(0)) - (
            d_both[width + i] if x[i] < 0 else x.dtype.type(0)
        )


@njit(**OPTIONS)
def features(kind, x, y, both):
    if kind == ELU:
        elu(x, y)
    elif kind == RELU:
        relu(x, y)
    else:
        dpfp(x, y, both)


@njit(**OPTIONS)
def size_of(normalization, y, smallest):
    """The sum or length of y, 0 where it is too small to divide by."""
    total = y.dtype.type(0)
    if normalization == SUM:
        for i in range(y.shape[0]):
            total += y[i]
        return total if total > smallest else y.dtype.type(0)
    largest = y.dtype.type(0)
    for i in range(y.shape[0]):
        largest = max(largest, abs(y[i]))
    if not largest > smallest:
        return y.dtype.type(0)
    for i in range(y.shape[0]):  # of y / max|y|, since squares of small features underflow
        total += (y[i] / largest) ** 2
    return largest * np.sqrt(total)


@njit(**OPTIONS)
def factor_of(normalization, y, scale, smallest):
    """What y is multiplied by, and its size."""
    if normalization == NONE:
        return scale, scale
    size = size_of(normalization, y, smallest)
    return (scale / size if size > 0 else size), size


@njit(**OPTIONS)
def address_forward(job, number):
    """out (B, H, T, dv) from x (B, H, T, dk), one head after another; job[3] holds map and normalisation."""
    X, SETTINGS, OUT = range(3)
    kind, normalization, tokens, width = job[3] // 8, job[3] % 8, job[4], job[5]
    x, y, both = np.empty((1, width), number), np.empty((1, job[6]), number), np.empty(2 * width, number)
    settings = np.empty((1, 2), number)
    load(settings, of_head(job, SETTINGS, 0), 2, 0, 1, 1)
    scale, smallest = settings[0]
    head = take_next(job)
    while head < job[1]:
        for t in range(tokens):
            load(x, of_head(job, X, head), width, t, 1, 1)
            features(kind, x[0], y[0], both)
            factor, _ = factor_of(normalization, y[0], scale, smallest)
            for i in range(y.shape[1]):
                y[0, i] *= factor
            store(of_head(job, OUT, head), y, y.shape[1], t, 1)
        head = take_next(job)


@njit(**OPTIONS)
def address_backward(job, number):
    """dx from d_out, with the features computed again."""
    X, SETTINGS, D_OUT, D_X = range(4)
    kind, normalization, tokens, width = job[3] // 8, job[3] % 8, job[4], job[5]
    x, dx = np.empty((1, width), number), np.empty((1, width), number)
    y, dy = np.empty((1, job[6]), number), np.empty((1, job[6]), number)
    both, d_both = np.empty(2 * width, number), np.empty(2 * width, number)
    settings = np.empty((1, 2), number)
    load(settings, of_head(job, SETTINGS, 0), 2, 0, 1, 1)
    scale, smallest = settings[0]
    head = take_next(job)
    while head < job[1]:
        for t in range(tokens):
            load(x, of_head(job, X, head), width, t, 1, 1)
            load(dy, of_head(job, D_OUT, head), y.shape[1], t, 1, 1)
            features(kind, x[0], y[0], both)
            factor, size = factor_of(normalization, y[0], scale, smallest)
            if normalization != NONE and size > 0:
                along = number(0)
                for i in range(y.shape[1]):
                    along += dy[0, i] * (y[0, i] / size)
                for i in range(y.shape[1]):
                    dy[0, i] -= along if normalization == SUM else along * (y[0, i] / size)
            for i in range(y.shape[1]):
                dy[0, i] *= factor
            if kind == ELU:
                elu_backward(x[0], y[0], dy[0], dx[0])
            elif kind == RELU:
                relu_backward(x[0], y[0], dy[0], dx[0])
            else:
                dpfp_backward(x[0], dy[0], dx[0], both, d_both)
            store(of_head(job, D_X, head), dx, width, t, 1)
        head = take_next(job)
