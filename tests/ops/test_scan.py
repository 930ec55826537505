"""Every backend against the recurrence in float64: outputs, final state and the gradient of every input."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, FAST, INPUTS, RULES, operands, relative_error, require_grad, written_out

from fairseq_fastweights.ops import delta_rule, dispatch, fast_weight_scan, numba_scan, sum_rule

CHUNK = 8
WITH_ERASE = [rule for rule in RULES if "erase" in RULES[rule]]


def loss_of(out, state, seed=1):
    """A fixed random linear function of everything returned."""
    g = torch.Generator().manual_seed(seed)
    loss = 0.0
    for x in (out, state):
        if x is not None:
            weight = torch.randn(x.shape, generator=g, dtype=torch.float64)
            loss = loss + (x.double() * weight).sum()
    return loss


def run(inputs, **options):
    """(out, state, gradients by name) of one scan; the reference gets erase keys in full."""
    inputs = require_grad(inputs)
    operands = written_out(inputs) if options["backend"] == "reference" else inputs
    out, state = fast_weight_scan(**operands, **options)
    given = {n: x for n, x in inputs.items() if x is not None}
    loss = loss_of(out, state)
    if not torch.is_tensor(loss) or not loss.requires_grad:
        return out, state, {n: torch.zeros_like(x) for n, x in given.items()}
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    return (
        out,
        state,
        {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(given.items(), grads)},
    )


def assert_equals_reference(inputs, tolerance, **options):
    exact = {n: None if x is None else x.double() for n, x in inputs.items()}
    need_state = options.get("return_state", True)
    out, state, grads = run(inputs, **options)
    expected, expected_state, expected_grads = run(exact, backend="reference", return_state=need_state)
    if expected is None:
        assert out is None
    else:
        assert out.dtype == inputs["v"].dtype
        assert relative_error(out, expected) <= tolerance
    assert (state is None) == (not need_state)
    if need_state:
        assert relative_error(state, expected_state) <= tolerance
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        assert grads[name].dtype == inputs[name].dtype
        assert relative_error(grads[name], expected_grad) <= tolerance, f"gradient of {name}"


shapes = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(sorted(RULES)),
        "batch": st.sampled_from([1, 2]),
        "heads": st.sampled_from([1, 3]),
        "tokens": st.sampled_from([0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 2]),
        "dk": st.sampled_from([1, 3, 8, 17]),
        "dv": st.sampled_from([1, 4, 7, 16]),
        "state": st.booleans(),
        "along_key": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=150, deadline=None)
@given(shape=shapes, return_state=st.booleans())
def test_equals_reference_for_all_shapes(backend, shape, return_state):
    inputs = operands(**shape)
    assert_equals_reference(inputs, 1e-10, backend=backend, chunk_size=CHUNK, return_state=return_state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("backend", ALL)
def test_lower_precisions(rule, dtype, tolerance, backend):
    """The float64 reference sees the rounded inputs: what is left is the error of the sums and of the output."""
    inputs = operands(rule, tokens=150, dk=16, dv=8, state=True, dtype=dtype)
    assert_equals_reference(inputs, tolerance, backend=backend)


@pytest.mark.parametrize("tokens", [1, 40, 200])
@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_float32_gates_beside_half_precision(tokens, along_key, backend):
    inputs = operands("gated-delta", tokens=tokens, dk=16, dtype=torch.bfloat16, along_key=along_key)
    for name in ("write", "erase", "log_decay"):
        inputs[name] = inputs[name].float()
    assert_equals_reference(inputs, 2e-2, backend=backend)


@pytest.mark.parametrize("rule", WITH_ERASE)
@pytest.mark.parametrize("tokens", [1, CHUNK, 3 * CHUNK + 1])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_erase_as_its_strength_along_the_key(rule, tokens, state, backend):
    """Outputs, state and every gradient are those of the erase keys erase_t k_t written out."""
    inputs = operands(rule, tokens=tokens, state=state, along_key=True)
    assert inputs["erase"].dim() == 3
    assert_equals_reference(inputs, 1e-10, backend=backend, chunk_size=CHUNK)


def test_reference_takes_erase_as_its_strength():
    inputs = operands("gated-delta", state=True, along_key=True)
    out, state = fast_weight_scan(**inputs, backend="reference")
    expected, expected_state = fast_weight_scan(**written_out(inputs), backend="reference")
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 33, 64, 100])
@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_any_chunk_size(chunk_size, along_key, backend):
    inputs = operands("gated-delta", tokens=100, state=True, along_key=along_key)
    assert_equals_reference(inputs, 1e-10, backend=backend, chunk_size=chunk_size)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("tokens", [3, 5])
@pytest.mark.parametrize("state", [False, True])
def test_gradcheck(rule, backend, tokens, state):
    check_gradients(operands(rule, batch=1, tokens=tokens, dk=3, dv=2, state=state), backend)


@pytest.mark.parametrize("rule", WITH_ERASE)
@pytest.mark.parametrize("backend", ALL)
def test_gradcheck_of_erase_as_its_strength(rule, backend):
    check_gradients(operands(rule, batch=1, tokens=5, dk=3, dv=2, state=True, along_key=True), backend)


def check_gradients(inputs, backend):
    inputs = require_grad(inputs)
    names = [n for n in INPUTS if inputs[n] is not None]

    def scan(*tensors):
        return fast_weight_scan(**dict(zip(names, tensors)), backend=backend, chunk_size=3)

    assert torch.autograd.gradcheck(scan, [inputs[n] for n in names])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 20, 29, 30])
@pytest.mark.parametrize("backend", FAST)
def test_split_anywhere_equals_one_scan(rule, cut, backend):
    """Outputs, final state and gradients, the gradient flowing through the carried state."""
    whole = require_grad(operands(rule, tokens=30, state=True))
    out, state = fast_weight_scan(**whole, chunk_size=CHUNK, backend="reference")
    given = [x for x in whole.values() if x is not None]
    expected = torch.autograd.grad(loss_of(out, state), given)

    def part(span, carried):
        cuts = {n: x if x is None else x[:, :, span] for n, x in whole.items() if n != "state"}
        return fast_weight_scan(**cuts, state=carried, chunk_size=CHUNK, backend=backend)

    first, carried = part(slice(0, cut), whole["state"])
    second, last = part(slice(cut, 30), carried)
    joined = torch.cat([first, second], dim=2)
    torch.testing.assert_close(joined, out, atol=1e-11, rtol=0)
    torch.testing.assert_close(last, state, atol=1e-11, rtol=0)
    for got, wanted in zip(torch.autograd.grad(loss_of(joined, last), given), expected):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [5, CHUNK, 3 * CHUNK + 1])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_no_memory_is_read_before_it_is_written(rule, tokens, state, backend, poisoned_memory):
    inputs = operands(rule, tokens=tokens, state=state)
    out, end, grads = run(inputs, backend=backend, chunk_size=CHUNK)
    assert out.isfinite().all() and end.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("backend, threads", [("chunked", 1), ("numba", 1), ("numba", 2)])
def test_same_bits_twice(backend, threads):
    """And with any number of threads; the products of torch behind "chunked" do not promise that."""
    inputs = operands("gated-delta", tokens=200, dk=16, dv=16, dtype=torch.float32, state=True)
    first = run(inputs, backend=backend)
    torch.set_num_threads(threads)
    second = run(inputs, backend=backend)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][n], second[2][n]) for n in first[2])


@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_inputs_and_state_are_not_modified(along_key, backend):
    inputs = operands("gated-delta", tokens=30, state=True, along_key=along_key)
    before = {n: x.clone() for n, x in inputs.items()}
    run(inputs, chunk_size=CHUNK, backend=backend)
    assert all(torch.equal(inputs[n], before[n]) for n in before)
    empty = {n: x if n == "state" else x[:, :, :0] for n, x in inputs.items()}
    _, state = fast_weight_scan(**empty, backend=backend)
    assert torch.equal(state, before["state"])
    if backend == "reference":
        return  # it returns the state itself
    state.zero_()
    assert torch.equal(inputs["state"], before["state"])


@pytest.mark.parametrize("backend", FAST)
def test_one_chunk_without_state_never_builds_one(backend):
    """dk is so large that a (dk, dv) matrix would show: no tensor of that size is made, forward or backward."""
    inputs = require_grad(operands("delta", batch=1, heads=1, tokens=6, dk=500, dv=400))
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (list, tuple)) else [result]:
                if torch.is_tensor(x):
                    sizes.append(x.numel())
            return result

    with Sizes():
        out, state = fast_weight_scan(**inputs, return_state=False, backend=backend)
        out.sum().backward()
    assert state is None
    assert max(sizes) < 500 * 400


@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_write_without_reading(along_key, backend):
    inputs = {**operands("gated-delta", tokens=20, state=True, along_key=along_key), "q": None}
    out, state, grads = run(inputs, backend=backend, chunk_size=CHUNK)
    _, expected_state, expected = run(inputs, backend="reference")
    assert out is None
    torch.testing.assert_close(state, expected_state, atol=1e-11, rtol=0)
    torch.testing.assert_close(grads, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", FAST)
def test_state_without_gradient_of_the_output(rule, backend):
    """Only the final state is used: the output's gradient is absent, not zeros."""
    assert_equal_gradients(rule, backend, lambda out, state: state.square().sum())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", FAST)
def test_output_without_gradient_of_the_state(rule, backend):
    assert_equal_gradients(rule, backend, lambda out, state: out.square().sum())


def assert_equal_gradients(rule, backend, loss):
    inputs = require_grad(operands(rule, tokens=20, state=True))
    given = [x for x in inputs.values() if x is not None]
    got, expected = (
        torch.autograd.grad(
            loss(*fast_weight_scan(**inputs, backend=name, chunk_size=CHUNK)), given, materialize_grads=True
        )
        for name in (backend, "reference")
    )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", FAST)
def test_strong_decay_is_exact(backend):
    """A product of decays far below the smallest float: differences of logs stay finite."""
    inputs = operands("gated-delta", tokens=40, state=True)
    inputs["log_decay"] = inputs["log_decay"] * 400
    assert_equals_reference(inputs, 1e-10, backend=backend, chunk_size=16)


@pytest.mark.parametrize("log_decay, tolerance", [(-100.0, 3e-5), (-1000.0, 3e-4)])
@pytest.mark.parametrize("backend", FAST)
def test_tokens_that_forget_everything(backend, log_decay, tolerance):
    """In float32 the sums of logs round what follows in the chunk: by as much as the docstring says."""
    inputs = operands("gated-delta", tokens=64, dk=16, dv=16, dtype=torch.float32)
    inputs["log_decay"][:, :, (5, 20)] = log_decay
    assert_equals_reference(inputs, tolerance, backend=backend, chunk_size=32)


@pytest.mark.parametrize("backend", ALL)
def test_padding_steps_are_identity_steps(backend):
    """k = e = 0, log_decay = 0 in between changes no other output and not the state."""
    inputs = operands("gated-delta", tokens=12, state=True)
    gap = {}
    for n, x in inputs.items():
        zeros = None if n == "state" else torch.zeros_like(x[:, :, :5])
        gap[n] = x if n == "state" else torch.cat([x[:, :, :4], zeros, x[:, :, 4:]], dim=2)
    gap["v"][:, :, 4:9] = 7.0  # a padding token may carry any value
    out, state = fast_weight_scan(**inputs, backend="reference")
    padded, padded_state = fast_weight_scan(**gap, chunk_size=CHUNK, backend=backend)
    torch.testing.assert_close(
        torch.cat([padded[:, :, :4], padded[:, :, 9:]], dim=2), out, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(padded_state, state, atol=1e-12, rtol=0)


@functools.lru_cache(None)
def long_scan(rule):
    """Operands of 100000 tokens and what the reference makes of them: it takes seconds."""
    inputs = operands(rule, batch=1, heads=1, tokens=100_000, dk=8, dv=8, dtype=torch.float32)
    exact = {n: None if x is None else x.double() for n, x in inputs.items()}
    with torch.no_grad():
        return inputs, fast_weight_scan(**exact, backend="reference")


@pytest.mark.parametrize("rule", ["delta", "gated-delta", "gated-sum"])
@pytest.mark.parametrize("backend", FAST)
def test_100000_tokens_in_float32_do_not_drift(rule, backend):
    """The error after 1e5 tokens is that after 1e3: rounding is not accumulated."""
    inputs, (exact, exact_state) = long_scan(rule)
    with torch.no_grad():
        out, state = fast_weight_scan(**inputs, backend=backend)
    assert relative_error(out[:, :, -1000:], exact[:, :, -1000:]) < 1e-5
    assert relative_error(state, exact_state) < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_100000_tokens_of_the_sum_rule(backend):
    """The sum grows without bound, so its rounding is measured against its size."""
    inputs = operands("sum", batch=1, heads=1, tokens=100_000, dk=8, dv=8, dtype=torch.float32)
    inputs["k"], inputs["v"] = inputs["k"].abs(), inputs["v"].abs()
    with torch.no_grad():
        out, state = fast_weight_scan(**inputs, backend=backend)
    exact = inputs["k"].double().transpose(-1, -2) @ inputs["v"].double()
    assert relative_error(state, exact) < 1e-5
    last = (inputs["q"][:, :, -1:].double() @ exact)[0, 0, 0]
    assert relative_error(out[0, 0, -1], last) < 1e-5


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("along_key", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_repeated_keys(one_hot, along_key, backend):
    """One key overwritten many times, beta near 1: where an inverse by repeated squaring explodes."""
    tokens, dk = 64, 8
    inputs = operands("delta", batch=1, heads=1, tokens=tokens, dk=dk, dtype=torch.float32)
    key = torch.eye(dk)[0] if one_hot else torch.full((dk,), dk**-0.5)
    inputs["k"] = key.expand(1, 1, tokens, dk).clone()
    inputs["write"] = torch.full((1, 1, tokens), 0.999)
    inputs["erase"] = inputs["write"] if along_key else inputs["write"][..., None] * inputs["k"]
    assert_equals_reference(inputs, 1e-5, backend=backend)


@pytest.mark.parametrize("rule", ["delta", "gated-delta"])
@pytest.mark.parametrize("backend", FAST)
def test_backward_runs_outside_autocast_precision(rule, backend):
    """Under the caller's autocast the sums stay in float32."""
    inputs = operands(rule, tokens=100, dk=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_reference(inputs, 1e-5, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_second_derivative_is_refused_with_a_way_out(backend):
    inputs = require_grad(operands("delta"))
    out, _ = fast_weight_scan(**inputs, backend=backend)
    with pytest.raises(ValueError, match="no second derivative.*backend='reference'"):
        torch.autograd.grad(out.sum(), inputs["k"], create_graph=True)
    out, _ = fast_weight_scan(**inputs, backend="reference")
    (first,) = torch.autograd.grad(out.sum(), inputs["k"], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), inputs["v"])
    assert second.abs().sum() > 0


def test_thin_wrappers():
    x = operands("delta", tokens=20, state=True)
    for options in (
        {},
        {"return_state": False},
        {"backend": "reference"},
        {"chunk_size": 4, "backend": "chunked"},
    ):
        out, state = sum_rule(x["q"], x["k"], x["v"], x["state"], **options)
        expected, expected_state = fast_weight_scan(x["q"], x["k"], x["v"], state=x["state"], **options)
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)
        assert state is expected_state is None or torch.equal(state, expected_state)
        out, state = delta_rule(x["q"], x["k"], x["v"], x["write"], x["state"], **options)
        erase = x["write"][..., None] * x["k"]
        expected, _ = fast_weight_scan(
            x["q"], x["k"], x["v"], write=x["write"], erase=erase, state=x["state"], **options
        )
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("reason, taken", [(None, "numba"), ("numba is not installed", "chunked")])
def test_auto_takes_numba_where_it_runs(monkeypatch, reason, taken):
    monkeypatch.setattr(numba_scan, "refusal", lambda: reason)
    ran = []
    for name in dispatch.SCANS:
        monkeypatch.setitem(
            dispatch.SCANS, name, lambda *operands, name=name: ran.append(name) or (None, None)
        )
    fast_weight_scan(**operands())
    assert ran == [taken]


def test_auto_never_takes_numba_beside_other_devices(monkeypatch):
    monkeypatch.setattr(numba_scan, "refusal", lambda: None)
    for device in ("cuda", "meta"):
        assert dispatch.choose("auto", torch.device(device)) is dispatch.SCANS["chunked"]
        with pytest.raises(
            ValueError, match=f"the tensors are on {device}, and these kernels run on the CPU"
        ):
            dispatch.choose("numba", torch.device(device))
