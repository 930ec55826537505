"""The chunk-parallel scan of ``chunked.py`` as two CPU kernels, compiled by numba when they are first used.

A core takes one head after another and keeps its chunk, its state and all products in its own cache. Everything is
a product of small matrices, done by one register tile, ``add_tile``, at about the processor's peak; the
triangular ones skip the half that is zero. Formulas and names are those of ``chunked.py``, with N = -E so that every
product is added:

    R = diag(w) V + diag(g) N S0 + A R       A = stril((N K^T) . Gam)
    O = diag(g) Q S0 + P R                   P = tril((Q K^T) . Gam)
    S_C = g_C S0 + K^T diag(g_C / g) R

The forward keeps R and P for the backward, which computes A and the states of its head again.

A kernel is called by every thread with the address of one ``job``, an array of int64:

    0 the next head, taken by the threads in turn    1 heads in all (batch x heads)    2 heads of a sentence
    3 tokens a chunk    4 tokens    5 dk    6 dv     then four numbers an operand:
    its address, 0 if it is missing, and its strides in bytes along batch, heads and tokens

Operands are (B, H, T, width) with neighbouring numbers in a row; gates have width 1, states have dk rows in place
of tokens. Erase keys come whole (``erase``) or as a multiple of the key (``strength``). Work arrays have their rows
padded to ``PAD`` with zeros. This file imports numba; import it only through ``numba_scan``.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 4  # rows of a register tile; its columns are two vectors
VECTOR = 32  # bytes
FIRST_OPERAND = 7  # in a job
JOB_SIZE = FIRST_OPERAND + 4 * 19
FLUSH = 0x8040  # of MXCSR: subnormal results and operands are 0
PAD = 16  # work arrays have a multiple of this many columns: whole tiles in float32 and float64

# products may be fused with sums and sums reordered, but nan and inf mean what they mean
OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


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
        sums = [cgutils.alloca_once_value(builder, zero) for _ in targets]
        with cgutils.for_range(builder, inner) as loop:
            halves = [
                load_vector(at(b, (b_row, loop.index), (constant(VECTOR), constant(h)))) for h in (0, 1)
            ]
            column = at(a, (a_column, loop.index))
            factors = [load_everywhere(at(column, (a_row, constant(row)))) for row in range(TILE)]
            for (row, half), total in zip(places, sums):
                term = builder.fmul(factors[row], halves[half], flags=["contract"])
                builder.store(builder.fadd(term, builder.load(total), flags=["contract"]), total)
        # what was there is added last: the state then rounds once a chunk and not once a token
        for target, total in zip(targets, sums):
            before = builder.select(keep, load_vector(target), zero)
            stored = builder.fadd(before, builder.load(total))
            builder.store(stored, builder.inttoptr(target, vector.as_pointer())).align = size
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, types.boolean, like), codegen


@intrinsic
def transpose_tile(typing_context, out, out_row, x, x_row, like):
    """out[:4, :4] = x[:4, :4]^T, in registers; arguments as for ``tile``."""
    number = like.dtype
    size = number.bitwidth // 8

    def codegen(context, builder, signature, arguments):
        out, out_row, x, x_row, _ = arguments
        vector = ir.VectorType(context.get_value_type(number), TILE)

        def place(base, stride, row):
            address = builder.add(base, builder.mul(stride, ir.Constant(stride.type, row)))
            return builder.inttoptr(address, vector.as_pointer())

        def pick(a, b, *lanes):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes))

        rows = []
        for row in range(TILE):
            rows.append(builder.load(place(x, x_row, row)))
            rows[-1].align = size
        first = [pick(rows[0], rows[1], 0, 4, 1, 5), pick(rows[2], rows[3], 0, 4, 1, 5)]
        second = [pick(rows[0], rows[1], 2, 6, 3, 7), pick(rows[2], rows[3], 2, 6, 3, 7)]
        columns = [pick(*half, *lanes) for half in (first, second) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]
        for row, column in enumerate(columns):
            builder.store(column, place(out, out_row, row)).align = size
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, like), codegen


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


@intrinsic
def pointer(typing_context, address):
    """An address as carray takes it."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), codegen


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
        clear_above(out, row, diagonal)
        if pairs.size > 0:
            for i in range(row, row + TILE):
                for j in range(i + 1):
                    out[i, j] *= pairs[i, j]


@njit(**OPTIONS)
def clear_above(out, row, diagonal):
    """Zeros above the diagonal (0) of the tile at [row, row], or from the diagonal on (-1). Loops would cost more."""
    out[row, row + 1] = 0
    out[row, row + 2] = 0
    out[row, row + 3] = 0
    out[row + 1, row + 2] = 0
    out[row + 1, row + 3] = 0
    out[row + 2, row + 3] = 0
    if diagonal < 0:
        for i in range(TILE):
            out[row + i, row + i] = 0


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


@intrinsic
def flush_subnormals(typing_context):
    """From now on numbers below the smallest normal one are 0 in this thread; returns the setting for ``restore``.

    An x86 is slow with them, and what decays at every token is full of them: 140 keys of associative retrieval with
    the fwm rule trained 12 times as fast without. Other processors go on as they were.
    """

    def codegen(context, builder, signature, arguments):
        word = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(32), 0))
        if on_x86(builder):
            control_word(builder, "st", word)
            before = builder.load(word)
            flushed = cgutils.alloca_once_value(
                builder, builder.or_(before, ir.Constant(ir.IntType(32), FLUSH))
            )
            control_word(builder, "ld", flushed)
        return builder.load(word)

    return types.uint32(), codegen


@intrinsic
def restore(typing_context, before):
    """Undoes ``flush_subnormals``, which has returned ``before``."""

    def codegen(context, builder, signature, arguments):
        if on_x86(builder):
            control_word(builder, "ld", cgutils.alloca_once_value(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.uint32), codegen


def on_x86(builder) -> bool:
    return builder.module.triple.startswith(("x86_64", "i686"))


def control_word(builder, verb, word):
    """MXCSR, stored to the address ``word`` or loaded from it."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte]), f"llvm.x86.sse.{verb}mxcsr"
    )
    builder.call(function, [builder.bitcast(word, byte)])


@intrinsic
def take_next(typing_context, job):
    """job[0]++, atomically: the value before."""

    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(job), codegen


@njit(error_model="numpy", fastmath=False)  # reordered, ``low`` would be 0; unsaid, the caller's would hold
def add_exactly(total, low, x):
    """total + low += x, where ``low`` is what rounding took from ``total`` (Kahan 1965).

    A sum that nothing erases grows, and its float32 would lose 1e-5 in 1e5 tokens.
    """
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            y = x[i, j] + low[i, j]
            new = total[i, j] + y
            low[i, j] = y - (new - total[i, j])
            total[i, j] = new


# Between the operands and the padded work arrays. An operand of one head is (address, bytes from row to row).


@njit(**OPTIONS)
def given(job, number):
    """Whether operand ``number`` is there."""
    return job[FIRST_OPERAND + 4 * number] != 0


@njit(**OPTIONS)
def of_head(job, number, head):
    """The rows of operand ``number`` that belong to a head."""
    at = FIRST_OPERAND + 4 * number
    sentence = head // job[2]
    return job[at] + sentence * job[at + 1] + (head - sentence * job[2]) * job[at + 2], job[at + 3]


@njit(**OPTIONS)
def load(work, rows_of, width, start, count, rows):
    """work[:count] = rows start.. of the operand, zero to their right and down to ``rows``."""
    address, stride = rows_of
    size = width * work.itemsize
    work_at = work.ctypes.data
    for i in range(count):
        copy_bytes(work_at + i * work.strides[0], address + (start + i) * stride, size)
    if width < work.shape[1]:
        work[:count, width:] = 0
    if count < rows:
        work[count:rows] = 0


@njit(**OPTIONS)
def store(rows_of, work, width, start, count):
    """Rows start.. of the operand = work[:count]."""
    address, stride = rows_of
    size = width * work.itemsize
    work_at = work.ctypes.data
    for i in range(count):
        copy_bytes(address + (start + i) * stride, work_at + i * work.strides[0], size)


@njit(**OPTIONS)
def transpose(out, x, rows):
    """out = x[:rows]^T, zero in the columns up to the next multiple of PAD."""
    size, out_at, x_at = x.itemsize, out.ctypes.data, x.ctypes.data
    for i in range(0, rows, TILE):
        for j in range(0, x.shape[1], TILE):
            transpose_tile(
                out_at + j * out.strides[0] + i * size,
                out.strides[0],
                x_at + i * x.strides[0] + j * size,
                x.strides[0],
                x,
            )
    end = padded(rows)
    if rows < end:
        out[:, rows:end] = 0


@njit(**OPTIONS)
def scale_rows(x, factors, rows):
    """x = diag(factors) x; factors (rows, 1)."""
    for i in range(rows):
        factor = factors[i, 0]
        for j in range(x.shape[1]):
            x[i, j] *= factor


@njit(**OPTIONS)
def copy_scaled(out, x, factors, rows):
    """out = diag(factors) x, in other memory: a loop that may overlap is not vectorised."""
    for i in range(rows):
        factor = factors[i, 0]
        for j in range(x.shape[1]):
            out[i, j] = factor * x[i, j]


@njit(**OPTIONS)
def negate(x, rows):
    for i in range(rows):
        for j in range(x.shape[1]):
            x[i, j] = -x[i, j]


@njit(**OPTIONS)
def decay_factors(log_decay, rows, pairs, since_start, until_end):
    """Gam_ij = exp(l_i - l_j) for i >= j, g = exp(l) and g_C / g, l = cumsum(log_decay); returns g_C."""
    for i in range(1, rows):
        log_decay[i, 0] += log_decay[i - 1, 0]
    last = log_decay[rows - 1, 0]
    for i in range(rows):
        since_start[i, 0] = np.exp(log_decay[i, 0])
        until_end[i, 0] = np.exp(last - log_decay[i, 0])
        for j in range(i + 1):
            pairs[i, j] = np.exp(log_decay[i, 0] - log_decay[j, 0])
    return np.exp(last)


@njit(**OPTIONS)
def padded(width):
    return (width + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def round_up(rows):
    return (rows + TILE - 1) // TILE * TILE


@njit(**OPTIONS)
def forward(job, number):
    """``chunked_forward`` of one head after another. Writes those given of out, R, P and end."""
    Q_, K_, V_, WRITE, ERASE, STRENGTH, DECAY, STATE, OUT, INSERTED, WEIGHTS, END = range(12)
    chunk, tokens, dk, dv = job[3], job[4], job[5], job[6]
    reads, erases, decays = given(job, Q_), given(job, ERASE) or given(job, STRENGTH), given(job, DECAY)
    size, wide_k, wide_v = padded(chunk), padded(dk), padded(dv)
    K, Q, N = (
        np.empty((size, wide_k), number),
        np.empty((size, wide_k), number),
        np.empty((size, wide_k), number),
    )
    K_t = np.empty((wide_k, size), number)
    R, read = np.empty((size, wide_v), number), np.empty((size, wide_v), number)
    A, P = np.empty((size, size), number), np.empty((size, size), number)
    S = np.empty((wide_k, wide_v), number)
    gate, since_start, until_end = (
        np.empty((size, 1), number),
        np.empty((size, 1), number),
        np.empty((size, 1), number),
    )
    pairs = np.empty((size, size) if decays else (0, 0), number)
    sums = not (decays or erases)
    added = np.empty((wide_k, wide_v) if sums else (0, 0), number)
    low = np.empty((wide_k, wide_v) if sums else (0, 0), number)
    kept = number(1)
    head = take_next(job)
    while head < job[1]:
        empty = not given(job, STATE)
        low[:] = 0
        if not empty:
            load(S, of_head(job, STATE, head), dv, 0, dk, wide_k)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            rows = round_up(count)
            load(K, of_head(job, K_, head), dk, start, count, rows)
            transpose(K_t, K, rows)
            load(R, of_head(job, V_, head), dv, start, count, rows)
            if given(job, WRITE):
                load(gate, of_head(job, WRITE, head), 1, start, count, rows)
                scale_rows(R, gate, rows)
            if decays:
                load(gate, of_head(job, DECAY, head), 1, start, count, rows)
                kept = decay_factors(gate, rows, pairs, since_start, until_end)
            if erases:
                load_erase(N, job, ERASE, STRENGTH, head, K, gate, dk, start, count, rows)
                lower_product(A, N, K_t, rows, wide_k, pairs, -1)
                if not empty:
                    if decays:
                        scale_rows(N, since_start, rows)
                    product(R, N, S, rows, wide_k, True)
                solve_lower(A, R, rows)
            if reads:
                load(Q, of_head(job, Q_, head), dk, start, count, rows)
                lower_product(P, Q, K_t, rows, wide_k, pairs, 0)
                if given(job, WEIGHTS):
                    store(of_head(job, WEIGHTS, head), P, chunk, start, count)
                lower_times(read, P, R, rows, False)
                if not empty:
                    if decays:
                        scale_rows(Q, since_start, rows)
                    product(read, Q, S, rows, wide_k, True)
                store(of_head(job, OUT, head), read, dv, start, count)
            if given(job, INSERTED):
                store(of_head(job, INSERTED, head), R, dv, start, count)
            if given(job, END) or start + chunk < tokens:
                if decays:
                    scale_rows(K, until_end, rows)
                    if not empty:
                        S *= kept
                if sums and not empty:
                    product(added, K.T, R, wide_k, rows, False)
                    add_exactly(S, low, added)
                else:
                    product(S, K.T, R, wide_k, rows, not empty)
                empty = False
        if given(job, END):
            store(of_head(job, END, head), S, dv, 0, dk)
        head = take_next(job)


@njit(**OPTIONS)
def load_erase(N, job, ERASE, STRENGTH, head, K, gate, dk, start, count, rows):
    """N = -E"""
    if given(job, STRENGTH):
        load(gate, of_head(job, STRENGTH, head), 1, start, count, rows)
        negate(gate, rows)
        copy_scaled(N, K, gate, rows)
    else:
        load(N, of_head(job, ERASE, head), dk, start, count, rows)
        negate(N, rows)


@njit(**OPTIONS)
def backward(job, number):
    """``chunked_backward`` of one head after another, all but d log_decay. d_out is given if anything was read."""
    Q_, K_, V_, WRITE, ERASE, STRENGTH, DECAY, STATE, INSERTED, WEIGHTS, D_OUT, D_END = range(12)
    D_Q, D_K, D_V, D_WRITE, D_ERASE, D_STRENGTH, D_STATE = range(12, 19)
    chunk, tokens, dk, dv = job[3], job[4], job[5], job[6]
    reads, erases, decays = given(job, D_OUT), given(job, ERASE) or given(job, STRENGTH), given(job, DECAY)
    size, wide_k, wide_v = padded(chunk), padded(dk), padded(dv)
    K, Q, N = (
        np.empty((size, wide_k), number),
        np.empty((size, wide_k), number),
        np.empty((size, wide_k), number),
    )
    dX, dK = np.empty((size, wide_k), number), np.empty((size, wide_k), number)
    K_t, R_t = np.empty((wide_k, size), number), np.empty((wide_v, size), number)
    R, dO, dB = (
        np.empty((size, wide_v), number),
        np.empty((size, wide_v), number),
        np.empty((size, wide_v), number),
    )
    A, P = np.empty((size, size), number), np.empty((size, size), number)
    chunks = (tokens + chunk - 1) // chunk
    starts = np.empty((chunks, wide_v, wide_k), number)  # S^T before every chunk of one head
    dS, dS_t = np.empty((wide_k, wide_v), number), np.empty((wide_v, wide_k), number)
    gate, d_gate = np.empty((size, 1), number), np.empty((size, 1), number)
    since_start, until_end = np.empty((size, 1), number), np.empty((size, 1), number)
    pairs = np.empty((size, size) if decays else (0, 0), number)
    sums = not (decays or erases)
    added = np.empty((wide_k, wide_v) if sums else (0, 0), number)
    added_t = np.empty((wide_v, wide_k) if sums else (0, 0), number)
    low = np.empty((wide_k, wide_v) if sums else (0, 0), number)
    low_t = np.empty((wide_v, wide_k) if sums else (0, 0), number)
    kept = number(1)
    head = take_next(job)
    while head < job[1]:
        low[:] = 0
        low_t[:] = 0
        # from the start: S again
        if given(job, STATE):
            load(dS, of_head(job, STATE, head), dv, 0, dk, wide_k)
            transpose(starts[0], dS, wide_k)
        for n in range(chunks - 1):
            load(K, of_head(job, K_, head), dk, n * chunk, chunk, round_up(chunk))
            load(R, of_head(job, INSERTED, head), dv, n * chunk, chunk, round_up(chunk))
            empty = n == 0 and not given(job, STATE)
            if not empty:
                starts[n + 1] = starts[n]
            if decays:
                load(gate, of_head(job, DECAY, head), 1, n * chunk, chunk, round_up(chunk))
                kept = decay_factors(gate, round_up(chunk), pairs, since_start, until_end)
                scale_rows(K, until_end, round_up(chunk))
                starts[n + 1] *= kept
            if sums and not empty:
                product(added_t, R.T, K, wide_v, round_up(chunk), False)
                add_exactly(starts[n + 1], low_t, added_t)
            else:
                product(starts[n + 1], R.T, K, wide_v, round_up(chunk), not empty)

        # from the end, carrying dS
        empty = not given(job, D_END)
        if not empty:
            load(dS, of_head(job, D_END, head), dv, 0, dk, wide_k)
        for n in range(chunks - 1, -1, -1):
            start = n * chunk
            count = min(chunk, tokens - start)
            rows = round_up(count)
            carried = n > 0 or given(job, STATE)
            load(K, of_head(job, K_, head), dk, start, count, rows)
            load(R, of_head(job, INSERTED, head), dv, start, count, rows)
            transpose(R_t, R, rows)
            if decays:
                load(gate, of_head(job, DECAY, head), 1, start, count, rows)
                kept = decay_factors(gate, rows, pairs, since_start, until_end)
            if not empty:  # dB is dR first
                transpose(dS_t, dS, wide_k)
                product(dK, R, dS_t, rows, wide_v, False)
                product(dB, K, dS, rows, wide_k, False)
                if decays:
                    scale_rows(dK, until_end, rows)
                    scale_rows(dB, until_end, rows)
            elif not reads:
                dK[:rows] = 0
                dB[:rows] = 0
            if reads:
                load(Q, of_head(job, Q_, head), dk, start, count, rows)
                load(dO, of_head(job, D_OUT, head), dv, start, count, rows)
                load(P, of_head(job, WEIGHTS, head), chunk, start, count, rows)
                upper_times(dB, P.T, dO, rows, not empty)
                lower_product(P, dO, R_t, rows, wide_v, pairs, 0)  # dP . Gam
                upper_times(dK, P.T, Q, rows, not empty)
                lower_times(dX, P, K, rows, False)  # dQ
                if decays:
                    scale_rows(dO, since_start, rows)
                if carried:
                    product(dX, dO, starts[n], rows, wide_v, True)
                store(of_head(job, D_Q, head), dX, dk, start, count)
            if erases:
                load_erase(N, job, ERASE, STRENGTH, head, K, gate, dk, start, count, rows)
                transpose(K_t, K, rows)
                lower_product(A, N, K_t, rows, wide_k, pairs, -1)
                solve_upper(A.T, dB, rows)
                lower_product(A, dB, R_t, rows, wide_v, pairs, -1)  # dA . Gam
                upper_times(dK, A.T, N, rows, True)
                lower_times(dX, A, K, rows, False)  # dN
            if given(job, WRITE):  # dV = diag(w) dB, dw = dB . V
                load(R, of_head(job, V_, head), dv, start, count, rows)
                row_products(d_gate, dB, R, rows)
                store(of_head(job, D_WRITE, head), d_gate, 1, start, count)
                load(d_gate, of_head(job, WRITE, head), 1, start, count, rows)
                copy_scaled(R, dB, d_gate, rows)
                store(of_head(job, D_V, head), R, dv, start, count)
            else:
                store(of_head(job, D_V, head), dB, dv, start, count)
            if erases:
                if decays:
                    scale_rows(dB, since_start, rows)
                if carried:
                    product(dX, dB, starts[n], rows, wide_v, True)
                if given(job, STRENGTH):
                    add_along_key(dX, K, gate, d_gate, dK, rows)
                    store(of_head(job, D_STRENGTH, head), d_gate, 1, start, count)
                else:
                    negate(dX, rows)
                    store(of_head(job, D_ERASE, head), dX, dk, start, count)
            store(of_head(job, D_K, head), dK, dk, start, count)
            if carried:
                if decays and not empty:
                    dS *= kept
                if reads and sums and not empty:
                    product(added, Q.T, dO, wide_k, rows, False)
                    add_exactly(dS, low, added)
                elif reads:
                    product(dS, Q.T, dO, wide_k, rows, not empty)
                    empty = False
                if erases and not empty:  # dB is 0 while dS is and nothing reads
                    product(dS, N.T, dB, wide_k, rows, True)
        if given(job, D_STATE):
            store(of_head(job, D_STATE, head), dS, dv, 0, dk)
        head = take_next(job)


@njit(**OPTIONS)
def add_along_key(dN, K, gate, d_strength, dK, rows):
    """N = diag(gate) K with gate = -strength: dK += diag(gate) dN, d strength = -rowsum(dN . K)."""
    for i in range(rows):
        factor = gate[i, 0]
        total = dN.dtype.type(0)
        for j in range(dN.shape[1]):
            total -= dN[i, j] * K[i, j]
            dK[i, j] += factor * dN[i, j]
        d_strength[i, 0] = total


@njit(**OPTIONS)
def row_products(out, x, y, rows):
    """out = rowsum(x . y)"""
    for i in range(rows):
        total = x.dtype.type(0)
        for j in range(x.shape[1]):
            total += x[i, j] * y[i, j]
        out[i, 0] = total
