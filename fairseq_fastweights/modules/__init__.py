"""Attention modules that speak fairseq's call contract."""

from .fast_weight_attention import FastWeightAttention

__all__ = ["FastWeightAttention"]
