"""The kernel of ``fast_weight_step``, launched by ops/cuda_step.py and run on the CPU, against a step in float64."""

import contextlib
from unittest import mock

import cuda_executor
import pytest
import torch
from cuda_stand_in import instead_of_gpu
from operands import RULES, operands, relative_error, written_out

from fairseq_fastweights.ops import cuda_step, fast_weight_step
from fairseq_fastweights.ops.cuda import ceil_div
from fairseq_fastweights.ops.cuda_step import MOST_HELD, MOST_THREADS, power_of_two, step_cut
from fairseq_fastweights.ops.decode import step

ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of 1: the largest relative distance of neighbours
STATE, OUT_STATE = 28, 34  # numbers of arguments
# Float32 registers for the state and the keys of a thread, by its columns; more would spill.

# ---- launching ----


def run(inputs, state, parent=None, in_place=False, cut=None, check=True, order=0, seed=0):
    """(out, out_state, traffic if checked)"""
    batch, heads, dk = inputs["k"].shape
    new = state if in_place else state.new_full((batch, heads, *state.shape[2:]), float("nan"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(instead_of_gpu())
        launches = stack.enter_context(cuda_executor.running(check=check, order=order, seed=seed))
        if cut is not None:
            stack.enter_context(mock.patch.object(cuda_step, "step_cut", lambda *sizes: cut))
        out, result = cuda_step.cuda_step(**inputs, state=state, parent=parent, out_state=new)
    assert result is new
    assert [launch.name for launch in launches] == ["step"]
    return out, new, launches[0].traffic


# ---- inputs ----

GATES = ("write", "log_decay")


def token(rule="gated-delta", dk=5, dv=3, batch=2, heads=2, dtype=torch.float32, rows=None, **options):
    """The operands of one step in ``dtype``, gates and state in float32, and the state (rows, heads, dk, dv)."""
    given = operands(rule, batch, heads, 1, dk, dv, **options)
    del given["state"]
    inputs = {}
    for name, x in given.items():
        gate = name in GATES or (name == "erase" and x is not None and x.dim() == 3)
        inputs[name] = None if x is None else x[:, :, 0].to(torch.float32 if gate else dtype).contiguous()
    g = torch.Generator().manual_seed(7)
    return inputs, torch.randn(rows or batch, heads, dk, dv, generator=g)


def expected_step(inputs, state, parent=None):
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    return step(**wide, state=state.double(), parent=parent, out_state=None)


def assert_equal_to_reference(inputs, state, parent=None, **options):
    expected, expected_state = expected_step(inputs, state, parent)
    out, new, traffic = run(inputs, state, parent, **options)
    assert relative_error(new, expected_state) <= 1e-5
    if out.dtype == torch.float32:
        assert relative_error(out, expected) <= 1e-5
    else:  # half a step of the half type, and the float32 error before it
        bound = 0.5 * ULP[out.dtype] * expected.abs() + 1e-5 * expected.abs().max()
        assert ((out.double() - expected).abs() <= bound).all()
    return traffic


# ---- tests ----

SIZES = [(5, 3), (1, 1), (64, 64), (33, 17), (16, 8), (7, 36), (384, 64)]


@pytest.mark.parametrize("dk, dv", SIZES)
def test_sizes(dk, dv):
    inputs, state = token(dk=dk, dv=dv, heads=3 if dk < 64 else 1, batch=2 if dk < 384 else 1)
    assert_equal_to_reference(inputs, state)


@pytest.mark.parametrize("cut", [(32, 256), (16, 64), (8, 32), (4, 96), (2, 32), (1, 32)])
@pytest.mark.parametrize("dv", [36, 35])
def test_every_cut_gives_the_same(cut, dv):
    inputs, state = token(dk=21, dv=dv, batch=1)
    assert_equal_to_reference(inputs, state, cut=cut)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule):
    inputs, state = token(rule, dk=20, dv=12)
    assert_equal_to_reference(inputs, state)


@pytest.mark.parametrize("rule", ["delta", "gated-delta", "erase without write"])
def test_erase_as_its_strength_along_the_key(rule):
    inputs, state = token(rule, dk=20, dv=12, along_key=True)
    assert inputs["erase"].dim() == 2
    assert_equal_to_reference(inputs, state)


@pytest.mark.parametrize("rule, along_key", [("gated-delta", False), ("delta", True), ("sum", False)])
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("dk, dv", [(5, 3), (20, 12)])
def test_half_precision_rounds_only_the_output(rule, along_key, dtype, dk, dv):
    inputs, state = token(rule, dk=dk, dv=dv, dtype=dtype, along_key=along_key)
    assert_equal_to_reference(inputs, state)


@pytest.mark.parametrize("order, seed", [(0, 0), (1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("dk, dv", [(33, 17), (40, 36)])
def test_order_of_threads_does_not_matter(order, seed, dk, dv):
    inputs, state = token(dk=dk, dv=dv)
    first = run(inputs, state, check=False)
    assert_equal_to_reference(inputs, state, check=False, order=order, seed=seed)
    again = run(inputs, state, check=False, order=order, seed=seed)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("dk, dv", [(33, 17), (40, 36)])
def test_in_place(dk, dv):
    inputs, state = token(dk=dk, dv=dv)
    expected, expected_state = run(inputs, state.clone())[:2]
    out, new, _ = run(inputs, state, in_place=True)
    assert new is state
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


@pytest.mark.parametrize("rows, parent", [(3, [2, 0, 0]), (2, [1, 1, 0]), (5, [4, 3, 4])])
def test_parent_reads_other_rows(rows, parent):
    inputs, state = token(dk=20, dv=12, batch=3, rows=rows)
    kept, parent = state.clone(), torch.tensor(parent)
    assert_equal_to_reference(inputs, state, parent)
    assert torch.equal(state, kept)


@pytest.mark.parametrize("parent", [[0, 2], [-1, 0]])
def test_parent_beyond_the_state_stops_the_launch(parent):
    inputs, state = token()
    with pytest.raises(cuda_executor.KernelFault, match="trap"):
        run(inputs, state, torch.tensor(parent))


@pytest.mark.parametrize("dk, dv", [(5, 3), (20, 12)])
def test_strides(dk, dv):
    """Operands as slices of longer rows, heads inside of sentences or around them."""
    inputs, state = token(dk=dk, dv=dv, batch=3)

    def spread(x):
        if x is None:
            return None
        wide = torch.full((x.shape[1], x.shape[0], 2, *x.shape[2:]), float("nan"), dtype=x.dtype)
        wide = wide.transpose(0, 1)[:, :, 1]
        wide.copy_(x)
        return wide

    strided = {name: spread(x) for name, x in inputs.items()}
    assert torch.equal(run(strided, state)[0], run(inputs, state)[0])


def test_rows_that_do_not_start_at_four_numbers():
    """dv is a multiple of four, addresses are not: such rows go one number at a time."""
    inputs, state = token(dk=6, dv=8)
    buffer = torch.zeros(state.numel() + 1)
    moved = buffer[1:].view(state.shape).copy_(state)
    assert_equal_to_reference(inputs, moved)


def test_padding_changes_nothing():
    """k = erase = 0, write = 0 and no decay is the identity, exactly."""
    inputs, state = token(dk=20, dv=12)
    for name in ("k", "write", "erase", "log_decay"):
        inputs[name].zero_()
    assert torch.equal(run(inputs, state)[1], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dk, dv", [(64, 64), (5, 3)])
def test_traffic(dk, dv, dtype):
    """The state goes over the bus once in and once out; a block does not read a number twice."""
    inputs, state = token(dk=dk, dv=dv, dtype=dtype, batch=1)
    traffic = assert_equal_to_reference(inputs, state)
    operands_bytes = sum(x.numel() * x.element_size() for x in inputs.values() if x is not None)
    least = 2 * 4 * state.numel() + operands_bytes + inputs["v"].numel() * inputs["v"].element_size()
    assert traffic.read_per_block + traffic.written_per_block <= 1.1 * least
    assert traffic.barriers == 2 * ceil_div(dv, 32)
    of_argument = {n: buffer for buffer in traffic.buffers for n in buffer.arguments}
    assert of_argument[STATE].read_bytes == of_argument[OUT_STATE].written_bytes == 4 * state.numel()
    assert of_argument[STATE].written_bytes == of_argument[OUT_STATE].read_bytes == 0


@pytest.mark.parametrize("aligned", [False, True])
def test_cut(aligned):
    """Whatever the sizes, a block is one that ``step.cu`` takes, and its part of the state fits into registers."""
    for dk in (1, 5, 64, 384, 1536, 4096, 8192):
        for dv in (1, 3, 8, 64, 100, 512):
            columns, threads = step_cut(dk, dv, aligned)
            width = 4 if aligned and dv % 4 == 0 and columns % 4 == 0 else 1
            assert columns == power_of_two(columns) and columns // width <= 32
            assert threads % 32 == 0 and threads <= MOST_THREADS
            assert ceil_div(dk, threads // (columns // width)) * (width + 1) <= MOST_HELD[width]


def test_erase_keys_equal_strength_times_key():
    inputs, state = token(dk=20, dv=12, along_key=True)
    out, new, _ = run(inputs, state)
    full = written_out({**inputs, "erase": inputs["erase"][:, :, None], "k": inputs["k"][:, :, None]})
    out_full, new_full, _ = run({**inputs, "erase": full["erase"][:, :, 0].contiguous()}, state)
    assert relative_error(out, out_full) <= 1e-6 and relative_error(new, new_full) <= 1e-6


def test_public_function_takes_the_kernel(cupy):
    """Half-precision gates, a state of other strides, an out_state that overlaps the state: as in PyTorch."""
    inputs, state = token("delta", dk=20, dv=12, batch=3, rows=4)
    inputs = {n: None if x is None else x.half() for n, x in inputs.items()}
    parent = torch.tensor([2, 9, 1, 9, 1])[::2]  # with gaps, and reading a row that was written before
    expected, expected_state = expected_step(inputs, state, parent)
    for given, target in [(state, None), (state.mT.contiguous().mT, None), (state.clone(), "overlaps")]:
        target = given[1:] if target else None
        out, new = fast_weight_step(**inputs, state=given, parent=parent, out_state=target)
        assert out.dtype == torch.float16
        assert relative_error(out, expected) <= 1e-3 and relative_error(new, expected_state) <= 1e-5
        assert target is None or new is target
    assert [name for name, _, _ in cupy.launches] == ["step"] * 3


def test_float64_runs_in_pytorch(cupy):
    inputs, state = token(dtype=torch.float64)
    inputs = {n: None if x is None else x.double() for n, x in inputs.items()}
    fast_weight_step(**inputs, state=state.double())
    assert not cupy.launches


def test_erase_keys_and_strengths_in_float32_beside_half_precision(cupy):
    for along_key in (False, True):
        inputs, state = token("delta", dk=20, dv=12, dtype=torch.float16, along_key=along_key)
        inputs["erase"] = inputs["erase"].float() * 1.0001
        expected, expected_state = expected_step(inputs, state)
        _, new = fast_weight_step(**inputs, state=state)
        assert relative_error(new, expected_state) <= 1e-6
    assert ["-DNUMBER=0" in o for _, o, _ in cupy.launches] == [True, False]


def test_parent_on_another_device_is_refused(cupy):
    inputs, state = token()
    with pytest.raises(ValueError, match="parent is on meta but k is on cpu"):
        fast_weight_step(**inputs, state=state, parent=torch.zeros(2, dtype=torch.int64, device="meta"))


def test_no_values(cupy):
    inputs, state = token()
    inputs["v"] = inputs["v"][..., :0]
    out, new = fast_weight_step(**inputs, state=state[..., :0])
    assert out.shape[-1] == new.shape[-1] == 0 and not cupy.launches
