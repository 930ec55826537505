"""The CUDA scan, launched by ops/cuda_scan.py and run on the CPU, against the recurrence in float64.

All in check mode: races, bounds, memory nobody wrote, misaligned vectors and wrong barriers raise KernelFault.
"""

import itertools

import cuda_executor
import pytest
import torch
from cuda_stand_in import LIMITS, stream_of
from operands import INPUTS, RULES, operands, relative_error
from test_scan import assert_equals_reference, run

from fairseq_fastweights.errors import FastWeightError
from fairseq_fastweights.ops import cuda, cuda_scan, fast_weight_scan

ORDERS = [(0, 0), (1, 0), (2, 1)]
WITH_ERASE = [rule for rule in RULES if "erase" in RULES[rule]]
# tokens, dk, dv: odd, less than a chunk, whole chunks, several tiles of keys, values over several blocks
SHAPES = [(5, 3, 5), (37, 20, 12), (32, 32, 16), (70, 72, 40), (40, 130, 68)]


@pytest.fixture(autouse=True)
def checked():
    with cuda_executor.running(check=True):
        yield


def names(cupy):
    return [name for name, _, _ in cupy.launches]


@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule(cupy, rule, state, along_key):
    x = operands(rule, tokens=37, dk=20, dv=12, state=state, along_key=along_key, dtype=torch.float32)
    with cuda_executor.running(order=2, seed=1):
        assert_equals_reference(x, 1e-5, backend="cuda", return_state=state)
    assert names(cupy) == ["scan_forward", "scan_backward"]


@pytest.mark.parametrize("order, seed", ORDERS)
@pytest.mark.parametrize("tokens, dk, dv", SHAPES)
@pytest.mark.parametrize("rule, along_key", [("sum", False), ("delta", True), ("gated-delta", False)])
def test_every_shape_in_every_order_of_threads(cupy, tokens, dk, dv, rule, along_key, order, seed):
    x = operands(rule, tokens=tokens, dk=dk, dv=dv, batch=1, along_key=along_key, dtype=torch.float32)
    with cuda_executor.running(order=order, seed=seed):
        assert_equals_reference(x, 1e-5, backend="cuda")


def test_same_bits_in_every_order(cupy):
    x = operands("gated-delta", tokens=40, dk=72, dv=40, state=True, dtype=torch.float32)
    results = []
    for order, seed in ORDERS:
        with cuda_executor.running(order=order, seed=seed):
            results.append(run(x, backend="cuda"))
    out, state, grads = results[0]
    for other, other_state, other_grads in results[1:]:
        assert torch.equal(out, other) and torch.equal(state, other_state)
        assert all(torch.equal(grads[n], other_grads[n]) for n in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule, along_key", [("sum", False), ("delta", True), ("gated-delta", False)])
@pytest.mark.parametrize("dk, dv", [(20, 12), (7, 5)])
def test_half_precision(cupy, dtype, rule, along_key, dk, dv):
    """The sums are float32, so the only errors are those of rounding what goes in and comes out."""
    x = operands(rule, tokens=37, dk=dk, dv=dv, state=True, along_key=along_key, dtype=dtype)
    assert_equals_reference(x, 1.1 * torch.finfo(dtype).eps, backend="cuda")


def test_float32_erase_keys_beside_half_precision(cupy):
    x = operands("delta", tokens=20, dk=8, dv=8, dtype=torch.float16)
    x["erase"] = x["erase"].float()
    assert_equals_reference(x, 1e-3, backend="cuda")


def test_operands_of_any_layout(cupy):
    """(T, B, H, d) as fairseq has it, gates expanded over the heads, and a state of other strides."""
    x = operands("gated-delta", tokens=21, dk=8, dv=12, state=True, along_key=True, dtype=torch.float32)
    for name in ("q", "k", "v"):
        x[name] = x[name].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    x["write"] = x["write"][:, :1].expand(-1, 2, -1)
    x["log_decay"] = x["log_decay"].transpose(0, 1).contiguous().transpose(0, 1)
    x["state"] = x["state"].mT.contiguous().mT
    assert_equals_reference(x, 1e-5, backend="cuda")
    out, _ = fast_weight_scan(**x, backend="cuda")
    assert out.stride() == x["v"].stride()


def test_rows_that_are_not_aligned(cupy):
    wide = operands("delta", tokens=18, dk=12, dv=12, batch=1, dtype=torch.float32)
    x = {n: y if y is None or y.dim() < 4 or n == "state" else y[..., 1:10] for n, y in wide.items()}
    assert_equals_reference(x, 1e-5, backend="cuda")
    assert all("-DALIGNED=0" in options for _, options, _ in cupy.launches)


@pytest.mark.parametrize("rule, along_key", [("sum", False), ("delta", True), ("gated-delta", False)])
def test_values_are_split_where_heads_leave_processors_idle(cupy, monkeypatch, rule, along_key):
    monkeypatch.setattr(cuda, "limits", lambda device: LIMITS._replace(multiprocessors=8))
    x = operands(rule, tokens=70, dk=8, dv=32, batch=1, state=True, along_key=along_key, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda")
    assert names(cupy) == ["scan_forward", "scan_backward", "scan_reduce"]
    assert cupy.launches[0][2] == (2, 2)


@pytest.mark.parametrize("rule, along_key", [("sum", False), ("delta", True), ("gated-delta", False)])
def test_a_state_too_large_for_shared_memory(cupy, monkeypatch, rule, along_key):
    monkeypatch.setattr(cuda, "limits", lambda device: LIMITS._replace(shared=40 * 1024))
    x = operands(rule, tokens=37, dk=384, dv=16, batch=1, heads=1, along_key=along_key, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda")
    assert all(
        "-DSTATE_IN_MEMORY=1" in options for name, options, _ in cupy.launches if name != "scan_reduce"
    )


def test_one_chunk_builds_no_state(cupy):
    x = operands("delta", tokens=16, dk=384, dv=64, along_key=True, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda", return_state=False)
    cut = cuda_scan.plan(4, 16, 384, 64, 1, False, False, 0, LIMITS)
    assert cut.splits == 1 and not cut.state_in_memory and cut.shared["scan_forward"] < 48 * 1024


@pytest.mark.parametrize("missing", INPUTS)
def test_gradients_that_nobody_wants(cupy, missing):
    x = operands("gated-delta", tokens=20, dk=8, dv=8, state=True, dtype=torch.float32)
    with_grad = {n: y.requires_grad_(n != missing) for n, y in x.items()}
    out, state = fast_weight_scan(**with_grad, backend="cuda")
    (out.sum() + state.sum()).backward()
    assert x[missing].grad is None
    assert all(y.grad is not None for n, y in x.items() if n != missing)


def test_only_the_state_or_only_the_output_is_used(cupy):
    for use in (0, 1):
        grads = {}
        for backend in ("cuda", "reference"):
            x = operands("gated-delta", tokens=20, dk=8, dv=8, state=True, dtype=torch.float32)
            if backend == "reference":
                x = {n: y.double() for n, y in x.items()}
            given = [y.requires_grad_() for y in x.values()]
            result = fast_weight_scan(**x, backend=backend)[use]
            grads[backend] = torch.autograd.grad(result.square().sum(), given, allow_unused=True)
        for ours, expected in zip(grads["cuda"], grads["reference"]):
            if ours is None or expected is None:  # nothing, or zeros
                assert all(x is None or not x.any() for x in (ours, expected))
                continue
            assert relative_error(ours, expected) <= 1e-5


def test_write_without_reading(cupy):
    x = {**operands("delta", tokens=37, dk=20, dv=12, along_key=True, dtype=torch.float32), "q": None}
    assert_equals_reference(x, 1e-5, backend="cuda")


def test_float64_and_empty_operands_run_in_pytorch(cupy):
    assert_equals_reference(operands("delta"), 1e-12, backend="cuda")
    assert_equals_reference(operands("delta", tokens=0, dtype=torch.float32), 1e-12, backend="cuda")
    assert not cupy.launches


def test_second_derivative_is_refused(cupy):
    x = operands("sum", tokens=5, dtype=torch.float32)
    q = x["q"].requires_grad_()
    out, _ = fast_weight_scan(**x, backend="cuda")
    with pytest.raises(FastWeightError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_launch_goes_to_the_device_and_stream_of_the_tensors(cupy, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: asked.append(d) or stream_of(d))
    device = torch.device("cuda:1")
    x = operands("sum", tokens=5, dtype=torch.float32)
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *arguments: launch(*arguments[:-1], device))
    fast_weight_scan(**x, backend="cuda")
    assert asked == [device] and cupy.devices == [1]


def test_too_little_shared_memory_is_one_clear_line():
    with pytest.raises(
        FastWeightError, match="bytes of shared memory a block for dk 64.*use backend='chunked'"
    ):
        cuda_scan.plan(8, 64, 64, 64, 1, False, True, 0, LIMITS._replace(shared=4096))


def test_values_stay_in_one_block_where_they_fit():
    """Each part of the values computes the chunk's products again: no part too many."""
    large = cuda.Limits(227 * 1024, 132)
    assert cuda_scan.plan(1, 64, 64, 64, 1, False, True, 0, large).splits == 1  # too short to fill a device
    assert cuda_scan.plan(200, 4096, 64, 64, 1, False, True, 0, large).splits == 1  # filled by the heads
    assert cuda_scan.plan(8, 4096, 64, 64, 1, False, True, 0, large).splits == 4


@pytest.mark.parametrize(
    "dk, dv", [(1, 1), (16, 16), (32, 16), (64, 64), (100, 36), (384, 64), (512, 512), (5000, 64)]
)
@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])
def test_every_plan_fits(dk, dv, shared):
    """The limits of compute capability 7.5 to 12.0."""
    for erase, decay, builds, tokens in [(0, False, False, 16), (1, False, True, 4096), (2, True, True, 100)]:
        cut = cuda_scan.plan(8, tokens, dk, dv, erase, decay, builds, 0, cuda.Limits(shared * 1024, 132))
        assert max(cut.shared.values()) <= shared * 1024
        assert cut.columns * cut.splits >= dv and cut.columns % 4 == 0 and cut.tile % 4 == 0
        assert cut.columns * (cut.splits - 1) < dv


@pytest.mark.parametrize("rule", ["sum", "gated-delta"])
def test_one_chunk_from_a_state_that_is_not_returned(cupy, rule):
    x = operands(rule, tokens=5, dk=8, dv=8, state=True, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda", return_state=False)


def test_half_precision_of_a_write_gate_alone(cupy):
    x = operands("gated-sum-peng", tokens=20, dk=8, dv=8, dtype=torch.float16)
    assert_equals_reference(x, 1.1 * torch.finfo(torch.float16).eps, backend="cuda")


def test_gradient_of_a_start_state_of_many_numbers(cupy):
    x = operands("sum", tokens=20, dk=72, dv=40, batch=1, heads=1, state=True, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda")


def shifted(x):
    """The same numbers, four bytes from where a float4 may start."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("moved", ["state", "q", "d_out", "d_state"])
def test_memory_that_does_not_start_at_four_numbers(cupy, moved):
    x = operands("delta", tokens=18, dk=8, dv=8, batch=1, state=True, along_key=True, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    x["d_out"], x["d_state"] = (
        torch.randn(x["v"].shape, generator=g),
        torch.randn(x["state"].shape, generator=g),
    )
    x[moved] = shifted(x[moved])
    results = []
    for dtype, backend in ((torch.float32, "cuda"), (torch.float64, "reference")):
        given = {n: y if y is None or y.dtype == dtype else y.to(dtype) for n, y in x.items()}
        gradients = given.pop("d_out"), given.pop("d_state")
        wanted = [y.detach().requires_grad_() for y in given.values() if y is not None]
        out, state = fast_weight_scan(
            **dict(zip([n for n in given if given[n] is not None], wanted)), backend=backend
        )
        results.append([out, state, *torch.autograd.grad((out, state), wanted, gradients)])
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(*results))


@pytest.mark.parametrize("rule, along_key", [("delta", True), ("gated-delta", False)])
def test_states_in_memory_of_many_blocks(cupy, monkeypatch, rule, along_key):
    monkeypatch.setattr(cuda, "limits", lambda device: LIMITS._replace(shared=24 * 1024))
    monkeypatch.setattr(cuda_scan, "WIDEST_VALUES", 8)
    cuda_scan.plan.cache_clear()
    x = operands(rule, tokens=20, dk=384, dv=12, batch=1, along_key=along_key, dtype=torch.float32)
    assert_equals_reference(x, 1e-5, backend="cuda")
    cuda_scan.plan.cache_clear()
    assert all("-DSTATE_IN_MEMORY=1" in o and "-DSPLITS=2" in o for _, o, _ in cupy.launches)


def test_aligned_rows_that_end_within_a_tile_and_a_block(cupy, monkeypatch):
    monkeypatch.setattr(cuda, "limits", lambda device: LIMITS._replace(multiprocessors=8))
    x = operands(
        "gated-delta", 1, 1, tokens=70, dk=68, dv=40, state=True, along_key=True, dtype=torch.float32
    )
    assert_equals_reference(x, 1e-5, backend="cuda", chunk_size=16)
    assert all("-DALIGNED=1" in options for _, options, _ in cupy.launches)


@pytest.mark.parametrize("shared", [48, 64, 99, 227])
@pytest.mark.parametrize("tokens", [16, 17, 32, 33])
@pytest.mark.parametrize("dk, dv", [(64, 64), (128, 68), (256, 256)])
def test_every_plan_holds_a_state_where_the_kernels_build_one(dk, dv, tokens, shared):
    for erase, decay, keeps in itertools.product((0, 1, 2), (False, True), (False, True)):
        cut = cuda_scan.plan(8, tokens, dk, dv, erase, decay, keeps, 0, cuda.Limits(shared * 1024, 132))
        states = int((keeps or tokens > cut.chunk) and not cut.state_in_memory)
        sizes = (cut.chunk, cut.tile, cut.columns, dk, erase, decay, states)
        assert cut.shared == cuda_scan.shared_bytes(*sizes)


def test_early_gradients_of_a_long_sum_keep_their_digits(cupy):
    """A sum grows with the text, so the small states of its beginning are kept and not found by subtraction."""
    g = torch.Generator().manual_seed(0)
    x = {n: torch.rand(1, 1, 6144, 4, generator=g) for n in ("q", "k", "v")}
    dq = {}
    with cuda_executor.running(check=False):
        for backend in ("cuda", "reference"):
            wide = {n: y.double() if backend == "reference" else y for n, y in x.items()}
            q = wide["q"].requires_grad_()
            out, _ = fast_weight_scan(**wide, return_state=False, backend=backend)
            (dq[backend],) = torch.autograd.grad(out.sum(), q)
    assert relative_error(dq["cuda"][:, :, :64], dq["reference"][:, :, :64]) <= 5e-7
