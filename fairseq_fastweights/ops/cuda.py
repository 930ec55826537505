"""Whether the kernels of ``cuda/*.cu`` run on a device, and how: compiled and launched by CuPy on torch tensors.

CuPy is imported with the first scan on a GPU, and only used to compile and to launch: memory is torch's, the stream is
torch's current one, and nothing here waits for the device.
"""

import functools
import importlib.util
from typing import Dict, Iterable, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .cuda_sources import cuda_source_dir
from .notice import compiling

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the macro NUMBER
OLDEST = (7, 5)  # compute capability
NVRTC = {"12": "nvidia-cuda-nvrtc-cu12", "13": "nvidia-cuda-nvrtc"}  # what pip calls it, by CUDA version
SHARED_WITHOUT_ASKING = 48 * 1024  # bytes a kernel may use without an attribute being set


# ---- whether it can run ----


def refusal(device: torch.device) -> Optional[str]:
    """Why the CUDA kernels cannot run on tensors of ``device``, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    return _refusal_of_cuda(device.index)


@functools.lru_cache(None)
def _refusal_of_cuda(index: Optional[int]) -> Optional[str]:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major = (torch.version.cuda or "0").split(".")[0]
    if major == "0":
        return "this build of torch drives another kind of GPU than CUDA's"
    install = f"pip install 'fairseq_fastweights[cuda{major}]'"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, and 7.5 is the oldest that runs"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed ({install})"
    try:
        import cupy

        found = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except Exception as error:  # a broken or doubled installation fails in many ways
        return f"CuPy cannot be used: {' '.join(str(error).split())}"
    if found != int(major):
        return f"CuPy is built for CUDA {found} and torch for CUDA {major} (uninstall CuPy, then {install})"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception:  # CuPy's wheels do not bring it; torch's wheels for CUDA do
        return f"CuPy does not find the compiler NVRTC (pip install {NVRTC.get(major, NVRTC['13'])})"
    try:
        cuda_source_dir()
    except FileNotFoundError as error:
        return str(error)
    return None


class Limits(NamedTuple):
    """What a device offers."""

    shared: int  # bytes of shared memory a block
    multiprocessors: int


@functools.lru_cache(None)
def limits(device: torch.device) -> Limits:
    """The limits of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return Limits(
        getattr(found, "shared_memory_per_block_optin", SHARED_WITHOUT_ASKING), found.multi_processor_count
    )


# ---- compile and launch ----

Defines = Tuple[Tuple[str, int], ...]


@functools.lru_cache(None)
def source(family: str) -> str:
    """The text of a kernel family, with what all share in front; faults name the files."""
    parts = [
        f'#line 1 "{name}.cu"\n{(cuda_source_dir() / f"{name}.cu").read_text()}'
        for name in ("common", family)
    ]
    return "\n".join(parts)


@functools.lru_cache(None)
def kernel(family: str, name: str, defines: Defines, device: torch.device):
    """The compiled kernel ``name`` of a family for one device."""
    import cupy

    options = ("--std=c++17", *(f"-D{key}={value}" for key, value in defines))
    with compiling(f"the CUDA kernels of {family}.cu"):
        return _module(family, options, cupy.RawModule).get_function(name)


@functools.lru_cache(None)
def _module(family: str, options: Tuple[str, ...], raw_module):
    return raw_module(code=source(family), options=options)


def address(x: Optional[Tensor]):
    """A pointer as CuPy takes it."""
    return np.uint64(0 if x is None else x.data_ptr())


def operand(x: Optional[Tensor], parts: bool = False) -> list:
    """The arguments of ``OPERAND``: the pointer, and the strides of sentences, heads and, if there are, tokens.

    parts: whether the first axis of x are the parts that the blocks of a head write.
    """
    strides = () if x is None else x.stride()[int(parts) :]
    return [address(x), *map(np.int64, (*strides, 0, 0, 0)[:3])]


def operands(*tensors: Optional[Tensor]) -> list:
    """``operand`` of each. The caller holds the tensors until the launch: an address alone keeps no memory."""
    return [argument for x in tensors for argument in operand(x)]


class CudaStream:
    """A stream of torch as CuPy takes it: torch's own has this protocol from 2.10 on only."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self) -> Tuple[int, int]:
        return 0, self.stream.cuda_stream


def launch(
    family: str,
    name: str,
    defines: Dict[str, int],
    grid: Sequence[int],
    shared: int,
    arguments: Iterable,
    device: torch.device,
) -> None:
    """Run a kernel on torch's current stream of ``device``, in blocks of ``defines["THREADS"]`` threads."""
    import cupy

    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(stream.device.index), cupy.cuda.Stream.from_external(CudaStream(stream)):
        function = kernel(family, name, tuple(sorted(defines.items())), device)
        if shared > SHARED_WITHOUT_ASKING:
            function.max_dynamic_shared_size_bytes = shared
        function(tuple(grid), (defines["THREADS"],), tuple(arguments), shared_mem=shared)


# ---- what the kernels take ----


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def aligned(*tensors: Optional[Tensor]) -> int:
    """The macro ALIGNED: whether rows can be read four numbers at a time."""

    def fits(x: Tensor) -> bool:
        return (
            x.shape[-1] % 4 == 0
            and all(stride % 4 == 0 for stride, size in zip(x.stride()[:-1], x.shape) if size > 1)
            and x.data_ptr() % (4 * x.itemsize) == 0
        )

    return int(all(fits(x) for x in tensors if x is not None))


def rows(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """x in ``dtype`` and with neighbouring numbers in its last axis."""
    if x is None:
        return None
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def gate(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.float()
