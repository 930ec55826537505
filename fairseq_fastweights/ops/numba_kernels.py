"""The chunk-parallel scan of ``chunked.py`` as two CPU kernels, compiled by numba when they are first used.

A core takes one head after another and keeps its chunk, its state and all products in its own cache. Everything is
a product of small matrices, done by one register tile, ``add_tile``, at about the processor's peak; the
triangular ones skip the half that is zero. Formulas and names are those of ``chunked.py``, with N = -E so that every
product is added:

    R = diag(w) V + diag(g) N S0 + A R       A = stril((N K^T) . Gam)
    O = diag(g) Q S0 + P R                   P = tril((Q K^T) . Gam)
    S_C = g_C S0 + K^T diag(g_C / g) R

The backward is two sweeps: one from the end carries dS, one from the start carries S, so no state is saved
between forward and backward, whatever the length.

A missing operand comes as an array of size 0, so that there is one kernel a dtype. Work arrays have their rows
padded to ``PAD`` with zeros. This file imports numba; import it only through ``numba_scan``.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 4  # rows of a register tile; its columns are two vectors
VECTOR = 32  # bytes
PAD = 16  # work arrays have a multiple of this many columns: whole tiles in float32 and float64

# products may be fused with sums and sums reordered, but nan and inf mean what they mean
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


@intrinsic
def tile(typing_context, out, out_row, a, a_row, a_column, b, b_row, inner, keep, like):
    """out[:4, :2 vectors] = keep * out + a[:4, :inner] @ b[:inner, :2 vectors], with the sums in registers.

    out, a, b are addresses; the strides of rows and columns are in bytes; keep is True or False; ``like`` is an
    array of the dtype.
    """
    number = like.dtype
    size = number.bitwidth // 8
    lanes = VECTOR // size

    def codegen(context, builder, signature, arguments):
        out, out_row, a, a_row, a_column, b, b_row, inner, keep, _ = arguments
        scalar = context.get_value_type(number)
        vector = ir.VectorType(scalar, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

        def at(base, *offsets):
            for stride, count in offsets:
                base = builder.add(base, builder.mul(stride, count))
            return base

        def constant(value):
            return ir.Constant(inner.type, value)

        def load_vector(address):
            x = builder.load(builder.inttoptr(address, vector.as_pointer()))
            x.align = size
            return x

        def load_everywhere(address):
            x = builder.load(builder.inttoptr(address, scalar.as_pointer()))
            x = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(x, undefined, first_lane)

        places = [(row, half) for row in range(TILE) for half in range(2)]
        targets = [
            at(out, (out_row, constant(row)), (constant(VECTOR), constant(half))) for row, half in places
        ]
        zero = ir.Constant(vector, None)
        sums = [
            cgutils.alloca_once_value(builder, builder.select(keep, load_vector(target), zero))
            for target in targets
        ]
        with cgutils.for_range(builder, inner) as loop:
            halves = [load_vector(at(b, (b_row, loop.index), (constant(VECTOR), constant(h)))) for h in (0, 1)]
            column = at(a, (a_column, loop.index))
            factors = [load_everywhere(at(column, (a_row, constant(row)))) for row in range(TILE)]
            for (row, half), total in zip(places, sums):
                term = builder.fmul(factors[row], halves[half], flags=["contract"])
                builder.store(builder.fadd(term, builder.load(total), flags=["contract"]), total)
        for target, total in zip(targets, sums):
            stored = builder.store(builder.load(total), builder.inttoptr(target, vector.as_pointer()))
            stored.align = size
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, types.boolean, like), codegen


@intrinsic
def copy_bytes(typing_context, target, source, count):
    """memcpy between two addresses."""

    def codegen(context, builder, signature, arguments):
        target, source, count = arguments
        pointer = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(
            builder, builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), count, 1
        )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


# Products. Rows come in tiles of 4, ``rows`` is a multiple of it; without ``keep`` what was in ``out`` is dropped.


@njit(**OPTIONS)
def tile_row(out, a, b, row, first, last, columns, keep):
    """out[row : row + 4, :columns] = keep * out + a[row : row + 4, first:last] @ b[first:last, :columns]"""
    size = out.itemsize
    out_at = out.ctypes.data + row * out.strides[0]
    a_at = a.ctypes.data + row * a.strides[0] + first * a.strides[1]
    b_at = b.ctypes.data + first * b.strides[0]
    for column in range(0, columns, 2 * VECTOR // size):
        tile(
            out_at + column * size,
            out.strides[0],
            a_at,
            a.strides[0],
            a.strides[1],
            b_at + column * size,
            b.strides[0],
            last - first,
            keep,
            out,
        )


@njit(**OPTIONS)
def product(out, a, b, rows, inner, keep):
    """out = keep * out + a b"""
    for row in range(0, rows, TILE):
        tile_row(out, a, b, row, 0, inner, out.shape[1], keep)


@njit(**OPTIONS)
def lower_times(out, a, b, rows, keep):
    """out = keep * out + a b for lower triangular a (rows x rows)."""
    for row in range(0, rows, TILE):
        tile_row(out, a, b, row, 0, row + TILE, out.shape[1], keep)


@njit(**OPTIONS)
def upper_times(out, a, b, rows, keep):
    """out = keep * out + a b for upper triangular a (rows x rows)."""
    for row in range(0, rows, TILE):
        tile_row(out, a, b, row, row, rows, out.shape[1], keep)


@njit(**OPTIONS)
def lower_product(out, a, b, rows, inner, pairs, diagonal):
    """out = tril(a b . pairs, diagonal); without decay ``pairs`` (Gam) is empty."""
    for row in range(0, rows, TILE):
        tile_row(out, a, b, row, 0, inner, padded(row + TILE), False)
        for i in range(row, row + TILE):
            for j in range(i + diagonal + 1, row + TILE):
                out[i, j] = 0
            if pairs.size > 0:
                for j in range(i + diagonal + 1):
                    out[i, j] *= pairs[i, j]


@njit(**OPTIONS)
def solve_lower(a, x, rows):
    """x = (I - a)^-1 x for strictly lower triangular a: forward substitution, a tile at a time."""
    for row in range(0, rows, TILE):
        tile_row(x, a, x, row, 0, row, x.shape[1], True)
        for i in range(row + 1, row + TILE):
            for j in range(row, i):
                add_multiple(x[i], a[i, j], x[j])


@njit(**OPTIONS)
def solve_upper(a, x, rows):
    """x = (I - a)^-1 x for strictly upper triangular a: backward substitution."""
    for row in range(rows - TILE, -1, -TILE):
        tile_row(x, a, x, row, row + TILE, rows, x.shape[1], True)
        for i in range(row + TILE - 2, row - 1, -1):
            for j in range(i + 1, row + TILE):
                add_multiple(x[i], a[i, j], x[j])


@njit(**OPTIONS)
def add_multiple(x, factor, y):
    """x += factor y"""
    for j in range(x.shape[0]):
        x[j] += factor * y[j]


# Between the tensors, of any strides but with neighbouring numbers in a row, and the padded work arrays.


@njit(**OPTIONS)
def load(work, x, start, count, rows):
    """work[:count] = x[start : start + count], zero to its right and down to ``rows``."""
    width = x.shape[1]
    bytes_wide = width * x.itemsize
    work_at = work.ctypes.data
    x_at = x.ctypes.data + start * x.strides[0]
    for i in range(count):
        copy_bytes(work_at + i * work.strides[0], x_at + i * x.strides[0], bytes_wide)
    if width < work.shape[1]:
        work[:count, width:] = 0
    work[count:rows] = 0


@njit(**OPTIONS)
def store(x, work, start, count):
    """x[start : start + count] = work[:count]"""
    bytes_wide = x.shape[1] * x.itemsize
    work_at = work.ctypes.data
    x_at = x.ctypes.data + start * x.strides[0]
    for i in range(count):
        copy_bytes(x_at + i * x.strides[0], work_at + i * work.strides[0], bytes_wide)


@njit(**OPTIONS)
def transpose(out, x, rows):
    """out = x[:rows]^T, in squares of 4, zero in the columns up to the next multiple of PAD."""
    for i in range(0, rows, TILE):
        for j in range(0, x.shape[1], TILE):
            for a in range(TILE):
                for b in range(TILE):
                    out[j + a, i + b] = x[i + b, j + a]
    padded = (rows + PAD - 1) // PAD * PAD
    if rows < padded:
        out[:, rows:padded] = 0


@njit(**OPTIONS)
def scale_rows(out, x, factors, rows):
    """out = diag(factors) x"""
    for i in range(rows):
        for j in range(x.shape[1]):
            out[i, j] = factors[i] * x[i, j]


@njit(**OPTIONS)
def negate(x, rows):
    for i in range(rows):
        for j in range(x.shape[1]):
            x[i, j] = -x[i, j]


@njit(**OPTIONS)
def decay_factors(log_decay, start, count, rows, pairs, since_start, until_end):
    """Gam_ij = exp(l_i - l_j) for i >= j, g = exp(l) and g_C / g of a chunk; returns g_C. Padding decays nothing."""
    total = np.empty(rows, log_decay.dtype)  # l = cumsum(log_decay)
    last = log_decay.dtype.type(0)
    for i in range(rows):
        if i < count:
            last += log_decay[start + i]
        total[i] = last
    for i in range(rows):
        since_start[i] = np.exp(total[i])
        until_end[i] = np.exp(last - total[i])
        for j in range(i + 1):
            pairs[i, j] = np.exp(total[i] - total[j])
    return np.exp(last)


@njit(**OPTIONS)
def padded(width):
    return (width + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def round_up(rows):
    return (rows + TILE - 1) // TILE * TILE


def forward(first, last, chunk, q, k, v, write, erase, log_decay, state, out, inserted, end):
    """Heads first..last - 1, counted over the batch, of ``chunked_forward``. Writes out, inserted (R) and end."""
    heads, tokens, dk, dv = k.shape[1], k.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, erases, decays = q.size > 0, erase.size > 0, log_decay.size > 0
    size, number = padded(chunk), k.dtype
    K, Q, N = np.empty((size, dk), number), np.empty((size, dk), number), np.empty((size, dk), number)
    K_t = np.empty((dk, size), number)
    R, O = np.empty((size, dv), number), np.empty((size, dv), number)
    A, P = np.empty((size, size), number), np.empty((size, size), number)
    S = np.empty((dk, dv), number)
    length = size if decays else 0
    pairs, since_start, until_end = np.empty((length, length), number), np.empty(length, number), np.empty(length, number)
    kept = k.dtype.type(1)
    for head in range(first, last):
        b, h = head // heads, head % heads
        empty = state.size == 0
        if not empty:
            load(S, state[b, h], 0, state.shape[2], dk)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            rows = round_up(count)
            load(K, k[b, h], start, count, rows)
            transpose(K_t, K, rows)
            load(R, v[b, h], start, count, rows)
            if write.size > 0:
                scale_rows(R, R, write[b, h, start : start + count], count)
            if decays:
                kept = decay_factors(log_decay[b, h], start, count, rows, pairs, since_start, until_end)
            if erases:
                load(N, erase[b, h], start, count, rows)
                negate(N, rows)
                lower_product(A, N, K_t, rows, dk, pairs, -1)
                if not empty:
                    if decays:
                        scale_rows(N, N, since_start, rows)
                    product(R, N, S, rows, dk, True)
                solve_lower(A, R, rows)
            if reads:
                load(Q, q[b, h], start, count, rows)
                lower_product(P, Q, K_t, rows, dk, pairs, 0)
                lower_times(O, P, R, rows, False)
                if not empty:
                    if decays:
                        scale_rows(Q, Q, since_start, rows)
                    product(O, Q, S, rows, dk, True)
                store(out[b, h], O, start, count)
            if inserted.size > 0:
                store(inserted[b, h], R, start, count)
            if end.size > 0 or start + chunk < tokens:
                if decays:
                    scale_rows(K, K, until_end, rows)
                    if not empty:
                        S *= kept
                product(S, K.T, R, dk, rows, not empty)
                empty = False
        if end.size > 0:
            store(end[b, h], S, 0, end.shape[2])


def backward(
    first, last, chunk, q, k, v, write, erase, log_decay, state, inserted,
    d_out, d_end, dq, dk_, dv_, d_write, d_erase, d_state,
):  # fmt: skip
    """Heads first..last - 1 of ``chunked_backward``, all but d log_decay. ``d_out`` is empty where nothing is read."""
    heads, tokens, dk, dv = k.shape[1], k.shape[2], padded(k.shape[3]), padded(v.shape[3])
    reads, erases, decays = d_out.size > 0, erase.size > 0, log_decay.size > 0
    size, number = padded(chunk), k.dtype
    K, Q, N = np.empty((size, dk), number), np.empty((size, dk), number), np.empty((size, dk), number)
    dX, dK = np.empty((size, dk), number), np.empty((size, dk), number)
    K_t, R_t = np.empty((dk, size), number), np.empty((dv, size), number)
    R, dO, dB = np.empty((size, dv), number), np.empty((size, dv), number), np.empty((size, dv), number)
    A, P = np.empty((size, size), number), np.empty((size, size), number)
    dS, S_t = np.empty((dk, dv), number), np.empty((dv, dk), number)
    length = size if decays else 0
    pairs, since_start, until_end = np.empty((length, length), number), np.empty(length, number), np.empty(length, number)
    kept = k.dtype.type(1)
    last_start = (tokens - 1) // chunk * chunk
    for head in range(first, last):
        b, h = head // heads, head % heads
        # from the end, carrying dS
        empty = d_end.size == 0
        if not empty:
            load(dS, d_end[b, h], 0, d_end.shape[2], dk)
        for start in range(last_start, -1, -chunk):
            count = min(chunk, tokens - start)
            rows = round_up(count)
            load(K, k[b, h], start, count, rows)
            transpose(K_t, K, rows)
            load(R, inserted[b, h], start, count, rows)
            transpose(R_t, R, rows)
            if decays:
                kept = decay_factors(log_decay[b, h], start, count, rows, pairs, since_start, until_end)
            if not empty:  # dB is dR first
                transpose(S_t, dS, dk)
                product(dK, R, S_t, rows, dv, False)
                product(dB, K, dS, rows, dk, False)
                if decays:
                    scale_rows(dK, dK, until_end, rows)
                    scale_rows(dB, dB, until_end, rows)
            else:
                dK[:rows] = 0
                dB[:rows] = 0
            if reads:
                load(Q, q[b, h], start, count, rows)
                load(dO, d_out[b, h], start, count, rows)
                lower_product(P, Q, K_t, rows, dk, pairs, 0)
                upper_times(dB, P.T, dO, rows, True)
            if erases:
                load(N, erase[b, h], start, count, rows)
                negate(N, rows)
                lower_product(A, N, K_t, rows, dk, pairs, -1)
                solve_upper(A.T, dB, rows)
                lower_product(A, dB, R_t, rows, dv, pairs, -1)  # dA . Gam
                lower_times(dX, A, K, rows, False)  # dN
                store(d_erase[b, h], dX, start, count)
                upper_times(dK, A.T, N, rows, True)
            if reads:
                lower_product(P, dO, R_t, rows, dv, pairs, 0)  # dP . Gam
                lower_times(dX, P, K, rows, False)
                store(dq[b, h], dX, start, count)
                upper_times(dK, P.T, Q, rows, True)
            store(dk_[b, h], dK, start, count)
            store(dv_[b, h], dB, start, count)
            if start > 0 or d_state.size > 0:
                if decays and not empty:
                    dS *= kept
                if reads:
                    if decays:
                        scale_rows(Q, Q, since_start, rows)
                    product(dS, Q.T, dO, dk, rows, not empty)
                    empty = False
                if erases and not empty:  # dB is 0 while dS is and nothing reads
                    if decays:
                        scale_rows(N, N, since_start, rows)
                    product(dS, N.T, dB, dk, rows, True)
        if d_state.size > 0:
            store(d_state[b, h], dS, 0, d_state.shape[2])

        # from the start, carrying S: what reads and erasures of earlier states give
        empty = state.size == 0
        if not empty:
            load(dS, state[b, h], 0, state.shape[2], dk)
            transpose(S_t, dS, dk)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            rows = round_up(count)
            if decays:
                kept = decay_factors(log_decay[b, h], start, count, rows, pairs, since_start, until_end)
            if reads and not empty:
                load(dO, d_out[b, h], start, count, rows)
                if decays:
                    scale_rows(dO, dO, since_start, rows)
                load(dX, dq[b, h], start, count, rows)
                product(dX, dO, S_t, rows, dv, True)
                store(dq[b, h], dX, start, count)
            if erases:
                load(dX, d_erase[b, h], start, count, rows)
                if not empty:
                    load(dB, dv_[b, h], start, count, rows)
                    if decays:
                        scale_rows(dB, dB, since_start, rows)
                    product(dX, dB, S_t, rows, dv, True)
                negate(dX, rows)
                store(d_erase[b, h], dX, start, count)
            if start < last_start:
                load(K, k[b, h], start, count, rows)
                load(R, inserted[b, h], start, count, rows)
                if decays:
                    scale_rows(K, K, until_end, rows)
                    if not empty:
                        S_t *= kept
                product(S_t, R.T, K, dv, rows, not empty)
                empty = False
        if write.size > 0:
            for t in range(tokens):
                strength = number.type(0)
                for j in range(v.shape[3]):
                    strength += dv_[b, h, t, j] * v[b, h, t, j]
                    dv_[b, h, t, j] *= write[b, h, t]
                d_write[b, h, t] = strength


def compiled(name, dtype):
    """The kernel ``name`` ("forward" or "backward") for one dtype, from the cache on disk if it is there.

    The arguments are three integers and then arrays of any strides.
    """
    axes = {
        "forward": [4, 4, 4, 3, 4, 3, 4, 4, 4, 4],
        "backward": [4, 4, 4, 3, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4],
    }
    number = getattr(types, dtype)
    signature = (types.intp,) * 3 + tuple(types.Array(number, n, "A") for n in axes[name])
    function = {"forward": forward, "backward": backward}[name]
    try:
        kernel = njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder that numba may write to
        kernel = njit(**OPTIONS)(function)
    return kernel.compile(signature)
