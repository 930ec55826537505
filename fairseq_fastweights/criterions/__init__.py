"""Losses beside fairseq's own."""

from . import attention_distillation, half_squared_error  # noqa: F401
