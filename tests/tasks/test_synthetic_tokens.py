"""Multi-query recall and state tracking: what is asked for, and that language models train on it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairseq_fastweights.tasks.multi_query_recall import MultiQueryRecallTask
from fairseq_fastweights.tasks.state_tracking import StateTrackingTask

COMMON = dict(train_sequences=20, valid_sequences=10, seed=1, max_target_positions=None, add_bos_token=False)


def recall(**options):
    defaults = dict(COMMON, tokens_per_sample=48, num_pairs=6, num_words=40, gap_power=0.01)
    return MultiQueryRecallTask(SimpleNamespace(**{**defaults, **options}))


def tracking(**options):
    defaults = dict(COMMON, tokens_per_sample=12, num_items=4, swaps=False)
    return StateTrackingTask(SimpleNamespace(**{**defaults, **options}))


def rows(task, split="train"):
    """Tokens and labels of every sequence as words, None where nothing is asked."""
    task.load_dataset(split)
    dataset, words = task.dataset(split), task.dictionary
    sample = dataset.collater(list(range(len(dataset))))
    labels = sample["target"].tolist()
    assert sample["ntokens"] == sum(label != words.pad() for row in labels for label in row)
    for tokens, row in zip(sample["net_input"]["src_tokens"].tolist(), labels):
        yield [words[x] for x in tokens], [None if x == words.pad() else words[x] for x in row]


@pytest.mark.parametrize("gap_power", [0.01, 1.0])
def test_every_key_is_asked_for_once_and_its_value_is_wanted(gap_power):
    for tokens, labels in rows(recall(gap_power=gap_power)):
        pairs = dict(zip(tokens[0:12:2], tokens[1:12:2]))
        assert len(pairs) == 6 and not set(pairs) & set(pairs.values())
        asked = {token: label for token, label in zip(tokens, labels) if label is not None}
        assert asked == pairs and labels[:12] == [None] * 12
        assert sum(label is not None for label in labels) == 6


def test_queries_come_soon_or_anywhere():
    def mean_place(power):
        return np.mean(
            [[i for i, x in enumerate(labels) if x] for _, labels in rows(recall(gap_power=power))]
        )

    assert mean_place(0.01) + 3 < mean_place(1.0)


def apply(permutation: str, things):
    return [things[int(place)] for place in permutation]


@pytest.mark.parametrize("options", [{}, {"swaps": True}, {"num_items": 2}, {"num_items": 5}])
def test_labels_are_products(options):
    task = tracking(**options)
    for tokens, labels in rows(task):
        product = None
        for token, label in zip(tokens, labels):
            # label = token after product: i goes to token[product[i]]
            product = token if product is None else "".join(apply(product, token))
            assert label == product


def test_swaps_move_two_things_at_most():
    seen = {token for tokens, _ in rows(tracking(swaps=True)) for token in tokens}
    assert seen == {word for word in tracking().symbols() if sum(a != b for a, b in zip(word, "0123")) <= 2}


def test_parity():
    for tokens, labels in rows(tracking(num_items=2)):
        flips = np.cumsum([token == "10" for token in tokens]) % 2
        assert labels == ["10" if odd else "01" for odd in flips]


@pytest.mark.parametrize("make", [recall, tracking])
def test_splits_differ_and_are_repeatable(make):
    def tokens(split, seed=1):
        task = make(seed=seed)
        task.load_dataset(split)
        return task.dataset(split).tokens

    assert torch.equal(tokens("valid"), tokens("valid"))
    assert not torch.equal(tokens("valid"), tokens("test"))
    assert not torch.equal(tokens("train")[:10], tokens("valid"))
    assert not torch.equal(tokens("train"), tokens("train", seed=2))


@pytest.mark.parametrize(
    "make, options, message",
    [
        (
            recall,
            {"num_pairs": 13},
            "--num-pairs must be from 1 to a quarter of --tokens-per-sample .12., got 13",
        ),
        (recall, {"num_words": 11}, "--num-words must be at least twice --num-pairs .12., got 11"),
        (tracking, {"num_items": 7}, "--num-items must be from 2 to 6, got 7"),
    ],
)
def test_mistakes(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
