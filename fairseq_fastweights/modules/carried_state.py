"""The state that a causal attention carries from one segment of its streams to the next."""

from typing import Optional, Tuple

from torch import Tensor

State = Tuple[Tensor, Optional[Tensor]]  # S (B, H, rows, dv) and, where the rule has it apart, z (B, H, dk)


class CarriedState:
    """A stream is a row of the batch whose text goes on in the same row of the next batch.

    ``start`` is what the present segment starts from; reading a segment leaves it as it is, so that activation
    checkpointing reads the same again in backward. ``end`` is where the segment ended. None stands for zeros.
    """

    def __init__(self):
        self.start: Optional[State] = None
        self.end: Optional[State] = None
        self.with_gradient = False  # keep the graph behind ``end``

    def next_segment(self, stream_start: Tensor) -> None:
        """Start from where the last segment ended, from zeros in the rows of stream_start (B,), bool."""
        last = self.present()
        self.end = None
        self.start = None if last is None else tuple(zero_rows(x, stream_start) for x in last)

    def finish(self, state: Tensor, z: Optional[Tensor]) -> None:
        """The segment ended with ``state`` and ``z``."""
        self.end = (state, z) if self.with_gradient else detached((state, z))

    def present(self) -> Optional[State]:
        """Where the streams are: at the end of the last segment. A layer that LayerDrop left out did not move."""
        return self.start if self.end is None else self.end

    def restore(self, state: Optional[State]) -> None:
        """Go on from ``state``, a value of ``present()``."""
        self.start, self.end = state, None

    def detach(self) -> None:
        """Let go of the graph of the segments so far."""
        self.start, self.end = detached(self.start), detached(self.end)


def zero_rows(x: Optional[Tensor], rows: Tensor) -> Optional[Tensor]:
    """A copy of x (B, ...), zero in the rows where ``rows`` (B,) is true."""
    if x is None:
        return None
    return x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), 0.0)


def detached(state: Optional[State]) -> Optional[State]:
    if state is None:
        return None
    return tuple(None if x is None else x.detach() for x in state)
