"""Registers the synthetic tasks with fairseq."""

from . import associative_retrieval, multi_query_recall, state_tracking  # noqa: F401
