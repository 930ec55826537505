"""Fast-weight attention for fairseq.

    fairseq-train DATA --user-dir fairseq_fastweights --arch fast_weight_transformer --update-rule delta ...

Without fairseq only ``fairseq_fastweights.ops``, ``.feature_maps`` and ``.update_rules`` can be used.
"""

from importlib.util import find_spec

from .errors import FastWeightError

__version__ = "0.1.0"
__all__ = ["FastWeightError"]

if find_spec("fairseq") is not None:
    from . import compat

    compat.apply()  # first: a checkpoint may be read as soon as the models are known
    from . import criterions, models, optim, tasks  # noqa: F401
