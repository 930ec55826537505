"""Which fast path a call takes. That each is right is tested where it is compared with the reference."""

import pytest
import torch
from attention_cases import Case, attend, buffer_of, build_attention, sentences

from fairseq_fastweights.ops import lazy_state, numba_scan


@pytest.fixture
def kernels(monkeypatch):
    """The names of the CPU kernels that were run, in order."""
    names = []
    run = numba_scan.run

    def recorded(name, *args):
        names.append(name)
        return run(name, *args)

    for module in (numba_scan, lazy_state):
        monkeypatch.setattr(module, "run", recorded)
    return names


DELTA = Case("delta", "elu", False)


def test_training_runs_map_and_scan_as_kernels(kernels):
    attention = build_attention(DELTA, "causal")
    attend(attention, sentences(7, 2)).sum().backward()
    assert kernels == ["address_forward"] * 2 + ["forward", "backward"] + ["address_backward"] * 2


@pytest.mark.parametrize("site", ["bidirectional", "cross"])
def test_whole_sentences_are_written_by_the_scan(kernels, site):
    attention = build_attention(DELTA, site)
    source = sentences(5, 2, attention.kdim) if site == "cross" else None
    attend(attention, sentences(7, 2), source)
    assert sorted(kernels) == ["address_forward", "address_forward", "forward"]


@pytest.mark.parametrize("feature_map", ["favor", "tanh", "softmax"])
def test_maps_without_a_kernel_run_in_torch(kernels, feature_map):
    attend(build_attention(Case("delta", feature_map, False), "causal"), sentences(7, 2))
    assert kernels == ["forward"]


def test_single_tokens_are_decoded_from_pairs(kernels):
    attention, state = build_attention(DELTA, "causal"), {}
    with torch.no_grad():
        for _ in range(3):
            attend(attention, sentences(1, 2), incremental_state=state)
    assert kernels == ["address_forward", "address_forward", "decode"] * 3
    assert buffer_of(attention, state)["kept"].count == 3


def test_a_prompt_is_scanned_and_then_decoded(kernels):
    attention, state = build_attention(DELTA, "causal"), {}
    with torch.no_grad():
        attend(attention, sentences(4, 2), incremental_state=state)
        attend(attention, sentences(1, 2), incremental_state=state)
    assert [name for name in kernels if name != "address_forward"] == ["forward", "decode"]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_other_backends_run_no_kernel(kernels, backend):
    attention, state = build_attention(DELTA, "causal", backend=backend), {}
    attend(attention, sentences(7, 2)).sum().backward()
    with torch.no_grad():
        attend(attention, sentences(1, 2), incremental_state=state)
    assert kernels == [] and "state" in buffer_of(attention, state)


def test_without_numba_auto_runs_in_torch(kernels, monkeypatch):
    monkeypatch.setattr(numba_scan, "refusal", lambda: "not installed")
    attend(build_attention(DELTA, "causal"), sentences(7, 2)).sum().backward()
    assert kernels == []


def test_decoding_with_gradients_keeps_the_graph(kernels):
    attention, state = build_attention(DELTA, "causal"), {}
    attend(attention, sentences(2, 2), incremental_state=state)
    attend(attention, sentences(1, 2), incremental_state=state).sum().backward()
    assert "decode" not in kernels and attention.k_proj.weight.grad.abs().sum() > 0


def names(cupy):
    return [name for name, _, _ in cupy.launches]


def sentences32(*shape):
    return sentences(*shape).float()


@pytest.mark.parametrize("site", ["causal", "bidirectional", "cross"])
@pytest.mark.parametrize("feature_map", ["elu", "dpfp", "favor"])
def test_cuda_kernels_map_and_scan(cupy, site, feature_map):
    attention = build_attention(Case("delta", feature_map, False), site).float()
    source = sentences32(5, 2, attention.kdim) if site == "cross" else None
    attend(attention, sentences32(7, 2), source).sum().backward()
    assert sorted(names(cupy)[:3]) == ["address_forward", "address_forward", "scan_forward"]
    assert sorted(names(cupy)[3:]) == ["address_backward", "address_backward", "scan_backward"]


def test_cuda_kernels_decode_and_reorder(cupy):
    """One step kernel a token, which takes the reorder along."""
    attention, state = build_attention(DELTA, "causal").float(), {}
    order = torch.tensor([1, 1])
    with torch.no_grad():
        attend(attention, sentences32(3, 2), incremental_state=state)
        for _ in range(3):
            attention.reorder_incremental_state(state, order)
            attend(attention, sentences32(1, 2), incremental_state=state)
    assert names(cupy)[:3] == ["address_forward", "address_forward", "scan_forward"]
    assert names(cupy)[3:] == ["address_forward", "address_forward", "step"] * 3


def test_cuda_backend_runs_float64_in_torch(cupy):
    attention, state = build_attention(DELTA, "causal", backend="cuda"), {}
    with torch.no_grad():
        attend(attention, sentences(1, 2), incremental_state=state)
        attend(attention, sentences(1, 2), incremental_state=state)
    assert not cupy.launches
