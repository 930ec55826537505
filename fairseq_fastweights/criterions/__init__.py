"""Losses beside fairseq's own."""

from . import half_squared_error  # noqa: F401
