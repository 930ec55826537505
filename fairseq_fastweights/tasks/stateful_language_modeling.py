"""Language modelling in which the state goes on from segment to segment: no token's context is cut off.

    fairseq-train DATA --user-dir fairseq_fastweights --task stateful_language_modeling --arch fast_weight_lm \\
        --no-token-positional-embeddings --update-rule delta --batch-size 16 --tokens-per-sample 256 ...

A split is one text. It is cut into ``--batch-size`` (times data-parallel ranks) streams, which are read side by side
in segments of ``--tokens-per-sample``; every segment starts from the state that the last one left. Positions, if the
model has any, count from the beginning of a segment.
"""

import contextlib
from dataclasses import dataclass, field
from typing import List, Optional

import numpy as np
from fairseq.models import ARCH_MODEL_REGISTRY, FairseqLanguageModel
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import II

from ..errors import FastWeightError
from ..models.streams import CarriesStates
from .text_streams import Segments, StreamIterator, Text, streams_of_this_rank

TASK = "task stateful_language_modeling"
FAIRSEQS_MAX_TOKENS = 36000  # what fairseq-eval-lm hands over when --max-tokens is not given
# options of language_modeling that would change the text, and the value that leaves it as it is
UNCHANGED = {
    "output_dictionary_size": -1,
    "self_target": False,
    "future_target": False,
    "past_target": False,
    "add_bos_token": False,
    "shorten_method": "none",
    "pad_to_fixed_length": False,
    "pad_to_fixed_bsz": False,
}


@dataclass
class StatefulLanguageModelingConfig(LanguageModelingConfig):
    tokens_per_sample: int = field(default=1024, metadata={"help": "tokens of a segment of each stream"})
    reset_at: Optional[str] = field(
        default=None,
        metadata={"help": "a symbol of the dictionary: the state begins anew after each (default: never)"},
    )
    state_gradient: bool = field(
        default=False,
        metadata={
            "help": "let the gradient flow through the carried state within an update (needs --update-freq > 1)"
        },
    )
    update_freq: List[int] = II("optimization.update_freq")


@register_task("stateful_language_modeling", dataclass=StatefulLanguageModelingConfig)
class StatefulLanguageModelingTask(LanguageModelingTask):
    """fairseq's language_modeling with another order of batches. With --sample-break-mode eos (generation) the
    sentences of a split are prompts, as there."""

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        check_options(args)
        self.reset_symbol = symbol_index(dictionary, args.reset_at)
        self.longest_segment: Optional[int] = None  # None: models without positions read any
        self.saved_states: Optional[list] = None  # of a checkpoint, until training goes on from them
        self.epoch, self.first_segment = 1, None  # the first one trained on in this epoch by this process
        self.update_began = None  # the (epoch, segment) where the present update began, and the states there
        self.states_before_update: list = []
        self.losses: list = []  # of the present update, whose backward is still to come

    # --- what is built

    def build_model(self, args, from_checkpoint=False):
        check_architecture(args)
        model = super().build_model(args, from_checkpoint)
        check_model(model)
        positions = model.decoder.embed_positions
        if positions is not None:
            limits = [positions.max_positions, self.longest_segment or positions.max_positions]
            self.longest_segment = min(limits)
        if not from_checkpoint:
            self._check_training(model, args)
            model.state_gradient = self.args.state_gradient
        return model

    def _check_training(self, model, args) -> None:
        if not self._reads_streams():
            raise FastWeightError(f"{TASK}: --sample-break-mode eos is for generation, training needs none")
        for attention in model.attentions():
            if getattr(attention.feature_map, "redraw_interval", 0) != 0:
                raise FastWeightError(
                    f"{TASK}: a state written with FAVOR+'s old directions cannot be read with new ones: "
                    f"--favor-redraw-interval must be 0, got {attention.feature_map.redraw_interval}"
                )
        if self.args.state_gradient and getattr(args, "checkpoint_activations", False):
            raise FastWeightError(f"{TASK}: --state-gradient and --checkpoint-activations exclude each other")
        if self.args.state_gradient and max(self.args.update_freq) == 1:
            raise FastWeightError(
                f"{TASK}: --state-gradient needs --update-freq of at least 2, got {self.args.update_freq}"
            )

    def _reads_streams(self) -> bool:
        return str(self.args.sample_break_mode) == "none"

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        """A split as one ``Text``."""
        super().load_dataset(split, epoch, combine, **kwargs)
        if self._reads_streams():
            sentences = self.datasets[split].dataset.dataset  # below fairseq's blocks
            self.datasets[split] = Text(sentences, sentences.sizes)

    def get_batch_iterator(self, dataset, max_tokens=None, max_sentences=None, **options):
        """The segments of a ``Text``, ``max_sentences`` streams for each of ``num_shards`` ranks, never shuffled."""
        if not isinstance(dataset, Text):
            return super().get_batch_iterator(dataset, max_tokens, max_sentences, **options)
        if max_sentences is None and max_tokens is not None:
            raise FastWeightError(
                f"{TASK}: --batch-size gives the number of streams, --max-tokens does not; for generation add "
                "--sample-break-mode eos"
            )
        if options.get("skip_remainder_batch") or options.get("grouped_shuffling"):
            raise FastWeightError(
                f"{TASK} reads the whole text in order: drop --skip-remainder-batch and --grouped-shuffling"
            )
        length = self.args.tokens_per_sample
        if self.longest_segment is not None and length > self.longest_segment:
            raise FastWeightError(
                f"--tokens-per-sample must be at most the model's {self.longest_segment} positions, got {length}"
            )
        ranks = options.get("num_shards", 1)
        streams = (max_sentences or 1) * ranks
        eos, pad = self.dictionary.eos(), self.dictionary.pad()
        return StreamIterator(
            Segments(dataset, streams, length, eos, pad, self._resets(dataset)),
            layout={
                "streams": streams,
                "tokens": len(dataset),
                "tokens_per_sample": length,
                "reset_at": self.args.reset_at,
            },
            resume=self._resume,
            num_shards=ranks,
            shard_id=options.get("shard_id", 0),
            num_workers=options.get("num_workers", 0),
            epoch=options.get("epoch", 1),
            buffer_size=options.get("data_buffer_size", 0),
        )

    def _resets(self, text: Text) -> np.ndarray:
        if self.reset_symbol is None:
            return np.zeros(0, np.int64)
        if not hasattr(text, "resets"):
            text.resets = text.after_every(self.reset_symbol)
        return text.resets

    def eval_lm_dataloader(self, dataset, max_tokens=None, batch_size=None, context_window=0, **options):
        """One unbroken pass; without --batch-size in one stream."""
        if context_window > 0:
            raise FastWeightError(
                f"{TASK}: every token sees the whole text before it: --context-window must be 0, got {context_window}"
            )
        if not isinstance(dataset, Text):
            raise FastWeightError(f"{TASK}: --sample-break-mode eos is for generation, evaluation needs none")
        if options.get("num_shards", 1) > 1:
            raise FastWeightError(
                f"{TASK}: one process evaluates the whole text: --distributed-world-size must be 1, "
                f"got {options['num_shards']}"
            )
        asked = max_tokens if batch_size is None and max_tokens != FAIRSEQS_MAX_TOKENS else None
        streams = 1 if batch_size is None and asked is None else batch_size
        iterator = self.get_batch_iterator(dataset, max_tokens=asked, max_sentences=streams, **options)
        return iterator.next_epoch_itr(shuffle=False)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Generate from prompts, as language_modeling does."""
        if "segment" in sample:
            raise FastWeightError(
                f"{TASK}: generation from the sentences of a split needs --sample-break-mode eos"
            )
        return super().inference_step(generator, models, sample, prefix_tokens, constraints)

    # --- training

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        self.epoch, self.first_segment = epoch, None

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """As fairseq's; with --state-gradient one backward an update, when its last segment was read."""
        first, last = self._place_in_update(sample)
        if first:
            self._begin_update(sample, model)
        arguments = (sample, model, criterion, optimizer, update_num, ignore_grad)
        if not self.args.state_gradient:
            return super().train_step(*arguments, **kwargs)
        with instead_of_backward(optimizer, self.losses.append):
            loss, sample_size, logging_output = super().train_step(*arguments, **kwargs)
        if last:
            optimizer.backward(sum(self.losses))
            self.losses = []
            model.detach_states()
        return loss.detach(), sample_size, logging_output

    def _place_in_update(self, sample) -> tuple:
        """Whether ``sample`` is the first and the last segment of its update: fairseq's GroupedIterator counts them
        from where the process began in the epoch."""
        segment = sample["segment"]
        if self.first_segment is None:
            self.first_segment = segment
        frequencies = self.args.update_freq
        frequency = frequencies[min(self.epoch, len(frequencies)) - 1]
        place = (segment - self.first_segment) % frequency
        return place == 0, place == frequency - 1 or segment == sample["segments"] - 1

    def _begin_update(self, sample, model) -> None:
        """fairseq reads an update's segments again after an overflow under --amp: from the same states, then."""
        self.losses = []
        model.detach_states()
        began = self.epoch, sample["segment"]
        if self.saved_states is not None:
            model.restore_states(own_rows(self.saved_states, sample["target"]))
            self.saved_states = None
        elif began == self.update_began:
            model.restore_states(self.states_before_update)
        self.update_began, self.states_before_update = began, model.carried_states()

    def _resume(self, attentions: list) -> None:
        """Training goes on in the middle of an epoch, from the streams that a checkpoint holds."""
        self.saved_states = attentions


# --- checks


def check_options(args) -> None:
    """Refuse options that would change the text or its order."""
    if str(args.sample_break_mode) not in ("none", "eos"):
        raise FastWeightError(
            f"{TASK}: --sample-break-mode must be none (or, for generation, eos), got {args.sample_break_mode!s}"
        )
    for option, value in UNCHANGED.items():
        given = getattr(args, option)
        if given is not None and str(given) != str(value):
            flag = "--" + option.replace("_", "-")
            raise FastWeightError(f"{TASK} reads the text as it is: drop {flag} {given}")
    if args.tokens_per_sample < 1:
        raise FastWeightError(f"{TASK}: --tokens-per-sample must be at least 1, got {args.tokens_per_sample}")


def symbol_index(dictionary, symbol: Optional[str]) -> Optional[int]:
    """The number of --reset-at's symbol."""
    if symbol is None:
        return None
    index = dictionary.index(symbol)
    if index == dictionary.unk() and symbol != dictionary.unk_word:
        raise FastWeightError(f"--reset-at must be a symbol of the dictionary, got {symbol!r}")
    return index


def check_architecture(args) -> None:
    """Refuse a translation model, for which fairseq's language_modeling has no message."""
    name = getattr(args, "_name", None) or getattr(args, "arch", None)
    if name in ARCH_MODEL_REGISTRY and not issubclass(ARCH_MODEL_REGISTRY[name], FairseqLanguageModel):
        raise FastWeightError(
            f"{TASK} needs the architecture of a language model, as fast_weight_lm, got {name!r}"
        )


def check_model(model) -> None:
    """Refuse a model that has attention without a state."""
    if isinstance(model, CarriesStates) and model.has_states_only():
        return
    raise FastWeightError(
        f"{TASK}: softmax attention has no state to carry: use --arch fast_weight_lm with another --update-rule, "
        "or --task language_modeling"
    )


# --- small things


@contextlib.contextmanager
def instead_of_backward(optimizer, keep):
    """``optimizer.backward(loss)`` is ``keep(loss)``."""
    optimizer.backward = keep  # hides the method
    try:
        yield
    finally:
        del optimizer.backward


def own_rows(states: list, like) -> list:
    """The states of this rank's streams, from those of all."""
    return [
        None if state is None else tuple(streams_of_this_rank(x, like) for x in state) for state in states
    ]
