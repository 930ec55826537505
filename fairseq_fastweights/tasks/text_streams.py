"""A text as parallel streams of segments, in the order in which a model that carries its state must read them."""

import logging
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

logger = logging.getLogger(__name__)

SCANNED_AT_ONCE = 1 << 20  # tokens


class Text(FairseqDataset):
    """The sentences of a split, one behind the other. ``len`` is the number of tokens."""

    def __init__(self, sentences, sizes: np.ndarray):
        self.sentences = sentences
        self.ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, end: int) -> Tensor:
        """Tokens ``start`` to ``end`` - 1."""
        if start == end:
            return torch.empty(0, dtype=torch.long)
        first, last = np.searchsorted(self.ends, [start, end - 1], side="right")
        before = self.ends[first - 1] if first > 0 else 0
        tokens = torch.cat([self.sentences[i].long() for i in range(first, last + 1)])
        return tokens[start - before : end - before]

    def after_every(self, symbol: int) -> np.ndarray:
        """The places behind the occurrences of ``symbol``, in increasing order."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(self), SCANNED_AT_ONCE):
            tokens = self.read(start, min(start + SCANNED_AT_ONCE, len(self)))
            found.append(start + 1 + np.flatnonzero(tokens.numpy() == symbol))
        return np.concatenate(found)


def cut_stream(start: int, end: int, resets: np.ndarray, length: int) -> Tuple[np.ndarray, np.ndarray]:
    """Cut tokens ``start`` to ``end`` - 1 into segments of at most ``length``, anew at its start and every reset.

    Returns (edges (segments + 1,), begins_anew (segments,) bool). ``resets`` are increasing places in the text.
    """
    inside = resets[(resets > start) & (resets < end)]
    parts = np.concatenate([[start], inside, [end]]).astype(np.int64)
    counts = -(-np.diff(parts) // length)  # segments a part
    first = np.cumsum(counts) - counts
    number = np.arange(counts.sum()) - np.repeat(first, counts)  # of a segment in its part
    edges = np.repeat(parts[:-1], counts) + number * length
    return np.append(edges, end), number == 0


class Segments(FairseqDataset):
    """``text`` in ``streams`` streams, read side by side in segments of up to ``length`` tokens.

    Item ``segment * streams + stream`` is a segment of a stream; one of a stream that has ended is empty. Every token
    is the target of one item, its input is the token before it (``eos`` at the beginning of the text).
    """

    def __init__(self, text: Text, streams: int, length: int, eos: int, pad: int, resets: np.ndarray):
        self.text, self.streams, self.eos, self.pad = text, streams, eos, pad
        each, longer = divmod(len(text), streams)
        bounds = np.cumsum([0] + [each + (b < longer) for b in range(streams)])
        cuts = [cut_stream(bounds[b], bounds[b + 1], resets, length) for b in range(streams)]
        self.edges = [edges for edges, _ in cuts]
        self.begins_anew = [begins_anew for _, begins_anew in cuts]
        self.segments = max(map(len, self.begins_anew))

    def __len__(self) -> int:
        return self.segments * self.streams

    def __getitem__(self, index: int) -> Dict[str, Any]:
        segment, stream = divmod(index, self.streams)
        if segment >= len(self.begins_anew[stream]):  # this stream has ended
            empty = torch.empty(0, dtype=torch.long)
            return {"id": index, "source": empty, "target": empty, "begins_anew": segment == 0}
        start, end = self.edges[stream][segment : segment + 2]
        target = self.text.read(start, end)
        before = self.text.read(start - 1, start) if start > 0 else torch.tensor([self.eos])
        return {
            "id": index,
            "source": torch.cat([before, target[:-1]]),
            "target": target,
            "begins_anew": bool(self.begins_anew[stream][segment]),
        }

    def batches(self, ranks: int) -> List[List[int]]:
        """Segment 0 of rank 0's streams, of rank 1's, ..., segment 1 of rank 0's, ..."""
        rows = np.arange(len(self)).reshape(self.segments * ranks, self.streams // ranks)
        return rows.tolist()

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """The batch that fairseq's criteria and SequenceScorer read; ``segment`` of ``segments`` says where it is."""
        lengths = torch.tensor([len(sample["target"]) for sample in samples])
        # (B, T); where all streams have ended one pad a row, since not every layer knows texts of no token
        shape = len(samples), max(1, int(lengths.max()))
        source, target = (torch.full(shape, self.pad) for _ in range(2))
        for b, sample in enumerate(samples):
            source[b, : lengths[b]] = sample["source"]
            target[b, : lengths[b]] = sample["target"]
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()),
            "net_input": {
                "src_tokens": source,
                "src_lengths": lengths,
                "stream_start": torch.tensor([sample["begins_anew"] for sample in samples]),
            },
            "target": target,
            "segment": samples[0]["id"] // self.streams,
            "segments": self.segments,
        }

    def num_tokens(self, index: int) -> int:
        return len(self[index]["target"])

    size = num_tokens


class StreamIterator(EpochBatchIterator):
    """fairseq's iterator, whose ``state_dict`` has in the middle of an epoch the states of the streams, too:

    {"layout": what the segments depend on, "attentions": [(state, z) of the streams of all ranks, ...]}.
    ``load_state_dict`` hands the latter to ``resume``, or begins the epoch anew if the layout is another.
    """

    def __init__(
        self, segments: Segments, layout: Dict[str, Any], resume: Callable, num_shards: int, **options
    ):
        super().__init__(
            dataset=segments,
            collate_fn=segments.collater,
            batch_sampler=segments.batches(num_shards),
            num_shards=num_shards,
            disable_shuffling=True,
            **options,
        )
        # the task makes an iterator an epoch and a validation: workers that outlive it would be ended by Python's
        # garbage collector, which waits 5 seconds for each
        self.persistent_workers = False
        self.layout, self.resume = layout, resume
        self.states: Optional[Dict[str, Any]] = None

    def gather_states(self, model) -> None:
        """Collect the training states of all ranks' streams, on all ranks, for ``state_dict``."""
        states = [
            None if state is None else tuple(None if x is None else all_streams(x) for x in state)
            for state in model.carried_states()
        ]
        self.states = {"layout": self.layout, "attentions": states}

    def state_dict(self) -> Dict[str, Any]:
        state_dict = super().state_dict()
        if state_dict["iterations_in_epoch"] > 0 and self.states is not None:
            state_dict["streams"] = self.states
        self.states = None  # a later call must gather anew
        return state_dict

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        inside, streams = state_dict.get("iterations_in_epoch", 0) > 0, state_dict.get("streams")
        if inside and streams is not None and streams["layout"] == self.layout:
            self.resume(streams["attentions"])
        elif inside:
            was = "no streams" if streams is None else describe(streams["layout"])
            now = f"this run has {describe(self.layout)}: epoch {state_dict['epoch']} begins anew"
            logger.warning(f"the checkpoint holds {was}, {now}")
            state_dict = {**state_dict, "iterations_in_epoch": 0}
        super().load_state_dict(state_dict)


def describe(layout: Dict[str, Any]) -> str:
    resets = "" if layout["reset_at"] is None else f", reset at {layout['reset_at']}"
    tokens = f"{layout['tokens']} tokens in segments of {layout['tokens_per_sample']}"
    return f"{layout['streams']} streams of {tokens}{resets}"


def all_streams(x: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the streams, on the CPU."""
    if distributed_utils.get_data_parallel_world_size() > 1:
        x = torch.cat(
            distributed_utils.all_gather(x.contiguous(), distributed_utils.get_data_parallel_group())
        )
    return x.cpu()


def streams_of_this_rank(x: Optional[Tensor], like: Tensor) -> Optional[Tensor]:
    """The rows of ``all_streams`` that this rank reads, as many as ``like`` has, on its device."""
    if x is None:
        return None
    ranks = distributed_utils.get_data_parallel_world_size()
    rank = distributed_utils.get_data_parallel_rank() if ranks > 1 else 0
    return x.chunk(ranks)[rank].to(like.device)
