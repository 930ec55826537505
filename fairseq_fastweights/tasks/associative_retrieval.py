"""Associative retrieval, the paper's section 6.1: key-value pairs are read, then one key is asked for its last value.

    fairseq-train --user-dir fairseq_fastweights --task associative_retrieval --arch associative_memory \\
        --setting 1 --num-keys 40 --update-rule sum --feature-map elu --eval-csv log.csv --cpu

The data are drawn in the order of the authors' code (github.com/ischlag/fast-weight-transformers), from numpy's legacy
generator, so that ``--seed 1`` gives their batches and their evaluation sequences. No data folder is needed.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II

from ..errors import FastWeightError
from ..models.associative_memory import UNSET_LR
from ..optim.until_loss import UntilLossConfig

SETTINGS = (1, 2)
NEVER = 10**9
MODEL = "associative_memory"


@dataclass
class AssociativeRetrievalConfig(FairseqDataclass):
    """An epoch is what lies between two evaluations."""

    setting: int = field(
        default=1,
        metadata={
            "help": "1: every key once, as many pairs as keys (capacity); "
            "2: keys come again, twice as many pairs as keys in training (overwriting)"
        },
    )
    num_keys: int = field(default=20, metadata={"help": "S: keys, and values"})
    eval_interval: int = field(default=100, metadata={"help": "batches between evaluations"})
    eval_sequences: int = field(default=20, metadata={"help": "sequences of an evaluation"})
    eval_queries: int = field(default=200, metadata={"help": "most queries asked of one of them"})
    eval_csv: Optional[str] = field(
        default=None, metadata={"help": "file for step,eval-loss, a row each evaluation"}
    )
    seed: int = II("common.seed")
    batch_size: Optional[int] = II("dataset.batch_size")


class RetrievalDataset(FairseqDataset):
    """Questions to sequences of pairs.

    Args:
        keys, values: (sequences, pairs), in [0, num_keys).
        asked_of: (questions,) the sequence of each question; consecutive questions to one are batched together.
        asked: (questions,) the position of the pair whose value is the answer.
        joined: whether a batch may hold questions to several sequences.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(
        self, keys: np.ndarray, values: np.ndarray, asked_of: np.ndarray, asked: np.ndarray, joined: bool
    ):
        self.keys, self.values, self.asked_of, self.asked, self.joined = keys, values, asked_of, asked, joined
        self.sizes = np.full(len(asked), keys.shape[1])

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(self.asked)

    def num_tokens(self, index: int) -> int:
        return self.keys.shape[1]

    size = num_tokens

    def collater(self, samples: List[int]) -> Dict:
        rows, asked = self.asked_of[samples], self.asked[samples]
        inputs = {
            "keys": self.keys[rows],  # (B, L)
            "values": self.values[rows],  # (B, L)
            "query": self.keys[rows, asked],  # (B,)
        }
        return {
            "id": torch.tensor(samples),
            "net_input": {name: torch.from_numpy(array).long() for name, array in inputs.items()},
            "target": torch.from_numpy(self.values[rows, asked]).long(),  # (B,)
            "nsentences": len(samples),
            "ntokens": len(samples),
        }

    def batch_by_size(self, indices, max_tokens=None, max_sentences=None, required_batch_size_multiple=1):
        """In order, ``max_sentences`` at a time; a sequence's rest is a batch of its own."""
        borders = [] if self.joined else np.flatnonzero(np.diff(self.asked_of)) + 1
        size = max_sentences or len(indices)
        return [
            group[start : start + size]
            for group in np.split(np.asarray(indices), borders)
            for start in range(0, len(group), size)
        ]


class Stream:
    """The authors' random numbers: batches and evaluations in the order in which a run meets them."""

    def __init__(self, cfg: AssociativeRetrievalConfig):
        self.cfg = cfg
        self.replace = cfg.setting == 2
        self.random = np.random.RandomState(cfg.seed)
        self.epoch = 0
        self.training: Optional[RetrievalDataset] = None
        self.evaluation: Optional[RetrievalDataset] = None

    def pairs(self, length: int) -> Tuple[np.ndarray, np.ndarray]:
        """The keys and the values of one sequence: (length,) each."""
        keys = self.random.choice(self.cfg.num_keys, length, replace=self.replace)
        return keys, self.random.choice(self.cfg.num_keys, length, replace=self.replace)

    def advance(self) -> None:
        """Draw the next epoch: ``eval_interval`` batches, then the evaluation after them."""
        if self.cfg.batch_size is None:
            raise FastWeightError("task associative_retrieval needs --batch-size")
        self.epoch += 1
        self.training = self.draw_training(self.cfg.eval_interval * self.cfg.batch_size)
        self.evaluation = self.draw_evaluation()

    def draw_training(self, count: int) -> RetrievalDataset:
        """``count`` sequences, each asked for the key at a random position."""
        length = self.cfg.num_keys * (2 if self.replace else 1)
        keys, values = np.empty((2, count, length), dtype=np.int32)
        asked = np.empty(count, dtype=np.int64)
        for row in range(count):
            keys[row], values[row] = self.pairs(length)
            asked[row] = np.flatnonzero(keys[row] == self.random.choice(keys[row]))[-1]
        return RetrievalDataset(keys, values, np.arange(count), asked, joined=True)

    def draw_evaluation(self) -> RetrievalDataset:
        """Sequences of ``num_keys`` pairs in both settings, each asked for every key that is in it."""
        drawn = [self.pairs(self.cfg.num_keys) for _ in range(self.cfg.eval_sequences)]
        keys, values = (np.stack(arrays).astype(np.int32) for arrays in zip(*drawn))
        asked = [last_positions(row)[: self.cfg.eval_queries] for row in keys]
        asked_of = np.repeat(np.arange(len(asked)), [len(positions) for positions in asked])
        return RetrievalDataset(keys, values, asked_of, np.concatenate(asked), joined=False)


def last_positions(keys: np.ndarray) -> np.ndarray:
    """Where each key comes last, keys in ascending order."""
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    return len(keys) - 1 - from_the_end


@register_task("associative_retrieval", dataclass=AssociativeRetrievalConfig)
class AssociativeRetrievalTask(FairseqTask):
    """Optimizer, batches, evaluation and the end of training are the authors' unless flags say otherwise.

    A resumed run draws the data and the losses of the run that was not stopped; only --patience is counted anew, as
    fairseq does for every task.
    """

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        gen_parser_from_dataclass(parser, UntilLossConfig())
        parser.set_defaults(
            criterion="half_squared_error",
            optimizer="torch_adam",
            lr=[UNSET_LR],  # with the batch size, the architecture's
            lr_scheduler="until_loss",
            max_update=100_000,
            patience=11,
            stop_min_lr=0.0,
            curriculum=NEVER,  # shuffled batches would not be the authors'
            num_workers=0,
            save_dir="",  # saved only where a folder is given
            no_epoch_checkpoints=True,
        )

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """fairseq says from_checkpoint=True where it loads one."""
        return cls(cfg)

    def __init__(self, cfg: AssociativeRetrievalConfig):
        super().__init__(cfg)
        if cfg.setting not in SETTINGS:
            raise FastWeightError(f"--setting must be 1 or 2, got {cfg.setting}")
        for name, least in (
            ("num_keys", 2),
            ("eval_interval", 1),
            ("eval_sequences", 1),
            ("eval_queries", 1),
        ):
            if getattr(cfg, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise FastWeightError(f"{flag} must be at least {least}, got {getattr(cfg, name)}")
        self.stream = Stream(cfg)

    def build_model(self, cfg, from_checkpoint=False):
        name = getattr(cfg, "arch", None) or getattr(cfg, "_name", None)
        if name != MODEL:
            raise FastWeightError(f"task associative_retrieval needs --arch {MODEL}, got {name!r}")
        return super().build_model(cfg, from_checkpoint)

    def has_sharded_data(self, split):
        """Every epoch has data of its own."""
        return split == "train"

    def load_dataset(self, split, epoch=1, **kwargs):
        """Go on in the stream to this epoch; a resumed run draws again what came before."""
        if split != "train":
            self.datasets[split] = self.stream.evaluation or Stream(self.cfg).draw_evaluation()
            return
        if epoch < self.stream.epoch:
            self.stream = Stream(self.cfg)
        while self.stream.epoch < epoch:
            self.stream.advance()
        self.datasets = dict.fromkeys(self.datasets, self.stream.evaluation)
        self.datasets["train"] = self.stream.training

    def begin_epoch(self, epoch, model):
        """Called by fairseq-train; a run that begins has nothing to do with rows that are there."""
        super().begin_epoch(epoch, model)
        torch.set_flush_denormal(True)  # FAVOR+'s features underflow, and an x86 is slow with such numbers
        if self.writes_rows() and model.updates == 0:
            write_rows(Path(self.cfg.eval_csv), [])

    def writes_rows(self) -> bool:
        return bool(self.cfg.eval_csv) and distributed_utils.get_global_rank() == 0

    def post_validate(self, model, stats, agg):
        """Called by fairseq-train after every evaluation."""
        if self.writes_rows():
            append_row(Path(self.cfg.eval_csv), int(stats["num_updates"]), float(stats["loss"]))

    def max_positions(self):
        return None

    @property
    def source_dictionary(self):
        return None

    @property
    def target_dictionary(self):
        return None


def append_row(file: Path, step: int, loss: float) -> None:
    """Add a row; rows at this step or later go: a resumed run comes to them again."""
    earlier = []
    if file.exists():
        with open(file, newline="") as lines:
            earlier = [row for row in list(csv.reader(lines))[1:] if int(row[0]) < step]
    write_rows(file, [*earlier, [step, loss]])


def write_rows(file: Path, rows: List[List]) -> None:
    """The whole file, at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", newline="") as lines:
        csv.writer(lines).writerows([["step", "eval-loss"], *rows])
    partial.rename(file)
