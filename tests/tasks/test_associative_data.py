"""The questions of the associative-retrieval task."""

from types import SimpleNamespace

import numpy as np
import pytest

from fairseq_fastweights.tasks.associative_retrieval import Stream, last_positions


def stream(**options):
    defaults = dict(
        setting=2, num_keys=12, seed=1, batch_size=4, eval_interval=25, eval_sequences=5, eval_queries=200
    )
    return Stream(SimpleNamespace(**{**defaults, **options}))


def questions(dataset):
    """(keys, values, key asked for, answer) of every question."""
    sample = dataset.collater(list(range(len(dataset))))
    inputs = sample["net_input"]
    columns = (inputs["keys"], inputs["values"], inputs["query"], sample["target"])
    return zip(*(column.tolist() for column in columns))


@pytest.mark.parametrize("setting", [1, 2])
def test_the_answer_is_the_last_value_of_the_key(setting):
    drawn = stream(setting=setting)
    drawn.advance()
    for dataset in (drawn.training, drawn.evaluation):
        for keys, values, query, answer in questions(dataset):
            assert dict(zip(keys, values))[query] == answer


def test_capacity_has_every_key_and_value_once():
    drawn = stream(setting=1)
    drawn.advance()
    for keys, values, _, _ in [*questions(drawn.training), *questions(drawn.evaluation)]:
        assert sorted(keys) == sorted(values) == list(range(12))


def test_overwriting_is_twice_as_long_in_training_only():
    drawn = stream(setting=2)
    drawn.advance()
    assert drawn.training.keys.shape == (100, 24)
    assert drawn.evaluation.keys.shape == (5, 12)
    assert all(len(set(keys)) < 24 for keys, _, _, _ in questions(drawn.training))


def test_evaluation_asks_for_every_key_once_and_batches_hold_one_sequence():
    drawn = stream(eval_queries=7)
    drawn.advance()
    dataset = drawn.evaluation
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_sentences=4)
    assert np.array_equal(np.concatenate(batches), np.arange(len(dataset)))
    for batch in batches:
        assert len(batch) <= 4 and len(set(dataset.asked_of[batch])) == 1
    for row, keys in enumerate(dataset.keys):
        asked = keys[dataset.asked[dataset.asked_of == row]].tolist()
        assert asked == sorted(set(keys.tolist()))[:7]


def test_training_batches_are_full():
    drawn = stream()
    drawn.advance()
    batches = drawn.training.batch_by_size(drawn.training.ordered_indices(), max_sentences=4)
    assert [len(batch) for batch in batches] == [4] * 25


def test_last_positions():
    assert last_positions(np.array([3, 1, 3, 0, 1, 1])).tolist() == [3, 5, 2]


def test_epochs_differ_and_a_seed_is_repeatable():
    one, other = stream(), stream()
    for drawn in (one, other):
        drawn.advance()
    first = one.training.keys.copy()
    assert np.array_equal(first, other.training.keys)
    one.advance()
    assert not np.array_equal(first, one.training.keys)
    assert not np.array_equal(first, stream_after(seed=2).training.keys)


def stream_after(**options):
    drawn = stream(**options)
    drawn.advance()
    return drawn
