"""From a checkpoint and a text to what its fast-weight heads do with it."""

from pathlib import Path
from typing import Iterable, List, NamedTuple, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoderDecoderModel
from torch import Tensor, nn

from ..errors import FastWeightError
from ..modules import FastWeightAttention
from .record import SITES, Recording, recording

FLAGS = {"decoder": "--update-rule", "encoder": "--update-rule-encoder", "cross": "--update-rule-cross"}


class Sentence(NamedTuple):
    """ids (T,), their labels, and the words that the dictionary lacks."""

    ids: Tensor
    labels: List[str]
    unknown: List[str]


def load(checkpoint: str, data: Optional[str] = None) -> Tuple[nn.Module, object]:
    """(model in float64, task) of a checkpoint; ``data`` is the folder of its dictionaries, if that has moved.

    Raises:
        FastWeightError (a ValueError): no checkpoint, no dictionary, or no fast weights in it.
    """
    overrides = {} if data is None else {"data": data}
    try:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], overrides)
    except FastWeightError:
        raise
    except FileNotFoundError as error:
        raise FastWeightError(
            f"no dictionary, there is no {error.filename}: give --data FOLDER, where fairseq-preprocess wrote it"
        ) from error
    except Exception as error:
        if "infer language pair" not in str(error):  # fairseq's own class is Exception
            raise
        raise FastWeightError(
            "the languages are read from the names of the training data, and there is no file SPLIT.SRC-TGT.* in its "
            "folder: give --data FOLDER, where fairseq-preprocess wrote them"
        ) from error
    model = models[0].double().eval()
    attentions = _attentions(model)
    if not attentions:
        raise FastWeightError(
            f"{checkpoint} has no fast-weight attention ({type(model).__name__}, softmax at every site): there is "
            "nothing to inspect"
        )
    for attention in attentions:
        attention.backend = "reference"  # one sentence: nothing to compile, and no GPU needed
    return model, task


def _attentions(model: nn.Module) -> List[FastWeightAttention]:
    return [module for module in model.modules() if isinstance(module, FastWeightAttention)]


def words_of(text: str, sentencepiece_model: Optional[str] = None) -> List[str]:
    """The pieces of a sentencepiece model, or else what spaces separate."""
    if sentencepiece_model is None:
        return text.split()
    import sentencepiece

    if not Path(sentencepiece_model).is_file():
        raise FastWeightError(f"--sentencepiece-model: there is no file {sentencepiece_model}")
    return sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model).encode(text, out_type=str)


def encode(words: List[str], dictionary: Dictionary) -> Sentence:
    """The words as the dictionary numbers them; one that it lacks is labelled as unknown."""
    ids = [dictionary.index(word) for word in words]
    lacking = [n == dictionary.unk() and word != dictionary.unk_word for n, word in zip(ids, words)]
    labels = [f"{dictionary.unk_word} {word}" if lack else word for word, lack in zip(words, lacking)]
    return Sentence(torch.tensor(ids), labels, [word for word, lack in zip(words, lacking) if lack])


def with_symbol(sentence: Sentence, number: int, dictionary: Dictionary, first: bool) -> Sentence:
    """The sentence with a special symbol before or behind it."""
    symbol = Sentence(torch.tensor([number]), [dictionary[number]], [])
    one, other = (symbol, sentence) if first else (sentence, symbol)
    return Sentence(torch.cat([one.ids, other.ids]), one.labels + other.labels, sentence.unknown)


class Inspected(NamedTuple):
    """The recordings of one sentence, the tokens as the decoder and the encoder saw them (None: no encoder)."""

    recordings: List[Recording]
    target: Sentence
    source: Optional[Sentence]

    def written(self, site: str) -> List[str]:
        """Labels of the tokens that the heads of ``site`` write: the columns of the weights."""
        return self.target.labels if site == "decoder" else self.source.labels

    def reading(self, site: str) -> List[str]:
        """Labels of the tokens that read: the rows of the weights."""
        return self.source.labels if site == "encoder" else self.target.labels


def inspect_text(model: nn.Module, task, words: List[str], source: Optional[List[str]] = None) -> Inspected:
    """One forward pass over a target text (and the source of a translation), as in training.

    The decoder begins with the end-of-sentence symbol (or <s>, with --add-bos-token) and reads every word of the text;
    the source ends with the end-of-sentence symbol.

    Raises:
        FastWeightError (a ValueError): the source is missing or not wanted, or a text is empty or too long.
    """
    translates = isinstance(model, FairseqEncoderDecoderModel)
    if translates and source is None:
        raise FastWeightError(
            "this is a translation model: give the sentence that --text translates as --source"
        )
    if not translates and source is not None:
        raise FastWeightError("this is a language model, which has no --source: drop it")
    dictionary = task.target_dictionary if translates else task.source_dictionary
    begins = dictionary.bos() if _begins_with_bos(task) else dictionary.eos()
    target = with_symbol(encode(words, dictionary), begins, dictionary, first=True)
    read: Optional[Sentence] = None
    inputs = [target.ids[None]]
    if translates:
        dictionary = task.source_dictionary
        read = with_symbol(encode(source, dictionary), dictionary.eos(), dictionary, first=False)
        inputs = [read.ids[None], torch.tensor([len(read.ids)]), *inputs]
    _check_lengths(model, target, read)
    with torch.no_grad(), recording(model) as recordings:
        model(*inputs)
    return Inspected(recordings, target, read)


def _begins_with_bos(task) -> bool:
    options = getattr(task, "cfg", None) or getattr(task, "args", None)
    return bool(getattr(options, "add_bos_token", False))


def _check_lengths(model: nn.Module, target: Sentence, source: Optional[Sentence]) -> None:
    longest = model.max_positions()
    limits = longest if isinstance(longest, tuple) else (longest,)
    flags = ("--source", "--text") if source is not None else ("--text",)
    sentences = (source, target) if source is not None else (target,)
    for flag, sentence, limit in zip(flags, sentences, limits):
        if len(sentence.ids) < 2:
            raise FastWeightError(f"{flag} is empty: give at least one word")
        if limit is not None and len(sentence.ids) > limit:
            raise FastWeightError(
                f"{flag} has {len(sentence.ids)} tokens and the model takes {limit} at most: shorten it"
            )


def choose(
    recordings: List[Recording], sites: Optional[Iterable[str]] = None, layers: Optional[Iterable[int]] = None
) -> List[Recording]:
    """The recordings of these sites and layers (None: of all).

    Raises:
        FastWeightError (a ValueError): a site has no fast weights, or there is no such layer.
    """
    found = [site for site in SITES if any(r.site == site for r in recordings)]
    for site in sites or ():
        if site not in found:
            raise FastWeightError(
                f"--site {site} has no fast weights in this checkpoint ({FLAGS[site]} is softmax there, or the "
                f"model has no such attention); those with fast weights: {', '.join(found)}"
            )
    chosen = [r for r in recordings if sites is None or r.site in sites]
    numbers = sorted({r.layer for r in chosen})
    for layer in layers or ():
        if layer not in numbers:
            raise FastWeightError(f"--layers must be among {_listed(numbers)}, got {layer}")
    return [r for r in chosen if layers is None or r.layer in layers]


def choose_heads(recording: Recording, heads: Optional[Iterable[int]] = None) -> List[int]:
    """The heads asked for, or all; FastWeightError (a ValueError) if one does not exist."""
    for head in heads or ():
        if not 0 <= head < recording.heads:
            raise FastWeightError(
                f"--heads must be from 0 to {recording.heads - 1} at {recording.name}, got {head}"
            )
    return sorted(set(heads)) if heads is not None else list(range(recording.heads))


def _listed(numbers: List[int]) -> str:
    return ", ".join(map(str, numbers))
