"""Run CUDA kernels on the CPU, unmodified and checked, through the part of cupy.RawModule's interface that we use.

    kernel = RawModule(code=source, options=("-DD=64",), check=True).get_function("scan")
    kernel((blocks,), (threads,), (x, y, np.int32(n)), shared_mem=4096, order=2, seed=1)

How: `cuda_cpu.h` makes CUDA C++ out of the source for g++; `cuda_cpu_rt.cpp` runs each CUDA thread as a fiber up to its
next barrier or warp operation, in order (`order=0`), in reverse (1) or at random from `seed` (2), one block after
another. Shared memory is NaN at the start of each block. Arguments are those of CuPy, but tensors of the CPU; scalars
must have the very type of the parameter, as for CuPy, which passes a Python int as 8 bytes.

Every run finds: divergent barriers, barriers and warp operations after some thread has left, deadlocks, shuffles from
absent lanes, failed assertions, arguments and launches of a wrong shape.

`check=True` sees every access to memory (`cuda_cpu_memory.cpp`) and also finds: races in shared and global memory,
within a block and between blocks; accesses outside of the arguments or of the dynamic shared memory; reads of shared
memory that nobody wrote; writes through pointers to const; misaligned accesses. A race is found in any order, since two
accesses count as ordered only when a barrier lies between them; a shuffle orders nothing, a `__syncwarp` only if the
whole warp is in it. The kernel works on copies of its arguments between red zones, as aligned as CUDA allocates.

`count=True` (and check) adds up the traffic, see `Traffic`. The host may leave all of this to `settings`/`running`.

Limits. Not checked: an index that leaves one static shared array for another; an access that g++ optimises away;
reads of global memory that nobody wrote. Synchronisation between blocks (flags, counters) is reported as a race. Not
modelled: the weak memory order that __threadfence is for, occupancy, speed. Different: subnormal numbers stay, while
CuPy compiles with -ftz=true; fast functions (__expf) are exact. Absent: tensor cores, cooperative groups, cp.async,
TMA, textures, clusters. There may be one dynamic shared array, `smem_raw`, and no kernel templates. It is some
thousand times slower than a GPU. Needs g++ 12 or later and binutils, on Linux.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import platform
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / f"cuda_on_cpu-{os.getuid()}"
CXX = os.environ.get("CXX", "g++")

RED_ZONE = 4096  # as in cuda_cpu_memory.cpp
ALIGNMENT = 256  # of what cudaMalloc returns, and torch's allocator
DEFAULT_DYNAMIC_SHARED = 48 << 10  # more must be asked for
MAX_DYNAMIC_SHARED = 232448  # as in cuda_cpu_rt.h
MAX_BLOCKS = 1 << 21  # of this executor, as in cuda_cpu_rt.h
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024

PLAIN, COUNT, CHECK = range(3)

# -fno-gnu-unique: two loaded modules must not share their statics. _FORTIFY_SOURCE would forbid the fibers' longjmp.
COMMON_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fno-extern-tls-init", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
# -gdwarf-4: addr2line up to binutils 2.40 takes the wrong file from version 5. Semantic interposition would keep g++
# from inlining __device__ functions. Multiplications and additions are contracted as on a GPU.
# -O1 without places of variables: most tests build a kernel for a few launches of small size.
KERNEL_FLAGS = [*COMMON_FLAGS, "-O1", "-gdwarf-4", "-fno-var-tracking"]
KERNEL_FLAGS += ["-w", "-fno-semantic-interposition", "-ffp-contract=fast"]
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_FLAGS.append("-march=x86-64-v3")
# One access of the source is to stay one access (or, for a float4, four).
HOOK_FLAGS = [
    "-fsanitize=thread,alignment",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize",
    "-fno-store-merging",
]

# The types that a parameter takes, by the letters of cuda_cpu.h.
SCALAR_TYPES = {
    "i": (np.int32, np.uint32),
    "q": (np.int64, np.uint64),
    "f": (np.float32,),
    "d": (np.float64,),
    "h": (np.int16, np.uint16),
    "b": (np.bool_, np.int8, np.uint8),
}


class KernelFault(AssertionError):
    """What is wrong with a launch: a line for each fault, with its kind, its place in the source, and who did it."""


# ---- what a launch reports ----


@dataclass(frozen=True)
class BufferTraffic:
    """Bytes of one buffer, which is one or several arguments that share a storage. An atomic reads and writes."""

    arguments: tuple[int, ...]
    read_bytes: int
    written_bytes: int
    read_per_block: int
    written_per_block: int


@dataclass(frozen=True)
class Traffic:
    """Memory traffic of a launch, as g++ compiled it with -O1.

    `read_bytes` and `written_bytes` count every access of every thread to global memory; the `_per_block` figures count
    a byte once for each block that reads or writes it, which is what remains if a block's repeated accesses meet in its
    cache. `shared_accesses` counts an access to four numbers (float4) as up to four. `barriers` counts __syncthreads
    once for each block that passes it.
    """

    read_bytes: int
    written_bytes: int
    read_per_block: int
    written_per_block: int
    shared_accesses: int
    shared_bytes: int
    barriers: int
    buffers: tuple[BufferTraffic, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A launch inside of `running`; `traffic` is None where nothing was counted."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_mem: int
    traffic: Traffic | None


# ---- settings for hosts that know nothing of this executor ----


@dataclass
class Settings:
    """What a launch does that does not say it itself."""

    check: bool = False
    count: bool = False
    order: int = 0
    seed: int = 0


settings = Settings()
_logs: list[list[Launch]] = []
_watched: list[torch.Tensor] = []


@contextmanager
def running(
    *,
    check: bool | None = None,
    count: bool | None = None,
    order: int | None = None,
    seed: int | None = None,
) -> Iterator[list[Launch]]:
    """Change `settings` for a while; what is None stays. Yields the list of the launches, which grows with each."""
    given = {"check": check, "count": count, "order": order, "seed": seed}
    before = replace(settings)
    launches: list[Launch] = []
    _logs.append(launches)
    vars(settings).update({name: value for name, value in given.items() if value is not None})
    try:
        yield launches
    finally:
        vars(settings).update(vars(before))
        _logs[:] = [log for log in _logs if log is not launches]


@contextmanager
def watch(*tensors: torch.Tensor) -> Iterator[None]:
    """Say to which tensors the addresses (np.uint64) in the arguments of launches belong.

    Only faster: an address of none of them is looked up among all living tensors.
    """
    count = len(_watched)
    _watched.extend(tensors)
    try:
        yield
    finally:
        del _watched[count:]


# ---- building ----


def _run(command: Sequence[object], folder: Path, stdin: str | None = None) -> str:
    try:
        result = subprocess.run(
            list(map(str, command)), cwd=folder, input=stdin, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise RuntimeError(
            f"{command[0]} is needed to run CUDA kernels on the CPU, and is not there"
        ) from None
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr[:8000]}")
    return result.stdout


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _runtime_texts() -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted(HERE.glob("cuda_cpu*")))


def _runtime_objects(folder: Path) -> list[Path]:
    """The two halves of the runtime, compiled once."""
    objects = []
    for name in ("cuda_cpu_rt", "cuda_cpu_memory"):
        cached = CACHE / f"{name}-{_digest(CXX, COMMON_FLAGS, _runtime_texts())}.o"
        if not cached.exists():
            _run([CXX, *COMMON_FLAGS, "-Wall", "-c", HERE / f"{name}.cpp", "-o", f"{name}.o"], folder)
            os.replace(folder / f"{name}.o", cached)
        objects.append(cached)
    return objects


# A kernel after preprocessing; cuda_cpu.h makes __global__ and __launch_bounds__ into these attributes. Between the
# words there may be line marks.
_GAP = r"(?:\s|^#.*$)*"
_BOUNDS = rf'(?:__attribute__\(\(cuda_launch_bounds\((?P<{{}}>.*?),{_GAP}"end"\)\)\){_GAP})?'
_KERNEL = re.compile(
    rf"__attribute__\(\(cuda_global\)\){_GAP}{_BOUNDS.format('before')}void{_GAP}{_BOUNDS.format('after')}"
    rf"(?P<name>\w+){_GAP}\(",
    re.MULTILINE | re.DOTALL,
)


def _entry_points(preprocessed: str) -> str:
    """C++ text by which the runtime calls each kernel of a source and knows its parameters."""
    lines = []
    for kernel in _KERNEL.finditer(preprocessed):
        name, bounds = kernel["name"], kernel["before"] or kernel["after"] or str(MAX_THREADS)
        lines += [
            f'extern "C" CCPU_UNSEEN void ccpu_call_{name}(void** arguments) {{ ccpu::call(&{name}, arguments); }}',
            f'extern "C" const char* ccpu_codes_{name}() {{ return ccpu::parameter_codes(&{name}); }}',
            f'extern "C" int ccpu_bounds_{name}() {{ return ccpu::max_threads({bounds}); }}',
        ]
    unseen = '__attribute__((no_sanitize("thread")))'  # macros are over after preprocessing
    return "\n".join(lines).replace("CCPU_UNSEEN", unseen) + "\n"


def _build(source: str, macros: tuple[str, ...], hooked: bool) -> Path:
    """The shared object of a source, from the cache or made now."""
    flags = [*KERNEL_FLAGS, *(HOOK_FLAGS if hooked else [])]
    target = CACHE / f"{_digest(CXX, source, macros, flags, _runtime_texts())}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        language = ["-x", "c++", "-E", "-include", HERE / "cuda_cpu.h", "-"]
        preprocessed = _run([CXX, *flags, *macros, *language], folder, stdin=source)
        (folder / "kernel.ii").write_text(f"{preprocessed}\n{_entry_points(preprocessed)}")
        _run([CXX, *flags, f"-fdebug-prefix-map={folder}=.", "-c", "kernel.ii", "-o", "kernel.o"], folder)
        objects = ["kernel.o", *_runtime_objects(folder)]
        _run([CXX, "-shared", "-Wl,-Bsymbolic", *objects, "-o", "kernel.so"], folder)
        os.replace(folder / "kernel.so", target)  # whole or not at all: other processes build the same
    return target


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int),
        ("mode", ctypes.c_int),
    ]


class _Library:
    """A source built with or without hooks at its memory accesses, and loaded."""

    def __init__(self, source: str, macros: tuple[str, ...], hooked: bool) -> None:
        self.path = _build(source, macros, hooked)
        self.functions = ctypes.CDLL(str(self.path))
        self.functions.ccpu_reports.restype = ctypes.c_char_p
        if hooked:
            self._tell_guards()

    def _tell_guards(self) -> None:
        for line in _run(["nm", self.path], CACHE).splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[1] in "bBdD" and fields[2].startswith("_ZGV"):
                self.functions.ccpu_add_guard(ctypes.c_size_t(int(fields[0], 16)))

    def has(self, kernel: str) -> bool:
        return hasattr(self.functions, f"ccpu_call_{kernel}")

    def codes(self, kernel: str) -> str:
        function = getattr(self.functions, f"ccpu_codes_{kernel}")
        function.restype = ctypes.c_char_p
        return function().decode()

    def max_threads(self, kernel: str) -> int:
        return getattr(self.functions, f"ccpu_bounds_{kernel}")()

    def launch(
        self, kernel: str, arguments: list[ctypes.Array | ctypes.c_uint64], config: _LaunchConfig
    ) -> int:
        """The number of faults."""
        call = ctypes.cast(getattr(self.functions, f"ccpu_call_{kernel}"), ctypes.c_void_p)
        pointers = (ctypes.c_void_p * max(1, len(arguments)))(*map(ctypes.addressof, arguments))
        return self.functions.ccpu_launch(call, pointers, ctypes.byref(config))

    def traffic(self, buffers: Sequence[_Buffer]) -> Traffic:
        shared, of_buffer = (ctypes.c_uint64 * 3)(), (ctypes.c_uint64 * 4)()
        self.functions.ccpu_traffic(shared)
        figures = []
        for i, buffer in enumerate(buffers):
            self.functions.ccpu_buffer_traffic(i, of_buffer)
            figures.append(BufferTraffic(tuple(buffer.arguments), *of_buffer))
        names = ("read_bytes", "written_bytes", "read_per_block", "written_per_block")
        sums = [sum(getattr(figure, name) for figure in figures) for name in names]
        return Traffic(*sums, *shared, tuple(figures))

    def reports(self) -> str:
        """The faults of the last launch, a line for each."""
        lines = [line.split("\t") for line in self.functions.ccpu_reports().decode().splitlines()]
        places = self._places([address for _, address, _ in lines if int(address, 16)])
        return "\n".join(
            f"  {kind}{' at ' + places[address] if address in places else ''}: {text}"
            for kind, address, text in lines
        )

    def _places(self, addresses: list[str]) -> dict[str, str]:
        """file:line for each program counter, and after it the calls that were inlined."""
        if not addresses:
            return {}
        chains: dict[str, list[str]] = {}
        for line in _run(["addr2line", "-a", "-i", "-e", self.path, *addresses], CACHE).splitlines():
            if line.startswith("0x"):
                chain = chains.setdefault(hex(int(line, 16)), [])
                continue
            place = os.path.normpath(line.split(" (")[0])
            if place not in chain and not place.startswith(f"{HERE}/cuda_cpu"):
                chain.append(place)
        return {
            address: chain[0] + "".join(f" (called at {place})" for place in chain[1:])
            for address, chain in chains.items()
            if chain
        }


# ---- arguments ----


class _Span(NamedTuple):
    """Memory from one address to before another."""

    begin: int
    end: int

    def overlaps(self, other: _Span) -> bool:
        return self.begin < other.end and other.begin < self.end


class _Pointer(NamedTuple):
    number: int  # of the argument
    address: int
    span: _Span | None  # what lies around it; None for a null pointer and for an empty tensor
    written: bool  # the parameter is not a pointer to const


@dataclass
class _Buffer:
    """A copy of the memory of one or several arguments, between red zones."""

    span: _Span
    arguments: list[int] = field(default_factory=list)
    written: bool = False
    memory: np.ndarray | None = None
    begin: int = 0

    def fill(self) -> None:
        size = self.span.end - self.span.begin
        self.memory = np.full(size + 2 * RED_ZONE + ALIGNMENT, 0xFF, np.uint8)
        self.begin = -(-(self.memory.ctypes.data + RED_ZONE) // ALIGNMENT) * ALIGNMENT
        ctypes.memmove(self.begin, self.span.begin, size)

    def write_back(self) -> None:
        if self.written:
            ctypes.memmove(self.span.begin, self.begin, self.span.end - self.span.begin)

    @property
    def name(self) -> str:
        return ("argument " if len(self.arguments) == 1 else "arguments ") + ", ".join(
            map(str, self.arguments)
        )


def _buffers(pointers: Sequence[_Pointer]) -> list[_Buffer]:
    """One buffer for all arguments whose memory overlaps."""
    buffers: list[_Buffer] = []
    with_memory = [pointer for pointer in pointers if pointer.span]
    for pointer in sorted(with_memory, key=lambda pointer: pointer.span):
        if buffers and buffers[-1].span.overlaps(pointer.span):
            last = buffers[-1].span
            buffers[-1].span = _Span(last.begin, max(last.end, pointer.span.end))
        else:
            buffers.append(_Buffer(pointer.span))
        buffers[-1].arguments.append(pointer.number)
        buffers[-1].written |= pointer.written
    for buffer in buffers:
        buffer.arguments.sort()
    return sorted(buffers, key=lambda buffer: buffer.arguments)


def _storage_span(tensor: torch.Tensor) -> _Span | None:
    storage = tensor.untyped_storage()
    return _Span(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) if storage.nbytes() else None


def _array_span(array: np.ndarray) -> _Span | None:
    while isinstance(array.base, np.ndarray):
        array = array.base
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides)]
    begin = array.ctypes.data + sum(offset for offset in reach if offset < 0)
    end = array.ctypes.data + sum(offset for offset in reach if offset > 0) + array.itemsize
    return _Span(begin, end) if array.size else None


class _Storages:
    """Finds the storage in which an address lies: that of a watched tensor, or of any that is alive."""

    @staticmethod
    def _spans(tensors: Iterable[torch.Tensor]) -> list[_Span]:
        spans = []
        for tensor in tensors:
            try:
                span = _storage_span(tensor) if tensor.device.type == "cpu" else None
            except RuntimeError:  # a kind of tensor without a storage
                continue
            spans += [span] if span else []
        return spans

    @functools.cached_property
    def _of_watched(self) -> list[_Span]:
        return self._spans(_watched)

    @functools.cached_property
    def _of_all(self) -> list[_Span]:  # some 10 ms
        return self._spans(thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    def find(self, address: int, number: int) -> _Span:
        for spans in (lambda: self._of_watched, lambda: self._of_all):
            for span in spans():
                if span.begin <= address < span.end:
                    return span
        raise KernelFault(f"argument {number}: the address {address:#x} belongs to no living tensor")


def _pointer_argument(number: int, value: Any, code: str, storages: _Storages | None) -> _Pointer:
    written = code == "P"
    if value is None:
        return _Pointer(number, 0, None, written)
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"argument {number} is a tensor on {value.device}, not on the CPU")
        return _Pointer(number, value.data_ptr(), _storage_span(value), written)
    if isinstance(value, np.ndarray):
        return _Pointer(number, value.ctypes.data, _array_span(value), written)
    if not isinstance(value, (int, np.uint64, np.int64)) or isinstance(value, bool):
        raise TypeError(f"argument {number} is {type(value).__name__}, the kernel wants a pointer")
    address = int(value)
    span = storages.find(address, number) if storages and address else None
    return _Pointer(number, address, span, written)


def _scalar_argument(number: int, value: Any, code: str) -> ctypes.Array:
    for python_type, as_cupy in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
        if type(value) is python_type:
            value = as_cupy(value)
    accepted = SCALAR_TYPES.get(code, ())
    if not isinstance(value, np.generic) or value.dtype.type not in accepted:
        wanted = accepted[0].__name__ if accepted else "a type that this executor cannot pass"
        raise TypeError(f"argument {number} is {type(value).__name__}, the kernel wants {wanted}")
    return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())


# ---- modules and kernels ----


class RawModule:
    """A CUDA source that runs on the CPU. Compiled when first needed, with hooks for check or count apart.

    Of `options` only macros count. #line directives are obeyed; without any the source is called `name`.
    """

    def __init__(
        self, code: str, options: Sequence[str] = (), check: bool = False, name: str = "kernel.cu"
    ) -> None:
        self._source = f'#line 1 "{name}"\n{code}'
        self._macros = tuple(option for option in options if option.startswith(("-D", "-U")))
        self._check = check
        self._libraries: dict[bool, _Library] = {}
        self._kernels: dict[str, Kernel] = {}

    def get_function(self, name: str) -> Kernel:
        """The kernel of that name; always the same object."""
        if name not in self._kernels:
            if not self._library().has(name):
                raise ValueError(f'no extern "C" __global__ function {name} in the source')
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]

    def _mode(self) -> int:
        return CHECK if self._check or settings.check else COUNT if settings.count else PLAIN

    def _library(self) -> _Library:
        hooked = self._mode() != PLAIN
        if hooked not in self._libraries:
            self._libraries[hooked] = _Library(self._source, self._macros, hooked)
        return self._libraries[hooked]


_one_launch = threading.Lock()  # the state of a running launch is global


class Kernel:
    """A kernel, to be called as one of CuPy is. `last_traffic` is that of the last launch which counted."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.name = name
        self.max_dynamic_shared_size_bytes = DEFAULT_DYNAMIC_SHARED
        self.last_traffic: Traffic | None = None
        self._module = module

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: object = None,
        order: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Launch, and raise KernelFault for all faults together. `stream` is ignored."""
        with _one_launch:
            library = self._module._library()
            self._check_shape(library, grid, block, shared_mem)
            config = _LaunchConfig(
                _three(grid),
                _three(block),
                shared_mem,
                settings.seed if seed is None else seed,
                settings.order if order is None else order,
                self._module._mode(),
            )
            faults = self._launch(library, args, config)
        traffic = self.last_traffic if config.mode != PLAIN else None
        for log in _logs:
            log.append(Launch(self.name, tuple(grid), tuple(block), shared_mem, traffic))
        if faults:
            raise KernelFault(f"{self.name}:\n{faults}")

    def _launch(self, library: _Library, args: Sequence[Any], config: _LaunchConfig) -> str:
        codes = library.codes(self.name)
        if len(args) != len(codes):
            raise TypeError(f"{self.name} takes {len(codes)} arguments, not {len(args)}")
        hooked = config.mode != PLAIN
        storages = _Storages() if hooked else None
        packed: list[Any] = [
            _pointer_argument(n, value, code, storages) if code in "pP" else _scalar_argument(n, value, code)
            for n, (value, code) in enumerate(zip(args, codes))
        ]
        buffers = _buffers([p for p in packed if isinstance(p, _Pointer)]) if hooked else []
        moved = dict.fromkeys(range(len(args)), 0)  # how far the copy is from the memory of an argument
        for buffer in buffers:
            buffer.fill()
            moved.update(dict.fromkeys(buffer.arguments, buffer.begin - buffer.span.begin))
            library.functions.ccpu_add_buffer(
                ctypes.c_size_t(buffer.begin),
                ctypes.c_size_t(buffer.span.end - buffer.span.begin),
                int(not buffer.written),
                buffer.name.encode(),
                int(config.mode == CHECK),
            )
        values = [
            ctypes.c_uint64(p.address + moved[p.number]) if isinstance(p, _Pointer) else p for p in packed
        ]
        try:
            count = library.launch(self.name, values, config)
            if hooked:
                self.last_traffic = library.traffic(buffers)
        finally:
            library.functions.ccpu_clear_buffers()
        for buffer in buffers:
            buffer.write_back()
        return library.reports() if count else ""

    def _check_shape(
        self, library: _Library, grid: Sequence[int], block: Sequence[int], shared_mem: int
    ) -> None:
        """Raise KernelFault for what a GPU refuses to launch."""
        for what, shape, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if not 1 <= len(shape) <= 3 or not all(1 <= n <= limit for n, limit in zip(shape, limits)):
                raise KernelFault(f"{self.name}: a {what} of {tuple(shape)}, the limits are {limits}")
        threads, most = int(np.prod(block)), min(MAX_THREADS, library.max_threads(self.name))
        if threads > most:
            raise KernelFault(f"{self.name}: a block of {threads} threads, launch bounds allow {most}")
        if int(np.prod(grid, dtype=np.int64)) >= MAX_BLOCKS:
            raise KernelFault(f"{self.name}: a grid of {tuple(grid)} is too big for the CPU executor")
        allowed = min(self.max_dynamic_shared_size_bytes, MAX_DYNAMIC_SHARED)
        if not 0 <= shared_mem <= allowed:
            raise KernelFault(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory, "
                f"max_dynamic_shared_size_bytes allows {allowed}"
            )


def _three(shape: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_uint * 3)(*shape, *[1] * (3 - len(shape)))
