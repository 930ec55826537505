"""Numbers that sum up a head: of its weights, and of its state."""

from typing import Dict, List, Optional

import torch
from torch import Tensor

from ..modules.stats import effective_rank, ratio
from .record import Recording

EXACT = 1e-6  # of the largest number read; what is left in float64 is rounding


def mean_distance(weights: Tensor) -> Tensor:
    """Tokens between reader and what it reads: |t - s| weighted by |weights| (..., T, S), then the mean over t.

    A token that reads nothing does not count.
    """
    size = weights.abs()
    reader, written = torch.arange(size.shape[-2]), torch.arange(size.shape[-1])
    distance = (reader[:, None] - written).abs()
    of_reader = ratio((size * distance).sum(-1), size.sum(-1))
    reads = (size.sum(-1) > 0).to(size.dtype)
    return ratio((of_reader * reads).sum(-1), reads.sum(-1))


def negative_share(weights: Tensor) -> Tensor:
    """The share of negative weights (..., T, S) in the sum of all sizes."""
    return ratio(weights.clamp_max(0).abs().sum((-2, -1)), weights.abs().sum((-2, -1)))


def summary(recording: Recording, heads: List[int]) -> List[Dict[str, object]]:
    """What the table shows of each of ``heads`` of a recorded sentence (B = 1): numbers, and None for what has none.

    Between target and source there is no distance, so ``mean_distance`` is None for cross-attention.
    """
    distance = None if recording.site == "cross" else mean_distance(recording.weights)
    measures = {
        "mean_write": _mean(recording.write_strength),
        "mean_erased_share": _mean(recording.erased_share),
        "mean_decay": _mean(recording.decay),
        "effective_rank": effective_rank(recording.final_singular_values),
        "mean_distance": distance,
        "negative_share": negative_share(recording.weights),
    }
    return [
        {
            "head": head,
            "right_to_left": recording.right_to_left(head),
            **{name: None if x is None else float(x[0, head]) for name, x in measures.items()},
        }
        for head in heads
    ]


def _mean(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.mean(-1)


def check_exact(recording: Recording) -> float:
    """How far weights times values are from the module's own read; more than rounding is a bug here."""
    error = recording.error()
    if not error <= EXACT:
        raise RuntimeError(
            f"{recording.name}: the weights miss what the module read by {error:.1e} of its size"
        )
    return error
