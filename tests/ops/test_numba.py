"""What is special about the CPU kernels: memory, layouts, threads, and being there or not."""

import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from operands import NUMBA, RULES, operands, relative_error, require_grad, written_out

from fairseq_fastweights.ops import dispatch, fast_weight_scan, numba_scan

ROOT = Path(__file__).resolve().parents[2]
needs_numba = NUMBA.marks[0]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_openmp = pytest.mark.skipif(
    numba_scan.parallel() is numba_scan._in_python_threads, reason="no OpenMP library with GNU's functions"
)


def run(inputs, backend="numba", d_out=None, **options):
    """(out, state, gradients by name); ``d_out`` makes the loss of the output, by default its sum."""
    leaves = require_grad(inputs)
    given = written_out(leaves) if backend == "reference" else leaves
    out, state = fast_weight_scan(**given, backend=backend, **options)
    names = [n for n, x in leaves.items() if x is not None]
    loss = (out.sum() if d_out is None else (out * d_out).sum()) + 2 * state.sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in names], materialize_grads=True)
    return out, state, dict(zip(names, grads))


def assert_equals_reference(inputs, tolerance=1e-10, **options):
    exact = {n: None if x is None else x.double() for n, x in inputs.items()}
    out, state, grads = run(inputs, **options)
    options.pop("chunk_size", None)
    expected, expected_state, expected_grads = run(exact, "reference", **options)
    assert relative_error(out, expected) <= tolerance
    assert relative_error(state, expected_state) <= tolerance
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) <= tolerance, f"gradient of {name}"
    return out, state, grads


def in_order(*axes):
    """x with its numbers in memory in another order of axes (of the first three for gates)."""

    def change(x):
        order = [a for a in axes if a < x.dim()]
        back = [order.index(a) for a in range(x.dim())]
        return x.permute(order).contiguous().permute(back)

    return change


def with_gaps(x):
    """Rows of a wider matrix, as of one projection for q, k and v."""
    return torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], -1)[
        ..., x.shape[-1] : 2 * x.shape[-1]
    ]


LAYOUTS = {
    "tokens first": in_order(2, 0, 1, 3),
    "heads last": in_order(0, 2, 1, 3),
    "rows transposed": in_order(0, 1, 3, 2),
    "width first": in_order(3, 0, 1, 2),
    "gates transposed": in_order(1, 0, 2, 3),
    "gaps": with_gaps,
    "one sentence": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "one token": lambda x: x[:, :, :1].expand_as(x),
    "one number a row": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].mean().expand_as(x) / 8,
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
}


@needs_numba
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
def test_operands_of_any_layout(layout, along_key, dtype, tolerance):
    inputs = operands(
        "gated-delta", tokens=11, heads=3, dk=5, dv=3, dtype=dtype, state=True, along_key=along_key
    )
    inputs = {n: LAYOUTS[layout](x) for n, x in inputs.items()}
    assert_equals_reference(inputs, tolerance, chunk_size=4)


@needs_numba
@pytest.mark.parametrize("name", ["q", "k", "v", "write", "erase", "log_decay", "state"])
def test_one_operand_of_another_layout(name):
    """No operand borrows the strides of another."""
    inputs = operands("gated-delta", tokens=11, heads=3, dk=5, dv=3, state=True)
    inputs[name] = in_order(2, 1, 0, 3)(inputs[name])
    assert_equals_reference(inputs, chunk_size=4)


@needs_numba
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout):
    inputs = operands("delta", tokens=11, heads=3, dk=5, dv=3, state=True)
    d_out = LAYOUTS[layout](torch.randn(2, 3, 11, 3, dtype=torch.float64))
    assert_equals_reference(inputs, d_out=d_out, chunk_size=4)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_in_memory_like_what_they_belong_to(dtype):
    """(T, B, H, width), as a projection gives it: no transposed copy follows."""
    inputs = operands("gated-delta", tokens=9, heads=3, dtype=dtype)
    inputs = {n: x if x is None else in_order(2, 0, 1, 3)(x) for n, x in inputs.items()}
    out, _, grads = run(inputs)
    for x in (out, *(grads[n] for n in ("q", "k", "v", "erase"))):
        assert x.permute(2, 0, 1, 3).is_contiguous()


@needs_numba
@pytest.mark.parametrize("rule", ["sum", "delta", "gated-delta"])
@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 5), (4, 1), (15, 17), (16, 16), (33, 31), (384, 1), (3, 130)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_widths_and_lengths_beside_the_tiles(rule, dk, dv, dtype, tolerance):
    for tokens, chunk_size in ((1, None), (3, None), (7, 5), (35, 18)):
        inputs = operands(rule, batch=1, tokens=tokens, dk=dk, dv=dv, dtype=dtype, state=tokens != 3)
        assert_equals_reference(inputs, tolerance, chunk_size=chunk_size)


@needs_numba
@pytest.mark.parametrize("batch, heads, dk, dv", [(1, 2, 0, 3), (1, 2, 3, 0), (0, 2, 3, 4), (2, 0, 3, 4)])
def test_empty_operands(batch, heads, dk, dv, poisoned_memory):
    """Without numbers a tensor has no address, and yet it is there."""
    inputs = operands("gated-delta", batch, heads, 5, dk, dv, state=True)
    assert_equals_reference(inputs)


@needs_numba
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("along_key", [False, True])
def test_work_memory_is_not_read_before_it_is_written(rule, along_key, poisoned_memory):
    """The kernels' own memory holds NaN from a scan of NaN of the same sizes, padding included."""
    for tokens, dk, dv, state in ((3, 5, 3, False), (9, 5, 3, True), (14, 18, 17, False), (40, 33, 2, True)):
        good = operands(rule, tokens=tokens, dk=dk, dv=dv, state=state, along_key=along_key)
        bad = {n: None if x is None else torch.full_like(x, torch.nan) for n, x in good.items()}
        for chunk_size in (None, 4, 10):
            run(bad, chunk_size=chunk_size)
            assert_equals_reference(good, chunk_size=chunk_size)


@needs_numba
def test_heads_do_not_see_each_other():
    """Not through the work memory that they use in turn either: NaN in one head stays there."""
    inputs = operands("gated-delta", batch=1, heads=3, tokens=11, state=True)
    _, state, grads = run(inputs, chunk_size=4)
    for name in inputs:
        inputs[name] = inputs[name].clone()
        inputs[name][:, 1] = torch.nan
    _, state_beside_nan, grads_beside_nan = run(inputs, chunk_size=4)
    assert state_beside_nan[:, 1].isnan().all()
    for x, y in [(state, state_beside_nan), *((grads[n], grads_beside_nan[n]) for n in inputs)]:
        assert torch.equal(x[:, ::2], y[:, ::2])


@needs_numba
@pytest.mark.parametrize("name", ["q", "k", "v", "write", "erase", "log_decay", "state"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_the_output(name, value):
    inputs = operands("gated-delta", batch=1, heads=1, tokens=9, state=True)
    inputs[name].view(-1)[0] = value
    out, state = fast_weight_scan(**inputs, backend="numba", chunk_size=4)
    expected, expected_state = fast_weight_scan(**inputs, backend="reference")
    assert not out[~expected.isfinite()].isfinite().any()
    assert not state[~expected_state.isfinite()].isfinite().any()


@needs_numba
@pytest.mark.parametrize("rule", ["sum", "delta", "gated-delta"])
def test_a_gradient_that_stops_is_zero(rule):
    """Where autograd passes no gradient at all on, the results are zeros and not unwritten memory."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d_out):
            return None

    inputs = require_grad(operands(rule, tokens=9, state=True))
    nan = [torch.full((2, 2, 4, 3), torch.nan, dtype=torch.float64) for _ in range(50)]
    del nan  # so that unwritten memory is not zero by chance
    out, _ = fast_weight_scan(**inputs, backend="numba", chunk_size=4)
    Stop.apply(out).sum().backward()
    assert all(x is None or x.grad is None or (x.grad == 0).all() for x in inputs.values())


@needs_numba
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_chunk_too_large_for_memory_is_an_error_or_cut():
    """What a kernel cannot allocate must not end in a result that nobody wrote."""
    tokens = 2**23  # the products of a chunk of them all need more than the address space
    x = torch.ones(1, 1, tokens, 1)
    try:
        _, state = fast_weight_scan(x, x, x, chunk_size=tokens, backend="numba")
    except (MemoryError, RuntimeError, ValueError):
        return
    assert state.item() == tokens


# Threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(numba_scan, "WORTH_A_THREAD", 0)
    torch.set_num_threads(2)


def counted(monkeypatch, function):
    """Make ``function`` what runs kernels in threads; the list it returns holds the threads of every call."""
    calls = []

    def parallel():
        return lambda *arguments: calls.append(arguments[2]) or function(*arguments)

    monkeypatch.setattr(numba_scan, "parallel", parallel)
    return calls


WAYS = [
    pytest.param(numba_scan.parallel(), id="OpenMP", marks=needs_openmp),
    pytest.param(numba_scan._in_python_threads, id="Python"),
]


@needs_numba
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("along_key", [False, True])
def test_same_bits_by_threads_as_by_one(way, along_key, two_threads, monkeypatch):
    inputs = operands("gated-delta", heads=3, tokens=70, dk=16, dv=16, state=True, along_key=along_key)
    calls = counted(monkeypatch, way)
    torch.set_num_threads(1)
    out, state, grads = run(inputs)
    assert calls == []
    for threads in (2, 5, 50):
        torch.set_num_threads(threads)
        out_2, state_2, grads_2 = run(inputs)
        assert calls == 2 * [min(threads, 6)], "forward and backward, never more threads than heads"
        assert torch.equal(out, out_2) and torch.equal(state, state_2)
        assert all(torch.equal(grads[n], grads_2[n]) for n in grads)
        calls.clear()


@pytest.mark.parametrize("way", WAYS)
def test_threads_run_at_the_same_time(way):
    together = threading.Barrier(3, timeout=60)
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def function(address):
        together.wait()
        seen.append((address, threading.get_ident()))

    way(function, 12345, 3)
    assert [address for address, _ in seen] == [12345] * 3
    assert len({thread for _, thread in seen}) == 3


@needs_numba
def test_short_scans_start_no_threads(monkeypatch):
    torch.set_num_threads(2)
    calls = counted(monkeypatch, numba_scan._in_python_threads)
    run(operands("delta"))
    assert calls == []


@needs_numba
def test_callers_in_several_threads(two_threads):
    inputs = operands("gated-delta", heads=3, tokens=70, dk=16, dv=16, state=True)
    expected = run(inputs)[0]
    results = []
    callers = [threading.Thread(target=lambda: results.append(run(inputs)[0])) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(results) == 4 and all(torch.equal(x, expected) for x in results)


@needs_numba
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_python_threads_after_a_fork(two_threads, monkeypatch):
    """The parent's helpers are not in the child, which needs its own."""
    calls = counted(monkeypatch, numba_scan._in_python_threads)
    inputs = operands("delta", heads=3, tokens=40)
    expected, _ = fast_weight_scan(**inputs, backend="numba")

    def in_child():
        calls.clear()
        out, _ = fast_weight_scan(**inputs, backend="numba")
        assert calls == [2] and torch.equal(out, expected)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs and child.exitcode == 0
    assert torch.equal(fast_weight_scan(**inputs, backend="numba")[0], expected)


# With and without numba


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(numba_scan, "refusal", numba_scan.refusal.__wrapped__)


def test_numba_backend_says_what_to_install(no_numba):
    with pytest.raises(
        ValueError, match="backend 'numba' cannot run here: .*numba.*pip install.*use 'auto'"
    ) as error:
        fast_weight_scan(**operands(), backend="numba")
    assert "\n" not in str(error.value)


def test_the_extra_of_the_message_exists(no_numba):
    extra = numba_scan.refusal().partition("[")[2].partition("]")[0]
    assert f'"{extra}":' in (ROOT / "setup.py").read_text()


def test_auto_runs_without_numba(no_numba):
    inputs = operands("gated-delta", tokens=40, along_key=True)
    out, _ = fast_weight_scan(**inputs)
    expected, _ = fast_weight_scan(**written_out(inputs), backend="reference")
    assert relative_error(out, expected) < 1e-10


def test_a_numba_that_cannot_be_imported_is_refused(no_numba, monkeypatch, tmp_path):
    """As numba itself does beside a numpy that is too new for it."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.syspath_prepend(tmp_path)
    assert "Numba needs NumPy 2.4 or less" in numba_scan.refusal()


def test_importing_the_operators_does_not_import_numba():
    code = "import sys, fairseq_fastweights.ops as o; sys.exit(any(m in sys.modules for m in ('numba', 'llvmlite')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@needs_numba
def test_numba_does_not_fill_the_log(caplog, monkeypatch):
    """fairseq's commands run at INFO, but LOGLEVEL=DEBUG must stay readable."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("numba"), "level", logging.NOTSET)
    numba_scan.kernel.__wrapped__("forward", torch.float64)
    import numba

    assert numba.njit(lambda x: x + 1)(1) == 2  # what the kernels are compiled by
    assert [r for r in caplog.records if r.name.startswith("numba")] == []


@needs_numba
def test_host_and_kernels_agree_about_a_job():
    from fairseq_fastweights.ops import numba_kernels

    assert numba_scan.JOB_SIZE == numba_kernels.JOB_SIZE


@needs_numba
def test_kernels_run_where_no_folder_can_be_written(monkeypatch, tmp_path):
    """numba finds no place for its cache: the kernel is compiled and runs all the same."""
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    function = numba_scan.kernel.__wrapped__("address_forward", torch.float64)
    assert ctypes.cast(function, ctypes.c_void_p).value


def test_refusals_of_every_backend_are_one_line():
    for device in ("cpu", "meta"):
        refusals = dispatch.refusals(torch.device(device))
        assert refusals.keys() == set(dispatch.BACKENDS) - {"auto"}
        assert all(reason is None or "\n" not in reason for reason in refusals.values())
