"""One decoding token for every row and head, as a CPU kernel: the host is ``lazy_state``.

    r = w v - S^T e        S = g S_base + sum_j exp(l - l_j) k_j r_j^T over the pairs written since S_base
    o = S^T q + (k . q) r

with l the sum of log_decay since S_base. Pair j of a row stands in slot j at the row that was its ancestor then.
This file imports numba; import it only through ``numba_scan``.
"""

import numpy as np
from numba import carray, njit

from .numba_kernels import FIRST_OPERAND, OPTIONS, given, pointer, take_next


@njit(**OPTIONS)
def numbers_at(job, operand, a, b, c, count, number):
    """``count`` neighbouring numbers of an operand at index [a, b, c]."""
    at = FIRST_OPERAND + 4 * operand
    return carray(pointer(job[at] + a * job[at + 1] + b * job[at + 2] + c * job[at + 3]), count, number)


@njit(**OPTIONS)
def dot(x, y):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@njit(**OPTIONS)
def add_twice(r, o, row, erase, read):
    """r -= erase row; o += read row"""
    for j in range(row.shape[0]):
        r[j] -= erase * row[j]
        o[j] += read * row[j]


@njit(**OPTIONS)
def decode(job, number):
    Q, K, V, WRITE, ERASE, STRENGTH, DECAY, OUT, KEYS, INSERTED, TOTALS, ANCESTORS, BASE, BASE_ROWS = range(
        14
    )
    count, dk, dv = job[3], job[5], job[6]
    heads = job[2]
    e, r, o = np.empty(dk, number), np.empty(dv, number), np.empty(dv, number)
    decays, erases, has_base = given(job, DECAY), given(job, ERASE) or given(job, STRENGTH), given(job, BASE)
    head = take_next(job)
    while head < job[1]:
        row, h = head // heads, head % heads
        ancestors = numbers_at(job, ANCESTORS, row, 0, 0, count + 1, np.int64)
        q, k, v = (
            numbers_at(job, Q, row, h, 0, dk, number),
            numbers_at(job, K, row, h, 0, dk, number),
            numbers_at(job, V, row, h, 0, dv, number),
        )
        write = numbers_at(job, WRITE, row, h, 0, 1, number)[0] if given(job, WRITE) else number(1)
        for j in range(dv):
            r[j] = write * v[j]
            o[j] = 0
        if given(job, STRENGTH):
            strength = numbers_at(job, STRENGTH, row, h, 0, 1, number)[0]
            for i in range(dk):
                e[i] = strength * k[i]
        elif given(job, ERASE):
            e[:] = numbers_at(job, ERASE, row, h, 0, dk, number)
        total = number(0)
        if decays:
            total = numbers_at(job, DECAY, row, h, 0, 1, number)[0]
            if count > 0:
                total += numbers_at(job, TOTALS, count - 1, ancestors[count - 1], h, 1, number)[0]
        for j in range(count):
            key = numbers_at(job, KEYS, j, ancestors[j], h, dk, number)
            kept = number(1)
            if decays:
                kept = np.exp(total - numbers_at(job, TOTALS, j, ancestors[j], h, 1, number)[0])
            erase = kept * dot(key, e) if erases else number(0)
            add_twice(
                r, o, numbers_at(job, INSERTED, j, ancestors[j], h, dv, number), erase, kept * dot(key, q)
            )
        if has_base:
            kept = np.exp(total)
            base_row = numbers_at(job, BASE_ROWS, row, 0, 0, 1, np.int64)[0]
            for i in range(dk):
                erase = kept * e[i] if erases else number(0)
                add_twice(r, o, numbers_at(job, BASE, base_row, h, i, dv, number), erase, kept * q[i])
        read = dot(k, q)
        out = numbers_at(job, OUT, row, h, 0, dv, number)
        new_key = numbers_at(job, KEYS, count, row, h, dk, number)
        new_inserted = numbers_at(job, INSERTED, count, row, h, dv, number)
        for j in range(dv):
            out[j] = o[j] + read * r[j]
            new_inserted[j] = r[j]
        for i in range(dk):
            new_key[i] = k[i]
        if decays:
            numbers_at(job, TOTALS, count, row, h, 1, number)[0] = total
        if h == 0:
            ancestors[count] = row
        head = take_next(job)
