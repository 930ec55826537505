"""Loading a checkpoint's parameters, with one clear line where they do not fit."""

from typing import Dict

from torch import Tensor

from ..errors import FastWeightError

# 0.12.2 saved fused copies of encoder weights for torch's encoder fast path; forks have no such parameters
FUSED = tuple(
    f"{part}_{kind}" for part in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias")
)


def drop_fused_copies(state_dict: Dict[str, Tensor]) -> None:
    """Remove ``encoder.layers.N.in_proj_weight`` and the like, which repeat other entries."""
    for name in list(state_dict):
        parent, _, leaf = name.rpartition(".")
        if leaf in FUSED and parent.startswith("encoder.layers.") and parent.count(".") == 2:
            del state_dict[name]


class ClearLoading:
    """Mixin before a fairseq model: a state dict of another model raises FastWeightError, not torch's long list."""

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As fairseq's, for checkpoints of 0.12.2 and its forks."""
        drop_fused_copies(state_dict)
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except RuntimeError as error:
            first, *more = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            also = f" (and {len(more)} more)" if more else ""
            raise FastWeightError(
                f"the checkpoint does not fit the model: {first[:300].rstrip(' .')}{also}; are the architecture, "
                "--update-rule* and --feature-map those it was trained with?"
            ) from error
