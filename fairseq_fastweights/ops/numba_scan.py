"""Backend "numba": the kernels of ``numba_kernels`` on torch tensors, over torch's number of threads.

Nothing of numba is imported before the first scan. The compiled code is kept beside the package (or, where that
cannot be written, in the user's cache), so that only the first run on a machine waits for the compiler.
"""

import ctypes
import functools
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import FastWeightError
from .chunked import chunk_length, chunked_scan, sum_dtype
from .notice import compiling

NUMBA_CHUNK = 32  # fastest of 8 to 64 at head widths 16 to 64: benchmarks/README.md
JOB_SIZE = 7 + 4 * 19  # as in numba_kernels, which must not be imported before it is used
Job = ctypes.c_int64 * JOB_SIZE
WORTH_A_THREAD = 2**16  # multiplications of a scan below which starting a thread costs more than it saves


@functools.lru_cache(None)
def refusal() -> Optional[str]:
    """Why numba cannot be used here, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'fairseq_fastweights[cpu]')"
    try:
        import numba
    except Exception as error:  # numba refuses a numpy that it does not know, for one
        return f"numba cannot be imported: {' '.join(str(error).split())}"
    if numba.config.DISABLE_JIT:
        return "numba's compiler is switched off (NUMBA_DISABLE_JIT)"
    return None


@functools.lru_cache(None)
def kernel(name: str, dtype: torch.dtype) -> Callable:
    """The kernel ``name`` for one dtype, compiled or loaded from the cache: a ctypes function of a job's address."""
    logging.getLogger("numba").setLevel(logging.WARNING)  # it writes a line an instruction at level DEBUG
    from .numba_entries import compiled

    with compiling(f"the CPU kernel {name}"):
        return compiled(f"{name}_{str(dtype).replace('torch.', '')}")


@functools.lru_cache(None)
def parallel() -> Callable:
    """parallel(function, address, threads): call function(address) in several threads at once.

    By the OpenMP library that torch has loaded, where it is GNU's: the threads are then those that torch uses, which
    wait for work on their cores for milliseconds and would be in the way of any others.
    """
    try:
        region = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError):  # TypeError: Windows has no library None
        return _in_python_threads
    region.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    region.restype = None

    def in_openmp(function, address: int, threads: int) -> None:
        region(ctypes.c_void_p.from_buffer(function), address, threads, 0)  # what the pointer points to

    return in_openmp


@functools.lru_cache(None)
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fast_weights")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork


def _in_python_threads(function, address: int, threads: int) -> None:
    others = [_helpers(threads - 1).submit(function, address) for _ in range(threads - 1)]
    try:
        function(address)  # ctypes lets go of the interpreter meanwhile
    finally:  # nobody may still use the job when an interrupt ends the caller
        wait(others)


def run(name: str, sizes: Sequence[int], operands: Sequence[Optional[Tensor]], cost: int) -> None:
    """Run a kernel on operands (B, H, ...) of the first one's dtype; ``sizes``: chunk, T, dk, dv of a job."""
    first = next(x for x in operands if x is not None)
    numbers = [0, first.shape[0] * first.shape[1], first.shape[1], *sizes]
    for x in operands:
        if x is None:
            numbers += (0, 0, 0, 0)
        else:
            size, stride = x.itemsize, x.stride()
            numbers += (x.data_ptr() or 1, stride[0] * size, stride[1] * size, stride[2] * size)
    if numbers[1] == 0:
        return
    job = Job(*numbers)
    function = kernel(name, first.dtype)
    threads = min(torch.get_num_threads(), numbers[1])
    if threads < 2 or cost < WORTH_A_THREAD:
        function(ctypes.addressof(job))
    else:
        parallel()(function, ctypes.addressof(job), threads)
    if job[0] <= numbers[1]:  # a thread that was through has asked for one head more than there are
        raise MemoryError(
            f"no memory for the work arrays of a chunk of {sizes[0]} tokens: choose a smaller chunk_size"
        )


def readable(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """x in ``dtype`` and with neighbouring numbers in its last axis, as the kernels copy whole rows."""
    if x is None or (x.dtype == dtype and (x.is_contiguous() or x.dim() == 3 or x.stride(-1) == 1)):
        return x
    x = x.to(dtype)
    return x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous()


def result_like(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """New memory for a result in the order of x's axes, so that what comes after needs no transposed copy."""
    if x is None:
        return None
    result = torch.empty_like(x, dtype=dtype)
    return result if x.dim() == 3 or result.stride(-1) == 1 else x.new_empty(x.shape, dtype=dtype)


def split_erase(q, k, v, write, erase, log_decay, state) -> list:
    """The operands as the kernels take them: erase keys (B, H, T, dk), or their strength (B, H, T) along k."""
    along_key = erase is not None and erase.dim() == 3
    return [q, k, v, write, None if along_key else erase, erase if along_key else None, log_decay, state]


class NumbaScan(torch.autograd.Function):
    """Saves the inputs as they came, the inserted values and P; the backward computes the states again."""

    @staticmethod
    def forward(ctx, q, k, v, write, erase, log_decay, state, need_state, chunk_size):
        dtype = sum_dtype(v)
        given = (q, k, v, write, erase, log_decay, state)
        inputs = [readable(x, dtype) for x in given]
        batch, heads, tokens, dk = k.shape
        dv = v.shape[-1]
        ctx.chunk = chunk_length(tokens, chunk_size, NUMBA_CHUNK)
        ctx.set_materialize_grads(False)
        out = None if q is None else result_like(v, dtype)
        values_differ = (erase is not None or write is not None) and any(ctx.needs_input_grad)
        inserted = result_like(v, dtype) if values_differ else None
        end = v.new_empty(batch, heads, dk, dv, dtype=dtype) if need_state else None
        weights = None  # P, the part of out = P R that each chunk reads from itself
        if q is not None and any(ctx.needs_input_grad):
            weights = v.new_empty(batch, heads, tokens, ctx.chunk, dtype=dtype)
        operands = [*split_erase(*inputs), out, inserted, weights, end]
        run("forward", (ctx.chunk, tokens, dk, dv), operands, k.numel() * dv)
        kept_end = None if log_decay is None else end
        ctx.save_for_backward(*given, v if inserted is None else inserted, weights, kept_end)
        return None if out is None else out.to(v.dtype), end

    @staticmethod
    def backward(ctx, d_out, d_end):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "fast_weight_scan has no second derivative (create_graph=True reached its backward): "
                "use backend='reference', which autograd can differentiate any number of times"
            )
        if d_out is None and d_end is None:
            return (None,) * 9
        *given, inserted, weights, end = ctx.saved_tensors
        dtype = sum_dtype(inserted)
        q, k, v, write, erase, log_decay, state = inputs = [readable(x, dtype) for x in given]
        inserted, d_out, d_end = (readable(x, dtype) for x in (inserted, d_out, d_end))
        dq, dk, dv, dw, de, d_state = (result_like(x, dtype) for x in (q, k, v, write, erase, state))
        if q is None:
            d_out = None
        elif d_out is None:
            dq.zero_()
        *results, _, d_start = split_erase(dq, dk, dv, dw, de, None, d_state)
        results.append(d_start)
        sizes = (ctx.chunk, *k.shape[2:], v.shape[-1])
        run(
            "backward",
            sizes,
            [*split_erase(*inputs), inserted, weights, d_out, d_end, *results],
            k.numel() * v.shape[-1],
        )
        d_decay = None
        if log_decay is not None:
            d_decay = decay_gradient(local_terms(q, k, erase, dq, dk, de), end, d_end)
        grads = (dq, dk, dv, dw, de, d_decay, d_state)
        if d_decay is not None or v.dtype != given[2].dtype:
            grads = [None if g is None else g.to(x.dtype) for g, x in zip(grads, given)]
        return (*grads, None, None)


def local_terms(q, k, erase, dq, dk, de) -> Tensor:
    """q . dq + e . de - k . dk of every token, (B, H, T), in float64."""

    def dot(a, b):
        return (a * b).sum(-1, dtype=torch.float64)

    local = -dot(k, dk)
    if q is not None:
        local += dot(q, dq)
    if erase is not None and erase.dim() == 4:
        local += dot(erase, de)
    elif erase is not None:  # e = strength k, and dk holds strength de too
        local += 2 * (erase * de).double()
    return local


def decay_gradient(local: Tensor, end: Optional[Tensor], d_end: Optional[Tensor]) -> Tensor:
    """d log_decay_t = sum over i >= t of local_i + <dS, S> at the end, local_i = q_i . dq_i + e_i . de_i - k_i . dk_i.

    Summed in float64: what is added in one place is taken off in another.
    """
    local = local.double()
    if d_end is not None:
        local[:, :, -1] += (d_end * end).sum((-1, -2), dtype=torch.float64)
    return local.flip(-1).cumsum(-1).flip(-1)


def numba_scan(
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
    """Backend "numba" of ``fast_weight_scan``; same arguments, already checked."""
    if k.shape[2] == 0:
        return chunked_scan(q, k, v, write, erase, log_decay, state, need_state, chunk_size)
    return NumbaScan.apply(q, k, v, write, erase, log_decay, state, need_state, chunk_size)


NUMBA_MAPS = ("elu", "relu", "dpfp")  # as in numba_features


class NumbaAddress(torch.autograd.Function):
    """Feature map and normalisation of ``numba_features``; saves its input alone."""

    @staticmethod
    def forward(ctx, x, features, settings):
        ctx.settings = settings
        ctx.save_for_backward(x)
        x = readable(x, sum_dtype(x))
        out = torch.empty_like(x) if features == x.shape[-1] else x.new_empty(*x.shape[:-1], features)
        _address("address_forward", settings, x, out)
        return out

    @staticmethod
    def backward(ctx, d_out):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "the numba kernels have no second derivative (create_graph=True reached their backward): "
                "use backend='reference'"
            )
        (given,) = ctx.saved_tensors
        x = readable(given, sum_dtype(given))
        dx = torch.empty_like(x)
        _address("address_backward", ctx.settings, x, readable(d_out, x.dtype), dx)
        return dx.to(given.dtype), None, None


def _address(name: str, settings: tuple, x: Tensor, out: Tensor, *more: Tensor) -> None:
    """A kernel of ``numba_features``; out has the width of the features."""
    code, *numbers = settings
    numbers = x.new_tensor(numbers).view(1, 1, 1, 2).expand(*x.shape[:2], 1, 2)
    run(name, (code, *x.shape[2:], out.shape[-1]), [x, numbers, out, *more], 16 * x.numel())


def numba_address(
    x: Tensor, map_name: str, features: int, normalization: str, scale: float, smallest: float
) -> Tensor:
    """scale normalize(phi(x)) for x (B, H, T, head_dim): (B, H, T, features), float32 at least."""
    from . import numba_features

    code = 8 * NUMBA_MAPS.index(map_name) + numba_features.NORMALIZATIONS.index(normalization)
    settings = (code, scale, smallest)
    return NumbaAddress.apply(x, features, settings)
