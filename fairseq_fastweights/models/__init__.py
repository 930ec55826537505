"""Registers the models and their architectures with fairseq."""

from . import associative_memory, fast_weight_lm, fast_weight_transformer  # noqa: F401
