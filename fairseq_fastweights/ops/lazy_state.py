"""The state of decoding rows, kept as pairs (k, r) until a matrix is the smaller thing to read.

    S = g S_base + sum over the pairs j written since of exp(l - l_j) k_j r_j^T

A token reads its ancestors' pairs where they lie, so a reorder by beam search moves a small table of row numbers and
neither keys nor states; short sentences cost what a key-value cache costs, without its copies, and never build
S. After dk dv / (dk + dv) tokens, when the pairs are as large as S, they are folded into S_base, so that long ones
stay constant in memory and time. Inference only.
"""

from typing import Optional

import torch
from torch import Tensor

from .numba_scan import readable, run, split_erase

SMALLEST_FOLD = 16  # pairs


class LazyState:
    """State of B rows, from ``base`` (B, H, dk, dv) or from nothing. Rows are reordered by ``reorder``."""

    def __init__(self, base: Optional[Tensor] = None):
        self.base = base
        self.base_rows = None if base is None else torch.arange(base.shape[0])
        self.keys: Optional[Tensor] = (
            None  # (slots, B, H, dk), the rows as they were when the slot was written
        )
        self.inserted: Optional[Tensor] = None  # (slots, B, H, dv)
        self.totals: Optional[Tensor] = None  # (slots, B, H, 1): l_j, where the rule decays
        self.ancestors: Optional[Tensor] = None  # (B, slots): the row in each slot
        self.count = 0  # slots in use

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
        rows, heads, _, dk = k.shape
        dv = v.shape[-1]
        self._make_room(rows, heads, dk, dv, k.dtype, log_decay is not None)
        operands = [readable(x, k.dtype) for x in split_erase(q, k, v, write, erase, log_decay, None)[:-1]]
        out = torch.empty_like(v)
        pairs = [self.keys, self.inserted, self.totals, self.ancestors[:, :, None], self.base, None]
        if self.base is not None:
            pairs[-1] = self.base_rows[:, None, None]
        cost = rows * heads * (dk + dv) * (self.count + (0 if self.base is None else dk))
        run("decode", (self.count, 1, dk, dv), [*operands, out, *pairs], cost)
        self.count += 1
        return out

    def _make_room(self, rows: int, heads: int, dk: int, dv: int, dtype: torch.dtype, decays: bool) -> None:
        """A free slot for ``rows`` rows: more slots, up to the number at which the pairs are folded."""
        if self.count >= max(SMALLEST_FOLD, dk * dv // (dk + dv)) or (
            self.count and rows > self.keys.shape[1]
        ):
            self.fold()
        if self.count == 0:
            slots, width = SMALLEST_FOLD, rows
        elif self.count < self.keys.shape[0]:
            return
        else:
            slots, width = 2 * self.keys.shape[0], self.keys.shape[1]
        grown = [torch.empty(slots, width, heads, size, dtype=dtype) for size in (dk, dv, 1)]
        ancestors = torch.empty(rows, slots, dtype=torch.int64)
        if self.count > 0:
            for new, old in zip(grown, (self.keys, self.inserted, self.totals)):
                if old is not None:
                    new[: self.count] = old[: self.count]
            ancestors[:, : self.count] = self.ancestors[:, : self.count]
        self.keys, self.inserted = grown[:2]
        self.totals = grown[2] if decays else None
        self.ancestors = ancestors

    def fold(self) -> None:
        """Put the pairs into S_base."""
        if self.count > 0:
            self.base = self.dense()
            self.base_rows = torch.arange(self.base.shape[0])
            self.keys = self.inserted = self.totals = self.ancestors = None
            self.count = 0

    def dense(self) -> Optional[Tensor]:
        """S (B, H, dk, dv) as a matrix, or None if nothing was written."""
        if self.count == 0:
            return None if self.base is None else self.base.index_select(0, self.base_rows)
        slots, rows = torch.arange(self.count), self.ancestors[:, : self.count]
        keys, inserted = self.keys[slots, rows], self.inserted[slots, rows]  # (B, slots, H, ...)
        kept = None
        if self.totals is not None:
            totals = self.totals[slots, rows]
            keys = keys * (totals[:, -1:] - totals).exp()
            kept = totals[:, -1].exp()[..., None]  # (B, H, 1, 1)
        state = keys.permute(0, 2, 3, 1) @ inserted.transpose(1, 2)
        if self.base is not None:
            base = self.base.index_select(0, self.base_rows)
            state += base if kept is None else kept * base
        return state

    def reorder(self, order: Tensor) -> None:
        """Row i continues from row order[i]; rows may repeat or vanish."""
        if self.base_rows is not None:
            self.base_rows = self.base_rows.index_select(0, order)
        if self.ancestors is not None:
            self.ancestors = self.ancestors.index_select(0, order)
