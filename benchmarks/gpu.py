"""On a GPU, in one command: are the CUDA kernels right, how fast are they, how much memory do they need.

    python benchmarks/gpu.py            # what runs and why not, checks, times, memory; a Markdown table and gpu.json
    python benchmarks/gpu.py --quick    # fewer checks, shapes and repeats
    python benchmarks/gpu.py --readme   # also puts the tables into benchmarks/README.md
    python benchmarks/gpu.py --dry      # no GPU: the same code at tiny sizes on the CPU; its times mean nothing

Exit code: 0 if everything passes, 1 if anything fails, 2 if the kernels cannot run here at all.

Checks: outputs, final states and all gradients of backend "cuda" against backend "reference" in float64, the largest
error over the largest magnitude; two runs must give the same bits. On a GPU also CUDA graphs, a side stream and a
second device.

Times are CUDA events around work that waits in the queue behind reads of a large buffer: the L2 cache is cold, and
what Python needs to launch the work ("host") is not in them. It is what there is to wait for where "host" is the longer
of both and nothing else is queued. Candidates take turns, and ratios are of medians. GB/s are the fewest bytes that the
work can move (every input, output, saved tensor and gradient once, as kernel_traffic.py counts them) over the time.

"PyTorch" is backend "chunked" of a scan, and the torch operations of a step or a feature map. Softmax attention has
heads as wide as the values, as the layer would have without a feature map. flash-linear-attention runs in bfloat16
only, on tensors in its own layout (batch, tokens, heads, width).
"""

import abc
import argparse
import contextlib
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from kernel_traffic import DEVICES, instead_of_gpu
from kernel_traffic import SHAPES as LAYERS
from measure import summary, write_json, write_section
from torch import Tensor

from fairseq_fastweights.feature_maps import FeatureMap, address, build_feature_map
from fairseq_fastweights.ops import cuda, cuda_scan, decode, fast_weight_scan, fast_weight_step, report
from fairseq_fastweights.ops.dispatch import refusals

Tensors = Dict[str, Tensor]
Run = Callable[[], object]

# The largest error over the largest magnitude, by the dtype of a result. All sums are float32, so what a half type adds
# is one rounding.
BOUNDS = {
    torch.float32: 1e-5,
    torch.float16: 1.1 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 1.1 * torch.finfo(torch.bfloat16).eps,
}
# Bytes a second by how torch's name of a device ends, from the data sheets.
BANDWIDTHS = {
    "H100 80GB HBM3": DEVICES["H100"].bandwidth,
    "A100-SXM4-80GB": DEVICES["A100"].bandwidth,
}
BUFFER = 2**28  # bytes, more than any L2 cache
HUGE = 1e300  # an error that JSON can hold
OURS, TORCH, SOFTMAX, FLA = "cuda", "PyTorch", "softmax", "fla"
PEERS = (TORCH, SOFTMAX, FLA)


def short(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[-1]


def random(dtype: torch.dtype, *shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers, on the device of the generator."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def uniform(dtype: torch.dtype, *shape: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), on the device of the generator."""
    return torch.rand(*shape, generator=generator, device=generator.device).to(dtype)


def seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def leaves(inputs: Tensors) -> Tensors:
    """The same memory, asking for gradients."""
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


# ---- what is checked: each case makes its operands, and runs them through the kernels or in float64 ----


@dataclass(frozen=True)
class ScanCase:
    """``fast_weight_scan`` forward and backward. ``state``: from an initial to a final one, or with neither."""

    rule: str
    dtype: torch.dtype
    batch: int
    heads: int
    tokens: int
    dk: int
    dv: int
    state: bool = True

    def __str__(self) -> str:
        sizes = f"B{self.batch} H{self.heads} T{self.tokens} {self.dk}x{self.dv}"
        return f"scan, {self.rule}, {short(self.dtype)}, {sizes}{', states' if self.state else ''}"

    def operands(self, device: torch.device, seed: int = 0) -> Tensors:
        """Keys of length 1 and gates in (0, 1), so that errors do not grow; gradients of the results with them.

        The delta rule erases along the key, as the models' does; the gated one with keys of its own.
        """
        g, rows = seeded(device, seed), (self.batch, self.heads, self.tokens)
        k = F.normalize(random(torch.float32, *rows, self.dk, generator=g), dim=-1)
        x = {"q": random(self.dtype, *rows, self.dk, generator=g), "k": k.to(self.dtype)}
        x["v"] = random(self.dtype, *rows, self.dv, generator=g)
        beta = uniform(torch.float32, *rows, generator=g)
        if self.rule != "sum":
            x["write"] = beta.to(self.dtype)
        if self.rule == "delta":
            x["erase"] = x["write"].clone()
        if self.rule == "gated-delta":
            other = F.normalize(k + random(torch.float32, *rows, self.dk, generator=g) / 10, dim=-1)
            x["erase"] = (beta[..., None] * other).to(self.dtype)
            x["log_decay"] = -uniform(self.dtype, *rows, generator=g)
        x["d_out"] = random(self.dtype, *rows, self.dv, generator=g)
        if self.state:
            state = (self.batch, self.heads, self.dk, self.dv)
            x["state"], x["d_state"] = (random(torch.float32, *state, generator=g) for _ in range(2))
        return x

    def ours(self, given: Tensors) -> Tensors:
        return self._run(given, "cuda")

    def exact(self, given: Tensors) -> Tensors:
        return self._run({name: x.double() for name, x in given.items()}, "reference")

    def _run(self, given: Tensors, backend: str) -> Tensors:
        inputs = leaves({name: x for name, x in given.items() if not name.startswith("d_")})
        results = fast_weight_scan(**inputs, return_state=self.state, backend=backend)
        found = {name: x for name, x in zip(("out", "state"), results) if x is not None}
        grads = torch.autograd.grad(
            list(found.values()), list(inputs.values()), [given[f"d_{name}"] for name in found]
        )
        names = {"state": "final state"}
        return {
            **{names.get(name, name): x.detach() for name, x in found.items()},
            **{f"gradient of {name}": x for name, x in zip(inputs, grads)},
        }


@dataclass(frozen=True)
class StepCase:
    """``fast_weight_step`` of rows that continue from others; ``erase`` with keys of its own in the gated rule."""

    rule: str
    dtype: torch.dtype
    rows: int
    heads: int
    dk: int
    dv: int

    def __str__(self) -> str:
        sizes = f"{self.rows} rows H{self.heads} {self.dk}x{self.dv}"
        return f"step, {self.rule}, {short(self.dtype)}, {sizes}"

    def operands(self, device: torch.device, seed: int = 0) -> Tensors:
        scan = ScanCase(self.rule, self.dtype, self.rows, self.heads, 1, self.dk, self.dv)
        x = scan.operands(device, seed)
        token = {name: y if name == "state" else y[:, :, 0] for name, y in x.items() if name[:2] != "d_"}
        parent = torch.randint(self.rows, (self.rows,), generator=seeded(device, seed), device=device)
        return {**token, "parent": parent}

    def ours(self, given: Tensors) -> Tensors:
        out, state = fast_weight_step(**given)
        in_place = {name: x.clone() if name == "state" else x for name, x in given.items()}
        del in_place["parent"]
        out_in_place, same = fast_weight_step(**in_place, out_state=in_place["state"])
        return {"out": out, "state": state, "out in place": out_in_place, "state in place": same}

    def exact(self, given: Tensors) -> Tensors:
        """float64 takes the path of torch operations, which makes new states."""
        wide = {name: x.double() for name, x in given.items() if name != "parent"}
        out, state = fast_weight_step(**wide, parent=given["parent"])
        out_in_place, same = fast_weight_step(**wide)
        return {"out": out, "state": state, "out in place": out_in_place, "state in place": same}


@dataclass(frozen=True)
class MapCase:
    """A feature map and its normalisation, forward and backward."""

    name: str
    normalization: str
    dtype: torch.dtype
    rows: Tuple[int, int, int]  # batch, heads, tokens
    width: int
    options: Tuple[Tuple[str, int], ...] = ()

    def __str__(self) -> str:
        sizes = "B{} H{} T{}".format(*self.rows)
        options = "".join(f" {option} {value}" for option, value in self.options[:1])
        return f"{self.name}{options}, {self.normalization}, {short(self.dtype)}, {sizes} d{self.width}"

    @functools.lru_cache(None)  # a CUDA graph cannot copy it to the device
    def feature_map(self, device: torch.device) -> FeatureMap:
        torch.manual_seed(0)  # of FAVOR+'s directions
        return build_feature_map(self.name, self.width, **dict(self.options)).to(device)

    def operands(self, device: torch.device, seed: int = 0) -> Tensors:
        g = seeded(device, seed)
        features = self.feature_map(device).output_dim
        return {
            "x": random(self.dtype, *self.rows, self.width, generator=g),
            "d_out": random(torch.float32, *self.rows, features, generator=g),
        }

    def ours(self, given: Tensors) -> Tensors:
        return self._run(given, "cuda")

    def exact(self, given: Tensors) -> Tensors:
        return self._run({name: x.double() for name, x in given.items()}, "reference")

    def _run(self, given: Tensors, backend: str) -> Tensors:
        x = given["x"].detach().requires_grad_()
        out = address(self.feature_map(x.device), x, self.normalization, backend=backend)
        (d_x,) = torch.autograd.grad(out, x, given["d_out"])
        return {"out": out.detach(), "gradient of x": d_x}


# ---- checks ----


@dataclass(frozen=True)
class Check:
    """What one check found; ``passed`` is None where it could not be made, and ``note`` says why."""

    what: str
    passed: Optional[bool]
    note: str = ""
    worst: str = ""  # the result nearest to its bound
    error: Optional[float] = None
    bound: Optional[float] = None

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "skipped"}[self.passed]
        figures = f": {self.worst} {self.error:.1e}, bound {self.bound:.1e}" if self.worst else ""
        return f"{verdict:7} {self.what}{figures}{f' ({self.note})' if self.note else ''}"


def relative_error(x: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected; HUGE where x is not finite."""
    largest = expected.abs().max().item() or 1.0
    error = (x.double() - expected).abs().max().item() / largest
    return error if error < HUGE else HUGE


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def line_of(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def guarded(what: str, check: Callable, case, device: torch.device) -> Check:
    """An exception fails its check, and the other checks go on."""
    try:
        found = check(case, device)
        return replace(found, what=f"{what}{found.what}")
    except Exception as error:
        return Check(f"{what}{case}", False, line_of(error))


def check_accuracy(case, device: torch.device) -> Check:
    given = case.operands(device)
    found, again, expected = case.ours(given), case.ours(given), case.exact(given)
    errors = {name: (relative_error(x, expected[name]), BOUNDS[x.dtype]) for name, x in found.items()}
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    repeats = same_bits(found, again)
    passed = repeats and all(error <= bound for error, bound in errors.values())
    return Check(str(case), passed, "" if repeats else "two runs differ", worst, *errors[worst])


def check_graph(case, device: torch.device) -> Check:
    """A captured graph, replayed with other numbers, does what the same calls do without it."""
    static, other = case.operands(device), case.operands(device, seed=1)
    expected = case.ours(other)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            case.ours(static)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.ours(static)
    for name, x in static.items():
        x.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize(device)
    equal = same_bits(found, expected)
    return Check(str(case), equal, "" if equal else "the replay differs")


def check_stream(case, device: torch.device) -> Check:
    """Operands that a side stream writes late: whoever reads them on another stream finds zeros."""
    given = case.operands(device)
    expected = case.ours(given)
    late = {name: torch.zeros_like(x) for name, x in given.items()}
    busy = torch.empty(BUFFER, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for n in range(50):
            busy.fill_(n)
        for name, x in late.items():
            x.copy_(given[name])
        found = case.ours(late)
    stream.synchronize()
    equal = same_bits(found, expected)
    return Check(str(case), equal, "" if equal else "the results differ")


def check_second_device(case, device: torch.device) -> Check:
    """The same on a device that is not the current one."""
    others = [n for n in range(torch.cuda.device_count()) if n != torch.cuda.current_device()]
    if not others:
        return Check(str(case), None, "there is one device")
    other = torch.device("cuda", others[0])
    reason = cuda.refusal(other)
    if reason is not None:
        return Check(str(case), None, reason)
    return check_accuracy(case, other)


# A capture that fails may leave torch's allocator unusable, so it comes last.
DEVICE_CHECKS = {
    "side stream": check_stream,
    "another device": check_second_device,
    "CUDA graph": check_graph,
}


def device_checks(cases: Sequence[object], device: torch.device) -> Iterator[Check]:
    """What only a device can show; on the CPU it is skipped."""
    for what, check in DEVICE_CHECKS.items():
        if device.type == "cpu":
            yield Check(what, None, "needs a GPU")
        else:
            yield from (guarded(f"{what}, ", check, case, device) for case in cases)


# ---- what is timed ----


class Work(NamedTuple):
    """What takes turns in one row of the table, by name, and the fewest bytes that ours can move."""

    what: str
    dtype: torch.dtype
    direction: str
    candidates: Dict[str, Run]
    least: int


DIRECTIONS = ("forward", "forward + backward")
FORWARD, BOTH = DIRECTIONS


def pass_of(call: Callable[..., Tensor], inputs: Tensors, d_out: Tensor, direction: str) -> Run:
    """One pass of ``call``: as in inference, or with the gradients of all inputs."""

    def forward():
        with torch.no_grad():
            call(**inputs)

    asking = leaves(inputs)

    def both():
        torch.autograd.grad(call(**asking), list(asking.values()), d_out)

    return forward if direction == FORWARD else both


def scan_work(what: str, case: ScanCase, direction: str, device: torch.device, fla: "Fla") -> Work:
    """A scan without states against its form in PyTorch, softmax attention and flash-linear-attention."""
    inputs = case.operands(device)
    d_out = inputs.pop("d_out")
    g, rows = seeded(device, 1), (case.batch, case.heads, case.tokens)
    heads = {name: random(case.dtype, *rows, case.dv, generator=g) for name in ("query", "key")}
    heads["value"] = inputs["v"]
    softmax = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    candidates = {
        OURS: pass_of(scan_by("cuda"), inputs, d_out, direction),
        TORCH: pass_of(scan_by("chunked"), inputs, d_out, direction),
        SOFTMAX: pass_of(softmax, heads, d_out, direction),
    }
    if case.rule in fla.rules and case.dtype == torch.bfloat16:
        d_out = d_out.transpose(1, 2).contiguous()
        candidates[FLA] = pass_of(fla.rules[case.rule], fla_layout(inputs), d_out, direction)
    return Work(what, case.dtype, direction, candidates, least_of_scan(case, direction, device))


def scan_by(backend: str) -> Callable[..., Tensor]:
    return lambda **inputs: fast_weight_scan(**inputs, return_state=False, backend=backend)[0]


def least_of_scan(case: ScanCase, direction: str, device: torch.device) -> int:
    """As kernel_traffic.py counts, for a scan by the sum or delta rule without states."""
    heads, size, erases = case.batch * case.heads, case.dtype.itemsize, case.rule == "delta"
    cut = cuda_scan.plan(
        heads, case.tokens, case.dk, case.dv, int(erases), False, False, 0, cuda.limits(device)
    )
    inputs = case.tokens * (size * (2 * case.dk + case.dv) + 4 * 2 * erases)
    output = case.tokens * case.dv * size
    saved = 4 * ((case.tokens > cut.chunk) * case.dk * case.dv + erases * case.tokens * case.dv)
    return heads * (inputs + output if direction == FORWARD else 3 * inputs + 2 * output + 2 * saved)


def step_work(what: str, case: StepCase, direction: str, device: torch.device, fla: "Fla") -> Work:
    """A decoding step against index_select and torch operations."""
    x = case.operands(device)
    arguments = [x.get(name) for name in ("q", "k", "v", "write", "erase", "log_decay", "state", "parent")]

    def torch_step():
        with torch.no_grad():
            decode.step(*arguments, None)

    small = [y for name, y in x.items() if name != "state"]
    out = x["v"]
    least = 2 * x["state"].nbytes + sum(y.nbytes for y in (*small, out))
    candidates = {OURS: lambda: fast_weight_step(**x), TORCH: torch_step}
    return Work(what, case.dtype, direction, candidates, least)


def map_work(what: str, case: MapCase, direction: str, device: torch.device, fla: "Fla") -> Work:
    """A feature map and its normalisation against torch operations."""
    given, feature_map = case.operands(device), case.feature_map(device)
    x, d_out = given["x"], given["d_out"]

    def by(backend: str) -> Run:
        def call(x):
            return address(feature_map, x, case.normalization, backend=backend)

        return pass_of(call, {"x": x}, d_out, direction)

    once = x.nbytes + d_out.nbytes  # the features are as large as their gradient
    least = once if direction == FORWARD else 2 * once + x.nbytes
    return Work(what, case.dtype, direction, {OURS: by("cuda"), TORCH: by("reference")}, least)


# ---- flash-linear-attention ----


class Fla(NamedTuple):
    """The rules that flash-linear-attention has, on tensors in its layout, or why there are none."""

    rules: Dict[str, Callable[..., Tensor]]
    note: str


def find_fla() -> Fla:
    try:
        import fla
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.linear_attn import chunk_linear_attn
    except Exception as error:  # its own imports fail in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == "fla"
        return Fla({}, f"not {'installed' if missing else f'usable: {line_of(error)}'}")
    rules = {
        "sum": lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0],
        "delta": lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta, scale=1.0)[0],
    }
    return Fla(rules, getattr(fla, "__version__", "of unknown version"))


def fla_layout(inputs: Tensors) -> Tensors:
    """(batch, tokens, heads, width), with one ``beta`` that writes and erases."""
    names = {"q": "q", "k": "k", "v": "v", "write": "beta"}
    return {names[name]: x.transpose(1, 2).contiguous() for name, x in inputs.items() if name in names}


def fla_differences(fla: Fla, case: ScanCase, device: torch.device) -> Dict[str, str]:
    """By rule how far its outputs are from the reference: whether it is asked for the same thing."""
    found = {}
    for rule, call in fla.rules.items():
        given = replace(case, rule=rule, dtype=torch.bfloat16, state=False).operands(device)
        del given["d_out"]
        exact = {name: x.double() for name, x in given.items()}
        expected, _ = fast_weight_scan(**exact, return_state=False, backend="reference")
        try:
            with torch.no_grad():
                found[rule] = f"{relative_error(call(**fla_layout(given)).transpose(1, 2), expected):.1e}"
        except Exception as error:
            found[rule] = line_of(error)
    return found


# ---- time and memory ----


class Meter(abc.ABC):
    """Takes the time and the memory of what runs on ``device``."""

    device: torch.device
    name: str

    @abc.abstractmethod
    def wait(self) -> None:
        """Until everything that was launched is done."""

    @abc.abstractmethod
    def seconds(self, run: Run, host: float) -> float:
        """Of one run that Python needs ``host`` seconds to launch."""

    @abc.abstractmethod
    def peak(self, run: Run) -> Optional[int]:
        """Bytes allocated at most during a run, beyond what was before; None if that is not known."""

    def host(self, run: Run) -> float:
        """Seconds until a run is launched, the best of three."""
        return min(self._launch(run) for _ in range(3))

    def _launch(self, run: Run) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    @property
    def bandwidth(self) -> Optional[float]:
        """Bytes a second by the data sheet, if the device is known."""
        return next((value for name, value in BANDWIDTHS.items() if self.name.endswith(name)), None)


class GpuMeter(Meter):
    """CUDA events, and what torch's allocator counts."""

    def __init__(self, device: torch.device):
        self.device, self.name = device, torch.cuda.get_device_name(device)
        self.buffer = torch.zeros(BUFFER // 4, device=device)
        self._timed(functools.partial(self._read, 3))
        self.read_seconds = self._timed(functools.partial(self._read, 20)) / 20

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, run: Run, host: float) -> float:
        """The device is kept busy for twice as long as the launches take, so that none of them is waited for."""
        self.wait()
        self._read(1 + min(500, math.ceil(2 * host / self.read_seconds)))
        return self._timed(run)

    def peak(self, run: Run) -> Optional[int]:
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _read(self, times: int) -> None:
        for _ in range(times):
            self.buffer.sum()

    def _timed(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class DryMeter(Meter):
    """The processor's clock, so that the script can be tried; memory is not counted."""

    device = torch.device("cpu")
    name = "no GPU: the CPU in its place"

    def wait(self) -> None:
        pass

    def seconds(self, run: Run, host: float) -> float:
        return self._launch(run)

    def peak(self, run: Run) -> Optional[int]:
        run()
        return None


def warm(meter: Meter, candidates: Dict[str, Run]) -> Dict[str, str]:
    """Compilers, tuners and allocations, before anything is timed; the errors of those that cannot run."""
    errors = {}
    for name, run in candidates.items():
        try:
            for _ in range(2):
                run()
            meter.wait()
        except Exception as error:
            errors[name] = line_of(error)
            torch.cuda.empty_cache()
    return errors


def time_of(meter: Meter, work: Work, budget: float) -> dict:
    """A row of the table; ``budget``: about how many seconds it may take."""
    errors = warm(meter, work.candidates)
    runs = {name: run for name, run in work.candidates.items() if name not in errors}
    host = {name: meter.host(run) for name, run in runs.items()}
    start = time.perf_counter()
    for name, run in runs.items():
        meter.seconds(run, host[name])
    repeats = max(5, min(50, int(budget / (time.perf_counter() - start + 1e-9))))
    seconds: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(meter.seconds(run, host[name]))
    times = {name: {**summary(found), "host": host[name]} for name, found in seconds.items()}
    row = {"work": work.what, "dtype": short(work.dtype), "pass": work.direction, "least": work.least}
    rate = work.least / times[OURS]["median"] if OURS in times else None
    share = rate / meter.bandwidth if rate and meter.bandwidth else None
    return {**row, "times": times, "bytes a second": rate, "share": share, "errors": errors}


def memory_of(meter: Meter, what: str, case: ScanCase, fla: Fla) -> dict:
    """Peak of forward and backward of all candidates, and of the step-by-step reference."""
    work = scan_work(what, case, BOTH, meter.device, fla)
    inputs = case.operands(meter.device)
    d_out = inputs.pop("d_out")
    runs = {**work.candidates, "reference": pass_of(scan_by("reference"), inputs, d_out, BOTH)}
    errors, peaks = warm(meter, runs), {}
    for name, run in runs.items():
        if name not in errors:
            peaks[name] = meter.peak(run)
    return {"work": what, "dtype": short(case.dtype), "peaks": peaks, "errors": errors}


# ---- sizes ----


class Sizes(NamedTuple):
    """What one run does; ``budget``: seconds for each row of times."""

    checks: Sequence[object]
    device_checks: Sequence[object]
    scans: Dict[str, ScanCase]
    steps: Dict[str, StepCase]
    maps: Dict[str, MapCase]
    memory: Dict[str, ScanCase]
    fla: ScanCase
    budget: float

    def works(self) -> Iterator[Callable[[torch.device, Fla], Work]]:
        """What makes each row's work, so that the tensors of one row at a time are there."""
        for make, cases, directions in (
            (scan_work, self.scans, DIRECTIONS),
            (step_work, self.steps, [FORWARD]),
            (map_work, self.maps, DIRECTIONS),
        ):
            for what, case in cases.items():
                for dtype in (torch.float32, torch.bfloat16):
                    for direction in directions:
                        yield functools.partial(make, what, replace(case, dtype=dtype), direction)


RULES = ("sum", "delta", "gated-delta")
SINGLE, HALVES = torch.float32, (torch.float16, torch.bfloat16)


def scan_cases(dtypes: Sequence[torch.dtype], *sizes: tuple) -> List[ScanCase]:
    return [ScanCase(rule, dtype, *size) for size in sizes for dtype in dtypes for rule in RULES]


def step_cases(dtypes: Sequence[torch.dtype], *sizes: tuple) -> List[StepCase]:
    return [StepCase(rule, dtype, *size) for size in sizes for dtype in dtypes for rule in RULES]


def map_cases(dtypes: Sequence[torch.dtype], rows: tuple, *maps: tuple) -> List[MapCase]:
    """maps: (name, normalization, width, options)"""
    return [
        MapCase(name, normalization, dtype, rows, width, options)
        for name, normalization, width, options in maps
        for dtype in dtypes
    ]


def plain_scans(*sizes: Tuple[int, int, int, int]) -> Dict[str, ScanCase]:
    """Both ungated rules at (batch, heads, tokens, width)."""
    return {
        f"B{b} H{h} T{t} d{d}, {rule}": ScanCase(rule, SINGLE, b, h, t, d, d, False)
        for b, h, t, d in sizes
        for rule in ("delta", "sum")
    }


def layers() -> Tuple[Dict[str, ScanCase], Dict[str, StepCase]]:
    """The scans and the decoding step of kernel_traffic.py, all of 8 heads."""
    scans, steps = {}, {}
    for what, x in LAYERS.items():
        if x.tokens:
            scans[what] = ScanCase(x.rule, SINGLE, x.heads // 8, 8, x.tokens, x.dk, x.dv, False)
        else:
            steps[what] = StepCase(x.rule, SINGLE, x.heads // 8, 8, x.dk, x.dv)
    return scans, steps


def favor(directions: int) -> tuple:
    return (("features", directions), ("redraw_interval", 0), ("scale_input", True))


ODD, NARROW = (2, 3, 37, 20, 12), (1, 2, 45, 7, 5)
SEVERAL_TILES, SPLIT_VALUES = (1, 2, 70, 130, 68), (1, 2, 300, 64, 64)
ONE_CHUNK, LONG = (4, 4, 16, 384, 64, False), (1, 8, 1024, 64, 64)
STATE_IN_MEMORY = (1, 2, 40, 3072, 20)  # too large for any device's shared memory
WIDE = (2, 4, 100, 128, 128)
LAYER_SCANS, LAYER_STEPS = layers()
FULL = Sizes(
    checks=[
        *scan_cases(
            [SINGLE], ODD, NARROW, SEVERAL_TILES, SPLIT_VALUES, ONE_CHUNK, LONG, STATE_IN_MEMORY, WIDE
        ),
        *scan_cases(HALVES, ODD, NARROW, SEVERAL_TILES, SPLIT_VALUES),
        *step_cases([SINGLE, *HALVES], (37, 8, 128, 64), (5, 3, 20, 12), (5, 3, 7, 5), (3, 2, 384, 64)),
        *map_cases(
            [SINGLE, *HALVES],
            (2, 3, 37),
            ("elu", "sum", 64, ()),
            ("elu", "l2", 20, ()),
            ("dpfp", "sum", 64, (("nu", 3),)),
            ("dpfp", "sum", 16, (("nu", 1),)),
            ("dpfp", "l2", 7, (("nu", 2),)),
            ("favor", "sum", 64, favor(64)),
            ("favor", "sum", 20, favor(30)),
        ),
    ],
    device_checks=[
        ScanCase("gated-delta", SINGLE, *ODD),
        ScanCase("delta", torch.bfloat16, *SPLIT_VALUES),
        StepCase("delta", SINGLE, 37, 8, 128, 64),
        MapCase("favor", "sum", SINGLE, (2, 3, 37), 64, favor(64)),
    ],
    scans={
        **LAYER_SCANS,
        **plain_scans((8, 8, 256, 64), (4, 8, 1024, 64), (1, 8, 4096, 64), (2, 16, 16384, 128)),
    },
    steps=LAYER_STEPS,
    maps={
        "B96 H8 T256 d16, DPFP-1": MapCase("dpfp", "sum", SINGLE, (96, 8, 256), 16, (("nu", 1),)),
        "B256 H8 T32 d64, DPFP-3": MapCase("dpfp", "sum", SINGLE, (256, 8, 32), 64, (("nu", 3),)),
        "B32 H8 T256 d64, ELU": MapCase("elu", "sum", SINGLE, (32, 8, 256), 64),
        "B32 H8 T256 d64, FAVOR+ 64": MapCase("favor", "sum", SINGLE, (32, 8, 256), 64, favor(64)),
    },
    memory=plain_scans((1, 8, 4096, 64), (4, 8, 1024, 64)),
    fla=ScanCase("delta", torch.bfloat16, 2, 4, 256, 64, 64, False),
    budget=2.0,
)
QUICK = FULL._replace(
    checks=[
        *scan_cases([SINGLE, torch.bfloat16], ODD, SPLIT_VALUES),
        *step_cases([SINGLE, torch.bfloat16], (37, 8, 128, 64)),
        *map_cases(
            [SINGLE, torch.bfloat16],
            (2, 3, 37),
            ("elu", "sum", 64, ()),
            ("dpfp", "sum", 64, (("nu", 3),)),
            ("favor", "sum", 64, favor(64)),
        ),
    ],
    scans={**LAYER_SCANS, **plain_scans((8, 8, 256, 64), (1, 8, 4096, 64))},
    memory=plain_scans((1, 8, 4096, 64)),
    budget=0.3,
)
DRY = Sizes(
    checks=[
        *scan_cases([SINGLE], (1, 2, 20, 8, 8)),
        ScanCase(
            "gated-delta", SINGLE, 1, 1, 70, 72, 20
        ),  # several tiles, values over two blocks, a sum of parts
        *(ScanCase("delta", dtype, 1, 2, 20, 7, 5) for dtype in HALVES),
        *step_cases([SINGLE], (5, 2, 8, 8)),
        *map_cases(
            [SINGLE],
            (1, 2, 5),
            ("elu", "sum", 8, ()),
            ("dpfp", "sum", 8, (("nu", 3),)),
            ("favor", "sum", 8, favor(6)),
        ),
    ],
    device_checks=[],
    scans=plain_scans((1, 2, 20, 8)),
    steps={"5 rows H2, delta": StepCase("delta", SINGLE, 5, 2, 8, 8)},
    maps={"B1 H2 T5 d8, ELU": MapCase("elu", "sum", SINGLE, (1, 2, 5), 8)},
    memory=plain_scans((1, 2, 20, 8)),
    fla=ScanCase("delta", torch.bfloat16, 1, 2, 20, 8, 8, False),
    budget=0.05,
)


# ---- tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


TIME_HEADER = ("work", "dtype", "pass", "cuda, ms", "host, ms", *(f"{peer}, ms" for peer in PEERS))
TIME_HEADER += (*(f"cuda / {peer}" for peer in PEERS), "least, MB", "GB/s", "of the data sheet")


def time_cells(row: dict) -> List[str]:
    """Medians with their spread, "-" for what did not run."""
    times = row["times"]

    def ms(name: str) -> str:
        found = times.get(name)
        return f"{1e3 * found['median']:.3g} ({found['spread']:.0%})" if found else "-"

    def ratio(peer: str) -> str:
        there = OURS in times and peer in times
        return f"{times[OURS]['median'] / times[peer]['median']:.3g}" if there else "-"

    rate, share = row["bytes a second"], row["share"]
    return [
        *(row[name] for name in ("work", "dtype", "pass")),
        ms(OURS),
        f"{1e3 * times[OURS]['host']:.3g}" if OURS in times else "-",
        *map(ms, PEERS),
        *map(ratio, PEERS),
        f"{row['least'] / 1e6:.3g}",
        f"{rate / 1e9:.3g}" if rate else "-",
        f"{share:.0%}" if share else "-",
    ]


MEMORY_NAMES = (OURS, *PEERS, "reference")
MEMORY_HEADER = ("work", "dtype", *(f"{name}, MB" for name in MEMORY_NAMES))


def memory_cells(row: dict) -> List[str]:
    peaks = (row["peaks"].get(name) for name in MEMORY_NAMES)
    return [row["work"], row["dtype"], *("-" if peak is None else f"{peak / 1e6:.3g}" for peak in peaks)]


def check_summary(found: Sequence[dict]) -> str:
    """One sentence, and a line for each that fails."""
    made = [Check(**x) for x in found]
    counts = {passed: sum(x.passed is passed for x in made) for passed in (True, False, None)}
    nearest = max((x.error / x.bound for x in made if x.worst), default=0.0)
    lines = [
        f"Checks: {counts[True]} pass, {counts[False]} fail, {counts[None]} skipped; "
        f"the largest error is {nearest:.2g} of its bound."
    ]
    return "\n".join([*lines, *(f"- {x}" for x in made if x.passed is False)])


def tables(results: dict) -> str:
    """All of the results, in Markdown."""
    return "\n\n".join(
        [
            f"{results['device']}, torch {torch.__version__}, CUDA {torch.version.cuda or '-'}; "
            f"flash-linear-attention {results['fla']['note']}.",
            check_summary(results["checks"]),
            table(TIME_HEADER, [time_cells(row) for row in results["times"]]),
            "Peak memory of forward + backward beyond the inputs:",
            table(MEMORY_HEADER, [memory_cells(row) for row in results["memory"]]),
        ]
    )


# ---- the whole ----

DRY_NOTE = "DRY RUN: the kernels ran on the CPU at tiny sizes; the times and ratios mean nothing."


def fill(results: dict, sizes: Sizes, meter: Meter) -> None:
    """Everything, noted in ``results`` as it is found, so that what was measured before a crash is kept."""

    def note(check: Check) -> None:
        results["checks"].append(asdict(check))
        print(check, flush=True)

    print("\n== checks against the reference in float64 (the first of each kind waits for a compiler)")
    for case in sizes.checks:
        note(guarded("", check_accuracy, case, meter.device))
    fla = find_fla()
    results["fla"] = {"note": fla.note, "differences": fla_differences(fla, sizes.fla, meter.device)}
    print(f"\n== flash-linear-attention {fla.note}")
    for rule, difference in results["fla"]["differences"].items():
        print(f"{rule}: its outputs in bfloat16 differ from the reference by {difference}")
    print("\n== times: median and spread in ms")
    for make in sizes.works():
        row = time_of(meter, make(meter.device, fla), sizes.budget)
        results["times"].append(row)
        print("  ".join(f"{name} {cell}" for name, cell in zip(TIME_HEADER, time_cells(row))), flush=True)
        print_errors(row)
    print("\n== peak memory of forward + backward")
    for what, case in sizes.memory.items():
        for dtype in (torch.float32, torch.bfloat16):
            row = memory_of(meter, what, replace(case, dtype=dtype), fla)
            results["memory"].append(row)
            print(
                "  ".join(f"{name} {cell}" for name, cell in zip(MEMORY_HEADER, memory_cells(row))),
                flush=True,
            )
            print_errors(row)
    print("\n== streams, devices and CUDA graphs")
    for check in device_checks(sizes.device_checks, meter.device):
        note(check)


def print_errors(row: dict) -> None:
    for name, error in row["errors"].items():
        print(f"  {name} did not run: {error}", flush=True)


def failures(results: dict) -> List[str]:
    """Checks that fail and rows in which our kernels did not run; a device may be too small for a row."""
    found = [str(Check(**x)) for x in results["checks"] if x["passed"] is False]
    for row in (*results["times"], *results["memory"]):
        error = row["errors"].get(OURS)
        if error is not None and not error.startswith("OutOfMemoryError"):
            found.append(f"FAIL    {row['work']}, {row['dtype']}: {error}")
    return found


def obstacle() -> Optional[str]:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return f"no CUDA device is seen by torch {torch.__version__}"
    reason = refusals(torch.device("cuda", torch.cuda.current_device()))["cuda"]
    return None if reason is None else f"the CUDA kernels cannot run: {reason}"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer checks, shapes and repeats")
    parser.add_argument("--json", help="where the results go; gpu.json, or gpu-dry.json of a dry run")
    parser.add_argument("--readme", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument(
        "--dry", action="store_true", help="no GPU: tiny sizes on the CPU, to try this script"
    )
    args = parser.parse_args(arguments)
    if args.dry and args.readme:
        parser.error("--dry measures nothing that could go into the README")
    if not args.dry:
        reason = obstacle()
        if reason is not None:
            print(f"gpu.py: {reason}; --dry tries this script without a GPU", file=sys.stderr)
            return 2
    lines = list(report.lines())
    print("\n".join([*lines, "", DRY_NOTE] if args.dry else lines))
    results = {"report": lines, "dry": args.dry, "checks": [], "fla": {}, "times": [], "memory": []}
    sizes = DRY if args.dry else QUICK if args.quick else FULL
    with instead_of_gpu() if args.dry else contextlib.nullcontext():
        meter = DryMeter() if args.dry else GpuMeter(torch.device("cuda", torch.cuda.current_device()))
        results["device"] = meter.name
        try:
            fill(results, sizes, meter)
        finally:
            write_json(args.json or ("gpu-dry.json" if args.dry else "gpu.json"), results)
    text = tables(results)
    print(f"\n{text}\n")
    if args.readme:
        write_section("gpu", "python benchmarks/gpu.py --readme", text)
    failed = failures(results)
    print("\n".join(failed) if failed else "Everything that was checked passes.")
    if args.dry:
        print(DRY_NOTE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
