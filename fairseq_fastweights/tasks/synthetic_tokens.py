"""What the synthetic tasks for language models share: tokens in, a label at some of them."""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from omegaconf import II

SPLITS = ("train", "valid", "test")


@dataclass
class SyntheticTokensConfig(FairseqDataclass):
    """The names are those that fairseq's language models read from their task."""

    tokens_per_sample: int = field(default=128, metadata={"help": "tokens of a sequence"})
    train_sequences: int = field(default=20_000, metadata={"help": "sequences of an epoch"})
    valid_sequences: int = field(default=1_000, metadata={"help": "sequences of each other split"})
    max_target_positions: Optional[int] = II("task.tokens_per_sample")
    add_bos_token: bool = False
    seed: int = II("common.seed")


class LabelledTokens(FairseqDataset):
    """tokens, labels (sequences, T) in numbers of the dictionary; a label that is ``pad`` is not asked for."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, pad: int):
        self.tokens, self.labels = torch.from_numpy(tokens).long(), torch.from_numpy(labels).long()
        self.pad = pad
        self.sizes = np.full(len(tokens), tokens.shape[1])

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(self.tokens)

    def num_tokens(self, index: int) -> int:
        return self.tokens.shape[1]

    size = num_tokens

    def ordered_indices(self):
        return np.random.permutation(len(self))

    def collater(self, samples: List[int]) -> Dict:
        tokens, labels = self.tokens[samples], self.labels[samples]  # (B, T)
        return {
            "id": torch.tensor(samples),
            "net_input": {"src_tokens": tokens, "src_lengths": torch.full((len(samples),), tokens.shape[1])},
            "target": labels,
            "nsentences": len(samples),
            "ntokens": int((labels != self.pad).sum()),  # what the loss is averaged over
        }


class SyntheticTokensTask(FairseqTask):
    """Subclasses name their symbols and draw sequences of them. A split depends on the seed alone."""

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        parser.set_defaults(
            criterion="label_smoothed_cross_entropy", label_smoothing=0.0, report_accuracy=True
        )

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """fairseq says from_checkpoint=True where it loads one."""
        return cls(cfg)

    def __init__(self, cfg: SyntheticTokensConfig):
        super().__init__(cfg)
        self.dictionary = Dictionary()
        for symbol in self.symbols():
            self.dictionary.add_symbol(symbol)

    def symbols(self) -> List[str]:
        """All tokens and labels."""
        raise NotImplementedError

    def draw(self, random: np.random.Generator, count: int) -> Tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, (count, T) each, as positions in ``symbols()``; -1 is no label."""
        raise NotImplementedError

    def load_dataset(self, split, **kwargs):
        number = SPLITS.index(split) if split in SPLITS else sum(map(ord, split))
        count = self.cfg.train_sequences if split == "train" else self.cfg.valid_sequences
        tokens, labels = self.draw(np.random.default_rng([self.cfg.seed, number]), count)
        first, pad = self.dictionary.nspecial, self.dictionary.pad()
        self.datasets[split] = LabelledTokens(tokens + first, np.where(labels < 0, pad, labels + first), pad)

    def max_positions(self):
        return self.cfg.tokens_per_sample

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary
