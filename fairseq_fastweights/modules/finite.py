"""Where the first value that is not finite came from: a module outside of fast-weight attention, or one inside."""

import functools
import logging
import math
from typing import Iterator, List, Optional, Set, Tuple

import torch
from fairseq.modules import AdaptiveSoftmax
from torch import Tensor, nn

from .fast_weight_attention import FastWeightAttention

logger = logging.getLogger(__name__)


class Trace:
    """What the instruments of a model share: the forward pass that goes on, and what was warned of.

    bounds: (module, input or output, its smallest and largest number (2,)), in the order in which they were computed;
        None between two passes. Numbers, not the tensors, which would live as long.
    warned: layers and modules, and the moments, in which something was not finite.
    """

    def __init__(self) -> None:
        self.bounds: Optional[List[Tuple[str, str, Tensor]]] = None
        self.warned: Set[str] = set()

    def first_wrong(self) -> Optional[Tuple[str, str, str]]:
        """The first module of this pass with a number that is not finite, input or output, and "nan" or "inf"."""
        if not self.bounds:
            return None
        for (place, tensor, _), bounds in zip(
            self.bounds, torch.stack([x for *_, x in self.bounds]).tolist()
        ):
            if not all(map(math.isfinite, bounds)):
                return place, tensor, "nan" if any(map(math.isnan, bounds)) else "inf"
        return None


class Instrument(nn.Module):
    """A module, so that it knows training from evaluation, and fairseq tells it the updates."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.update = 0  # the one that is being made, or was made last

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every training update with the number of those made."""
        self.update = num_updates + 1

    def moment(self) -> str:
        return f"update {self.update}" if self.training else f"validation after update {self.update}"

    def warn(self, place: str, tensor: str, found: str) -> None:
        """Once a place, and of the first place only at a moment."""
        moment, warned = self.moment(), self.trace.warned
        if moment not in warned and place not in warned:
            logger.warning(f"first non-finite value: {place}, tensor {tensor} ({found}), {moment}")
        warned.update((moment, place))


class Watch(Instrument):
    """Bounds of what every module with parameters takes and gives, outside of fast-weight attention.

    Its hooks come with the first update that fairseq trains: TorchScript and generation see none.
    """

    def __init__(self, model: nn.Module, trace: Trace):
        super().__init__(trace)
        self.watched = [model]  # in a list: a model is no part of its instrument
        self.hooked = False

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        if self.hooked:
            return
        self.hooked = True
        (model,) = self.watched
        # fairseq's criterion calls an adaptive softmax after the model: a pass of its own
        for whole in (model, *(part for part in model.modules() if isinstance(part, AdaptiveSoftmax))):
            whole.register_forward_pre_hook(self.begin)
            whole.register_forward_hook(self.end)
        for name, module in watched_modules(model):
            module.register_forward_hook(functools.partial(self.see, name))

    def begin(self, whole: nn.Module, inputs: tuple) -> None:
        self.trace.bounds = []

    def see(self, name: str, module: nn.Module, inputs: tuple, output) -> None:
        if self.trace.bounds is None:  # called by itself, as in decoding
            return
        for kind, x in (("input", inputs[0] if inputs else None), ("output", output)):
            x = x[0] if isinstance(x, tuple) else x
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0:
                bounds = torch.stack(torch.aminmax(x.detach())).float()
                self.trace.bounds.append((name, kind, bounds))

    def end(self, whole: nn.Module, inputs: tuple, output) -> None:
        first = self.trace.first_wrong()
        self.trace.bounds = None
        if first is not None:
            self.warn(*first)


def watched_modules(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Those with parameters of their own, and of fast-weight attention the last."""
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, FastWeightAttention):
            inside.update(part for part in module.modules() if part is not module.out_proj)
        if module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module
