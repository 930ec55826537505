"""The state of decoding rows as matrices, for the CUDA kernel that reorders on the way. Inference only."""

from typing import Optional

import torch
from torch import Tensor

from .cuda_step import cuda_step


class DenseState:
    """State of B rows from ``state`` (B, H, dk, dv), or from nothing. Same interface as ``LazyState``.

    A reorder by beam search is kept as row numbers until the next step, which reads S[parent] and writes S[row]: the
    state crosses memory once a token.
    """

    def __init__(self, state: Optional[Tensor] = None):
        self.state = state
        self.owned = False  # whether nobody else holds it, so that a step may write into it
        self.parent: Optional[Tensor] = None
        self.spare: Optional[Tensor] = None  # the memory of the state before

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        write: Optional[Tensor],
        erase: Optional[Tensor],
        log_decay: Optional[Tensor],
    ) -> Tensor:
        """Write and read one token, (B, H, 1, ...) as ``fast_weight_scan`` takes it; out (B, H, 1, dv)."""
        if self.state is None:
            batch, heads, _, dk = k.shape
            dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
            self.state = k.new_zeros(batch, heads, dk, v.shape[-1], dtype=dtype)
            self.owned = True
        token = [None if x is None else x[:, :, 0] for x in (q, k, v, write, erase, log_decay)]
        out, new = cuda_step(*token, self.state, self.parent, self._target(k.shape[0]))
        if new is not self.state:
            self.spare = self.state if self.owned else None
        self.state, self.owned, self.parent = new, True, None
        return out[:, :, None]

    def _target(self, rows: int) -> Optional[Tensor]:
        """Where the new state goes; None for new memory."""
        if self.parent is None:
            return self.state if self.owned else None
        fits = self.spare is not None and self.spare.shape[0] == rows
        return self.spare if fits else None

    def dense(self) -> Optional[Tensor]:
        """S (B, H, dk, dv), or None if nothing was written."""
        if self.state is None or self.parent is None:
            return self.state
        return self.state.index_select(0, self.parent)

    def reorder(self, order: Tensor) -> None:
        """Row i continues from row order[i]; rows may repeat or vanish."""
        order = order.to(torch.int64)
        self.parent = order if self.parent is None else self.parent.index_select(0, order)
