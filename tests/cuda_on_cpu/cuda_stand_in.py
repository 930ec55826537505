"""``ops/cuda.py`` without a GPU: its kernels run in the executor of ``tests/cuda_on_cpu``, in CuPy's place.

What is replaced is CuPy and what torch says of a device; sizes, defines, arguments and autograd are the real ones.
"""

import contextlib
import sys
import types
from unittest import mock

import cuda_executor
import torch

from fairseq_fastweights.ops import cuda

STREAM = 4711  # the handle of torch's current stream
LIMITS = cuda.Limits(shared=99 * 1024, multiprocessors=2)


class StandIn:
    """The part of the module ``cupy`` that ``ops/cuda.py`` uses, and what it was asked for."""

    def __init__(self):
        self.launches = []  # (name, defines, grid)
        self.devices = []
        self.cuda = types.SimpleNamespace(
            Device=self._device, Stream=types.SimpleNamespace(from_external=self._stream)
        )

    def RawModule(self, code, options):
        return types.SimpleNamespace(get_function=lambda name: Noted(self, code, options, name))

    @contextlib.contextmanager
    def _device(self, index):
        self.devices.append(index)
        yield

    def _stream(self, stream):
        if stream.__cuda_stream__() != (0, STREAM):  # the protocol that CuPy wants
            raise TypeError(f"not torch's stream: {stream}")
        return contextlib.nullcontext(stream)


class Noted:
    """A kernel that is noted when it is launched."""

    def __init__(self, cupy: StandIn, code, options, name):
        self.cupy, self.options, self.name = cupy, options, name
        self.kernel = cuda_executor.RawModule(code=code, options=options).get_function(name)

    def __setattr__(self, name, value):
        if name == "max_dynamic_shared_size_bytes":
            self.kernel.max_dynamic_shared_size_bytes = value
        super().__setattr__(name, value)

    def __call__(self, grid, block, arguments, shared_mem=0):
        self.cupy.launches.append((self.name, self.options, grid))
        self.kernel(grid, block, arguments, shared_mem=shared_mem)


def stream_of(device: torch.device):
    """What torch.cuda.current_stream says, for a CPU tensor as of the first GPU."""
    return types.SimpleNamespace(device=torch.device("cuda", device.index or 0), cuda_stream=STREAM)


@contextlib.contextmanager
def instead_of_gpu(limits: cuda.Limits = LIMITS):
    """Makes backend "cuda" run on CPU tensors; the value is the stand-in for CuPy."""
    cupy = StandIn()
    with contextlib.ExitStack() as stack:
        for cache in (cuda.kernel, cuda._module):
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.callback(sys.modules.pop, "cupy")
        sys.modules["cupy"] = cupy  # not by mock.patch.dict, which would forget what is imported meanwhile
        stack.enter_context(mock.patch.object(cuda, "refusal", lambda device: None))
        stack.enter_context(mock.patch.object(cuda, "limits", lambda device: limits))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", stream_of))
        yield cupy
