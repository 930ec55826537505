"""Registers the synthetic tasks and stateful language modelling with fairseq."""

from . import (  # noqa: F401
    associative_retrieval,
    multi_query_recall,
    state_tracking,
    stateful_language_modeling,
)
