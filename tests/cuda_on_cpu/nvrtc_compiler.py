"""Compile CUDA sources with NVRTC, without a GPU and without CuPy, but with the options that CuPy passes.

    compiled = compile_cuda(source, "sm_90", options=("-DD=64",))
    compiled.cubin                         # what a GPU would load
    compiled.kernels["scan"].registers     # what ptxas says of each kernel

This shows that NVIDIA's compiler takes a source for an architecture, and what the kernels need there; nothing runs. The
library is that of the package nvidia-cuda-nvrtc, called through ctypes. An error in the source raises CompileError with
the compiler's log; without the library LibraryMissing is raised.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


class LibraryMissing(RuntimeError):
    """NVRTC is not installed."""


class CompileError(RuntimeError):
    """NVRTC or ptxas refused a source. The text is its log, with file and line."""


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel needs, as ptxas reports it: for a thread, but `static_shared_bytes` for a block."""

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class CompiledSource:
    cubin: bytes
    kernels: dict[str, KernelUsage]
    log: str


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The library, from the installed package."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(r"libnvrtc\.so\.\d+", file.name):
                library = ctypes.CDLL(str(file.locate()))
                library.nvrtcGetErrorString.restype = ctypes.c_char_p
                return library
    raise LibraryMissing(f"compiling CUDA needs NVRTC: pip install {PACKAGES[0]}")


def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the library."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_cuda(
    source: str, arch: str, options: Sequence[str] = (), name: str = "kernel.cu"
) -> CompiledSource:
    """Compile for an architecture such as sm_90. `name` is what messages call a source without #line directives."""
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        all_options = _options(arch, options)
        encoded = (ctypes.c_char_p * len(all_options))(*[option.encode() for option in all_options])
        result = nvrtc().nvrtcCompileProgram(program, len(encoded), encoded)
        log = _fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if result:
            raise CompileError(f"{arch}: {_error(result)}\n{log}")
        return CompiledSource(_fetch(program, "CUBIN"), _read_usage(log), log)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _options(arch: str, options: Sequence[str]) -> list[str]:
    standard = [] if any("-std=" in option for option in options) else ["--std=c++17"]
    return [*standard, *options, *CUPY_OPTIONS, f"-arch={arch}", "--ptxas-options=-v"]


def _error(code: int) -> str:
    return nvrtc().nvrtcGetErrorString(code).decode()


def _call(function: str, *arguments: object) -> None:
    code = getattr(nvrtc(), function)(*arguments)
    if code:
        raise RuntimeError(f"{function}: {_error(code)}")


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, content)
    return content.raw


def _read_usage(log: str) -> dict[str, KernelUsage]:
    """The figures of `ptxas -v`: two lines follow the one that names a kernel."""
    kernels = {}
    for name, text in re.findall(r"entry function '(\w+)'(.*?)(?=entry function|\Z)", log, re.DOTALL):
        # a function that was not inlined has a line of its own, and its spills are the kernel's too
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        if not frames or not registers:
            raise RuntimeError(f"no figures for {name} in the log of ptxas:\n{log}")
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames))
        kernels[name] = KernelUsage(int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads)
    return kernels
