"""NVIDIA's compiler, without a GPU: the figures of each architecture, and the log of what it refuses."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import nvrtc_compiler
from nvrtc_compiler import CompileError, LibraryMissing, compile_cuda, nvrtc_version

SOURCE = """
extern "C" __global__ void __launch_bounds__(THREADS) reversed(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float tile[THREADS];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}
#ifdef SPILL
// more numbers alive at once than the registers that these bounds leave a thread
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y, int steps) {
  float number[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) number[i] = x[i * 1024 + threadIdx.x];
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < 64; ++i) number[i] += number[(i + 31) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = number[i];
}
#endif
"""


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_figures_of_every_architecture(arch):
    compiled = compile_cuda(SOURCE, arch, options=("-DTHREADS=256",))
    assert compiled.cubin.startswith(b"\x7fELF")
    assert list(compiled.kernels) == ["reversed"]
    usage = compiled.kernels["reversed"]
    assert 4 <= usage.registers <= 40
    # newer architectures keep 1 KiB of each block for themselves
    assert usage.static_shared_bytes in (1024, 2048)
    assert (usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (0, 0, 0)


def test_spills_are_read():
    kernels = compile_cuda(SOURCE, "sm_80", options=("-DTHREADS=32", "-DSPILL")).kernels
    assert set(kernels) == {"reversed", "spilling"}
    assert kernels["spilling"].spill_store_bytes > 0
    assert kernels["spilling"].spill_load_bytes > 0
    assert kernels["spilling"].stack_bytes > 0
    assert kernels["reversed"].spill_store_bytes == 0


def test_an_error_gives_the_log_with_the_line():
    with pytest.raises(
        CompileError, match=r'reversed\.cu\(4\): error: identifier "THREADS" is undefined'
    ) as error:
        compile_cuda('#line 3 "reversed.cu"\n' + SOURCE, "sm_80")
    assert "sm_80" in str(error.value)


def test_what_ptxas_refuses_is_an_error_too():
    with pytest.raises(CompileError, match="too much shared data"):
        compile_cuda(SOURCE.replace("tile[THREADS]", "tile[64 * 1024]"), "sm_80", options=("-DTHREADS=256",))


def test_a_missing_library_is_said(monkeypatch):
    def not_installed(package):
        raise importlib.metadata.PackageNotFoundError(package)

    nvrtc_compiler.nvrtc.cache_clear()
    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(LibraryMissing, match="pip install nvidia-cuda-nvrtc"):
        compile_cuda(SOURCE, "sm_80")


def test_version():
    assert nvrtc_version() >= (12, 8)  # the first that knows sm_120
