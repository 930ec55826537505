"""Why the CUDA kernels cannot run: one line that says what to do, for every reason; and the report of all backends."""

import importlib.util
import sys
import types

import pytest
import torch

from fairseq_fastweights.ops import cuda, dispatch, report
from fairseq_fastweights.ops.cuda_scan import cuda_scan

GPU = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which nothing speaks against the kernels: torch for CUDA 13, an H100, CuPy for CUDA 13."""
    cuda._refusal_of_cuda.cache_clear()
    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 13020, getVersion=lambda: (13, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(
        sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime, nvrtc=runtime))
    )
    yield runtime
    cuda._refusal_of_cuda.cache_clear()


def test_nothing_speaks_against_it(gpu):
    assert cuda.refusal(GPU) is None
    assert dispatch.choose("auto", GPU) is cuda_scan
    assert dispatch.choose("cuda", GPU) is cuda_scan


def test_tensors_elsewhere():
    assert cuda.refusal(torch.device("cpu")) == "the tensors are on cpu, not on a CUDA device"


def test_no_device(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.refusal(torch.device("cuda")) == "torch finds no CUDA device"


def test_torch_without_cuda(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "another kind of GPU" in cuda.refusal(GPU)


def test_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert "capability 7.0, and 7.5 is the oldest" in cuda.refusal(GPU)


@pytest.mark.parametrize("version, extra", [("12.8", "cuda12"), ("13.0", "cuda13")])
def test_no_cupy(gpu, monkeypatch, version, extra):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda.refusal(GPU) == f"CuPy is not installed (pip install 'fairseq_fastweights[{extra}]')"


def test_cupy_for_another_cuda(gpu):
    gpu.runtimeGetVersion = lambda: 12090
    assert "CuPy is built for CUDA 12 and torch for CUDA 13" in cuda.refusal(GPU)


def test_broken_cupy(gpu):
    def broken():
        raise ImportError("libcudart.so.13:\n cannot open")

    gpu.runtimeGetVersion = broken
    assert cuda.refusal(GPU) == "CuPy cannot be used: libcudart.so.13: cannot open"


@pytest.mark.parametrize(
    "version, package", [(12090, "nvidia-cuda-nvrtc-cu12"), (13020, "nvidia-cuda-nvrtc")]
)
def test_no_compiler(gpu, monkeypatch, version, package):
    def not_found():
        raise RuntimeError("libnvrtc.so.13")

    gpu.getVersion, gpu.runtimeGetVersion = not_found, lambda: version
    monkeypatch.setattr(torch.version, "cuda", f"{version // 1000}.0")
    assert cuda.refusal(GPU) == f"CuPy does not find the compiler NVRTC (pip install {package})"


def test_no_sources(gpu, monkeypatch):
    def missing():
        raise FileNotFoundError("no cuda/ folder: install fairseq_fastweights again")

    monkeypatch.setattr(cuda, "cuda_source_dir", missing)
    assert "install fairseq_fastweights again" in cuda.refusal(GPU)


def test_a_refused_backend_is_not_taken(gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose("auto", GPU) is dispatch.SCANS["chunked"]
    with pytest.raises(ValueError, match="'cuda' cannot run here: CuPy is not installed .pip install"):
        dispatch.choose("cuda", GPU)


def test_limits_are_what_torch_says(monkeypatch):
    found = types.SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    cuda.limits.cache_clear()
    assert cuda.limits(GPU) == (232448, 132)
    cuda.limits.cache_clear()


def test_report_of_this_machine():
    text = "\n".join(report.lines())
    assert "tensors on cpu" in text
    assert "  cuda      no: the tensors are on cpu, not on a CUDA device" in text
    assert text.count("taken by auto") == len(report.devices())


def test_report_of_a_gpu(gpu, monkeypatch):
    found = types.SimpleNamespace(
        name="Some GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    text = "\n".join(report.lines())
    assert "tensors on cuda:0: Some GPU, sm_90, 132 multiprocessors, 80 GiB" in text
    assert "  cuda      yes, taken by auto" in text
