"""The numbers of the table, on matrices whose numbers are known."""

import pytest
import torch
from attention_cases import Case, attend, build_attention, sentences

from fairseq_fastweights.inspection import recording
from fairseq_fastweights.inspection.measures import check_exact, effective_rank, mean_distance, negative_share


def test_effective_rank():
    spectra = torch.tensor([[3.0, 3, 3], [5, 0, 0], [2, 2, 0], [0, 0, 0], [0.5, 0.25, 0.25]]).double()
    expected = torch.tensor([3, 1, 2, 0, 2**1.5]).double()  # the last: an entropy of 1.5 bits
    assert torch.allclose(effective_rank(spectra), expected, atol=1e-12)
    assert torch.allclose(effective_rank(spectra * 1e-9), expected, atol=1e-12)


def test_mean_distance():
    weights = torch.tensor([[4.0, 0, 0, 4], [0, 0, 0, 0], [-1, 0, 1, 0], [3, 0, 0, -1]]).double()
    assert float(mean_distance(weights)) == pytest.approx((3 / 2 + 1 + 3 * 3 / 4) / 3)
    assert float(mean_distance(weights * 7)) == pytest.approx((3 / 2 + 1 + 3 * 3 / 4) / 3)
    assert float(mean_distance(torch.zeros(2, 2))) == 0


def test_negative_share():
    assert float(negative_share(torch.tensor([[1.0, -3], [0, 4]]))) == pytest.approx(3 / 8)
    assert float(negative_share(torch.ones(2, 2))) == float(negative_share(torch.zeros(2, 2))) == 0


def test_weights_that_miss_what_was_read_are_not_shown():
    attention = build_attention(Case("delta", "elu", False), "causal")
    with recording(attention) as recordings:
        attend(attention, sentences(4, 1))
    (found,) = recordings
    assert check_exact(found) < 1e-9
    found.read[0, 1, 2] *= 1 + 1e-3
    with pytest.raises(RuntimeError, match="miss"):
        check_exact(found)
