"""The kernels as functions of one address, compiled or read from numba's cache on disk.

This file imports numba; import it only through ``numba_scan``.
"""

import hashlib
from pathlib import Path
from typing import Callable

import numpy as np
from numba import carray, cfunc, types

from .numba_decode import decode
from .numba_features import address_backward, address_forward
from .numba_kernels import JOB_SIZE, backward, flush_subnormals, forward, restore
from .numba_norm_clipped import norm_clipped_backward, norm_clipped_forward


def entries(version: str) -> dict:
    """The functions by name. A cached one is used while ``version``, which they close over, is the same.

    numba compares the time of the file that holds the function, and not of those it calls; and functions that
    take the kernel as an argument could not be cached.
    """

    def forward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        forward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def forward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        forward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def backward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        backward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def backward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        backward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def address_forward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        address_forward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def address_forward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        address_forward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def address_backward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        address_backward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def address_backward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        address_backward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def decode_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        decode(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def decode_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        decode(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def norm_clipped_forward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        norm_clipped_forward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def norm_clipped_forward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        norm_clipped_forward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    def norm_clipped_backward_float32(address):
        version  # noqa: B018
        before = flush_subnormals()
        norm_clipped_backward(carray(address, JOB_SIZE, np.int64), np.float32)
        restore(before)

    def norm_clipped_backward_float64(address):
        version  # noqa: B018
        before = flush_subnormals()
        norm_clipped_backward(carray(address, JOB_SIZE, np.int64), np.float64)
        restore(before)

    return {name: function for name, function in locals().items() if name != "version"}


def sources() -> str:
    """A fingerprint of the files that hold kernels."""
    files = sorted(Path(__file__).parent.glob("numba_*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def compiled(name: str) -> Callable:
    """A function of ``entries``, as a ctypes function that lets go of the interpreter while it runs."""
    entry, signature = entries(sources())[name], types.void(types.voidptr)
    try:
        code = cfunc(signature, cache=True)(entry)
    except (RuntimeError, OSError):  # no folder that numba may write to, or a full disk
        code = cfunc(signature)(entry)
    return code.ctypes
