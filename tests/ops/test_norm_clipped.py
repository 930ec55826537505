"""The norm-clipped rule's kernel against an independent loop in float64."""

import platform

import pytest
import torch

from fairseq_fastweights.errors import FastWeightError
from fairseq_fastweights.ops.norm_clipped import NormClippedWrite, norm_clipped_reference, norm_clipped_write


def by_hand(k, v, beta):
    """One head as the authors' code has it: what the key held is taken out, a mixture put in, the norm brought to 1."""
    memory = v[0][:, None] * (k[0] * beta[0])[None]  # (dv, dk)
    for key, value, b in zip(k[1:], v[1:], beta[1:]):
        old = memory @ key
        memory = memory - torch.outer(old, key)
        memory = memory + torch.outer(b * value + (1 - b) * old, key)
        memory = memory / (torch.relu(memory.norm() - 1) + 1)
    return memory.T


def operands(tokens, dk=6, dv=5, dtype=torch.float64, size=0.5):
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(2, 2, tokens, dk, dtype=torch.float64, generator=generator) * size
    v = torch.randn(2, 2, tokens, dv, dtype=torch.float64, generator=generator)
    beta = torch.rand(2, 2, tokens, dtype=torch.float64, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (k, v, beta)]


def result_and_gradients(write, inputs):
    state = write(*inputs)
    weights = torch.randn(state.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [state, *torch.autograd.grad((state * weights).sum(), inputs)]


def each_head(k, v, beta):
    heads = [by_hand(*head) for head in zip(k.flatten(0, 1), v.flatten(0, 1), beta.flatten(0, 1))]
    return torch.stack(heads).unflatten(0, k.shape[:2])


@pytest.mark.parametrize("write", [norm_clipped_write, norm_clipped_reference])
@pytest.mark.parametrize("tokens", [1, 2, 4, 10, 33])
def test_it_equals_the_loop(write, tokens):
    found, wanted = (result_and_gradients(f, operands(tokens)) for f in (write, each_head))
    for x, y in zip(found, wanted):
        assert torch.allclose(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [0.02, 0.2])  # never scaled; scaled almost always
def test_float32_stays_near_float64_over_many_tokens(size):
    found = result_and_gradients(norm_clipped_write, operands(400, 32, 20, torch.float32, size))
    wanted = result_and_gradients(norm_clipped_reference, operands(400, 32, 20, size=size))
    for x, y in zip(found, wanted):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


def test_the_kernel_is_what_runs_here():
    assert norm_clipped_write(*operands(3)).grad_fn.name() == NormClippedWrite.__name__ + "Backward"


def test_noncontiguous_operands_and_gradient():
    k, v, beta = (x.detach() for x in operands(7))
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (k, v, beta)]
    together = [x.clone().requires_grad_() for x in (k, v, beta)]
    found, wanted = (
        torch.autograd.grad(norm_clipped_write(*x).transpose(-1, -2).pow(2).sum(), x)
        for x in (apart, together)
    )
    for x, y in zip(found, wanted):
        assert torch.equal(x, y)


def test_gradcheck():
    assert torch.autograd.gradcheck(norm_clipped_write, operands(9))


def test_no_token_leaves_zeros():
    state = norm_clipped_write(*operands(0))
    assert state.shape == (2, 2, 6, 5) and not state.any()


def test_half_precision_is_summed_in_float32():
    k, v, beta = (x.detach().bfloat16() for x in operands(12))
    state = norm_clipped_write(k, v, beta)
    assert state.dtype == torch.float32
    wanted = norm_clipped_reference(k.double(), v.double(), beta.double())
    assert (state - wanted).abs().max() < 1e-6


def test_subnormal_numbers_are_flushed_in_the_kernel_alone():
    torch.set_flush_denormal(False)  # as an earlier test may have left it
    k, v, beta = (torch.full(shape, 1e-20) for shape in ((1, 1, 1, 4), (1, 1, 1, 4), (1, 1, 1)))
    on_x86 = platform.machine() in ("x86_64", "AMD64")  # elsewhere nothing is flushed
    assert bool(norm_clipped_write(k, v, torch.ones_like(beta)).any()) != on_x86  # 1e-40
    assert (k * v).all()


def test_what_is_refused():
    k, v, beta = operands(3)
    with pytest.raises(FastWeightError, match=r"beta must have shape \(2, 2, 3\), got \(1, 2, 3\)"):
        norm_clipped_write(k, v, beta[:1])
    with pytest.raises(FastWeightError, match="no second derivative"):
        torch.autograd.grad(norm_clipped_write(k, v, beta).sum(), k, create_graph=True)
