"""The adaptive softmax of the authors' language models, made of fairseq's: one embedding matrix and a bias a word.

It is that of Transformer-XL (Dai et al. 2019) with div_val 1: a word's score is e(word) . x + b(word) in its band, a
cluster's score w . x + b in the first band, and nothing projects a band, on the way in or out.
"""

from typing import Optional

import torch
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from fairseq.modules.adaptive_softmax import TiedHeadModule
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import FastWeightError


class WordScores(nn.Module):
    """(N, d) -> (N, words): the embeddings of a band, (words, d), times x, and a bias each, 0 at first."""

    def __init__(self, embeddings: nn.Parameter):
        super().__init__()
        self.weight = embeddings
        self.bias = nn.Parameter(embeddings.new_zeros(len(embeddings)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Head(nn.Module):
    """(N, d) -> (N, words + clusters): scores of the first band and of the others as wholes.

    Args:
        word_proj: of the first band.
        cluster_weights: (clusters, d).
    """

    def __init__(self, word_proj: WordScores, cluster_weights: nn.Parameter):
        super().__init__()
        self.word_proj = word_proj
        self.class_proj = WordScores(cluster_weights)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.word_proj(x), self.class_proj(x)], dim=-1)


def tie_with_biases(embeddings: nn.Module, softmax: Optional[AdaptiveSoftmax]) -> None:
    """Take the projections of the bands out of both, and tie them with a bias a word and cluster; in place.

    fairseq drops out what a projection gives as well; without one, dropout is that of the softmax's input alone.

    Raises:
        FastWeightError (a ValueError): they are not fairseq's tied adaptive ones, or bands differ in width.
    """
    if not isinstance(embeddings, AdaptiveInput) or not isinstance(
        getattr(softmax, "head", None), TiedHeadModule
    ):
        raise FastWeightError(
            "--biased-adaptive-softmax needs --adaptive-input, --adaptive-softmax-cutoff and --tie-adaptive-weights"
        )
    bands = [band[0].weight for band in embeddings.embeddings]
    widths = [band.shape[1] for band in bands]
    if set(widths) != {softmax.input_dim}:
        raise FastWeightError(
            "--biased-adaptive-softmax needs --adaptive-input-factor 1 and --adaptive-softmax-factor 1: "
            f"all bands as wide as the decoder's output, {softmax.input_dim}, got {widths}"
        )
    for band in embeddings.embeddings:
        band[1] = nn.Identity()
    softmax.head = Head(WordScores(bands[0]), softmax.head.class_proj.weight)
    softmax.tail = nn.ModuleList(WordScores(band) for band in bands[1:])
