"""Which backend runs, and why each other one does not."""

from typing import Callable, Dict, Optional

import torch

from ..errors import FastWeightError
from . import cuda, numba_scan
from .chunked import chunked_scan, erase_keys, no_autocast, sum_dtype
from .cuda_scan import cuda_scan
from .cuda_step import cuda_step
from .decode import step
from .dense_state import DenseState
from .lazy_state import LazyState
from .reference import reference_scan

BACKENDS = ("auto", "reference", "chunked", "numba", "cuda")


def refusals(device: torch.device) -> Dict[str, Optional[str]]:
    """For every backend the reason why it cannot run on tensors of ``device``, or None if it can."""
    return {
        "reference": None,
        "chunked": None,
        "numba": numba_scan.refusal()
        if device.type == "cpu"
        else f"the tensors are on {device.type}, and these kernels run on the CPU",
        "cuda": cuda.refusal(device),
    }


def check_backend(backend: str) -> None:
    """Raise FastWeightError unless ``backend`` is a known name."""
    if backend not in BACKENDS:
        raise FastWeightError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def choose(backend: str, device: torch.device) -> Callable:
    """The scan function of a backend by name; "auto" takes the fastest that runs on ``device``."""
    check_backend(backend)
    if backend == "auto":
        found = refusals(device)
        backend = next(name for name in ("cuda", "numba", "chunked") if found[name] is None)
    reason = refusals(device)[backend]
    if reason is not None:
        raise FastWeightError(f"backend {backend!r} cannot run here: {reason}; use 'auto' or 'chunked'")
    return SCANS[backend]


def choose_step(k: torch.Tensor, v: torch.Tensor) -> Callable:
    """The function behind ``fast_weight_step`` for keys and values."""
    return cuda_step if v.numel() > 0 and _has_cuda_step(k) else step


def _has_cuda_step(k: torch.Tensor) -> bool:
    return k.dtype in cuda.NUMBERS and k.numel() > 0 and cuda.refusal(k.device) is None


def decoding_state(backend: str, k: torch.Tensor) -> Optional[Callable]:
    """The class that keeps the state of decoding rows for the kernels that run on k; None where there are none."""
    if backend in ("auto", "cuda") and _has_cuda_step(k):
        return DenseState
    if backend in ("auto", "numba") and refusals(k.device)["numba"] is None:
        return LazyState
    return None


def _reference(q, k, v, write, erase, log_decay, state, need_state, chunk_size):
    dtype = sum_dtype(v)
    q, k, values, write, erase, log_decay = (
        None if x is None else x.to(dtype) for x in (q, k, v, write, erase, log_decay)
    )
    erase = erase_keys(erase, k)
    with no_autocast(v.device.type):
        out, state = reference_scan(q, k, values, write, erase, log_decay, state)
    return None if out is None else out.to(v.dtype), state if need_state else None


SCANS = {
    "reference": _reference,
    "chunked": chunked_scan,
    "numba": numba_scan.numba_scan,
    "cuda": cuda_scan,
}
