"""From a trained softmax transformer of fairseq to fast weights: ``fastweights-convert``, see ``__main__``."""

from .checkpoint import Softmax, read_softmax
from .command import next_commands
from .swap import Converted, convert, start_near_softmax

__all__ = ["Converted", "Softmax", "convert", "next_commands", "read_softmax", "start_near_softmax"]
