"""A text read in segments whose state is carried is the text read at once; and every token is read once, in order."""

import gc
import multiprocessing
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.tasks.stateful_language_modeling import (
    StatefulLanguageModelingConfig,
    StatefulLanguageModelingTask,
)
from fairseq_fastweights.tasks.text_streams import Segments, Text, cut_stream

RULES = [
    ("sum", "true"),
    ("sum", "false"),
    ("delta", "false"),
    ("delta", "true"),
    ("gated-sum", "true"),
    ("gated-delta", "false"),
    ("gated-sum-peng", "true"),
    ("delta-rnn", "false"),
    ("delta-lstm", "false"),
    ("recurrent-delta-net", "false"),
    ("delta-mlp", "false"),
    ("delta-delta-net", "false"),
]
NO_RESETS = np.zeros(0, np.int64)
WORDS = Dictionary()
for word in "abcdefgh":
    WORDS.add_symbol(word)
EOS, PAD = WORDS.eos(), WORDS.pad()


def text_of(tokens, seed=3) -> Text:
    """A random text of ``tokens`` tokens in sentences of 1 to 6, each with its eos."""
    random = np.random.default_rng(seed)
    sentences, left = [], tokens
    while left:
        size = min(left, int(random.integers(1, 7)))
        words = random.integers(WORDS.nspecial, len(WORDS), size - 1)
        sentences.append(torch.tensor([*words, EOS]))
        left -= size
    return Text(sentences, np.array([len(sentence) for sentence in sentences]))


def build_task(**options) -> StatefulLanguageModelingTask:
    config = OmegaConf.structured(StatefulLanguageModelingConfig)
    defaults = {"tokens_per_sample": 5, "sample_break_mode": "none", "update_freq": [1]}
    args = Namespace(**{name: config._get_node(name)._value() for name in config if name != "_name"})
    vars(args).update({**defaults, **options})
    return StatefulLanguageModelingTask(args, WORDS)


def model_args(**options):
    """Two layers of width 12 with 3 heads, no dropout, no positions."""
    config = OmegaConf.structured(MODEL_DATACLASS_REGISTRY["fast_weight_lm"])
    sizes = {"embed_dim": 12, "input_dim": 12, "output_dim": 12, "ffn_embed_dim": 8, "attention_heads": 3}
    given = {
        **{f"decoder_{name}": size for name, size in sizes.items()},
        "decoder_layers": 2,
        "dropout": 0.0,
        "no_token_positional_embeddings": True,
        "max_target_positions": 1024,
        "tokens_per_sample": 1024,
        "add_bos_token": False,
        "tpu": False,
        "_name": "fast_weight_lm",
        "feature_map": "softmax" if options.get("update_rule") == "recurrent-delta-net" else "elu",
        **options,
    }
    return OmegaConf.merge(config, given)


def build_model(task, **options):
    """In float64, with weights large enough that the past matters."""
    torch.manual_seed(5)
    model = task.build_model(model_args(**options))
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def batches(task, text, streams=1, epoch_itr=None):
    """All batches of an epoch, as fairseq's training asks for them."""
    return list(task.get_batch_iterator(text, max_sentences=streams).next_epoch_itr(shuffle=True))


def read_at_once(model, text):
    """Log-probabilities of the tokens of the text by one plain forward pass."""
    target = text.read(0, len(text))
    source = torch.cat([torch.tensor([EOS]), target[:-1]])[None]
    logits = model(source)[0][0]
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def read_in_segments(model, samples, text, streams=1):
    """The same through the batches, in the order of the text."""
    rows = [[] for _ in range(streams)]
    for sample in samples:
        target = sample["target"]
        logprobs = model(**sample["net_input"])[0].log_softmax(-1).gather(2, target[..., None])[..., 0]
        for b in range(streams):
            rows[b].append(logprobs[b][target[b] != PAD])
    return torch.cat([torch.cat(row) for row in rows])


def assert_close(result, expected, tolerance=1e-9):
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


# --- the text


@pytest.mark.parametrize(
    "tokens, streams, ranks, length", [(41, 4, 2, 5), (20, 4, 1, 5), (7, 3, 3, 9), (2, 4, 2, 3)]
)
def test_every_token_is_predicted_once_from_the_token_before_it(tokens, streams, ranks, length):
    text = text_of(tokens)
    segments = Segments(text, streams, length, EOS, PAD, NO_RESETS)
    sources, targets = [[] for _ in range(streams)], [[] for _ in range(streams)]
    for i, batch in enumerate(segments.batches(ranks)):
        sample = segments.collater([segments[index] for index in batch])
        source, target = sample["net_input"]["src_tokens"], sample["target"]
        assert sample["segment"] == i // ranks and sample["segments"] == segments.segments
        assert sample["ntokens"] == int((target != PAD).sum()) and sample["nsentences"] == streams // ranks
        assert ((source == PAD) == (target == PAD)).all() and target.shape[1] <= length
        for row in range(streams // ranks):
            stream = i % ranks * (streams // ranks) + row
            size = int(sample["net_input"]["src_lengths"][row])
            assert (target[row, size:] == PAD).all()
            assert bool(sample["net_input"]["stream_start"][row]) == (i < ranks)
            sources[stream] += source[row, :size].tolist()
            targets[stream] += target[row, :size].tolist()
    sizes = [len(target) for target in targets]
    assert max(sizes) - min(sizes) <= 1
    whole = text.read(0, len(text)).tolist()
    assert sum(targets, []) == whole
    assert sum(sources, []) == [EOS, *whole[:-1]]


def test_segments_end_at_resets():
    edges, begins_anew = cut_stream(10, 30, np.array([3, 10, 12, 19, 30]), 4)
    assert edges.tolist() == [10, 12, 16, 19, 23, 27, 30]
    assert begins_anew.tolist() == [True, True, False, True, False, False]


def test_places_behind_a_symbol_do_not_depend_on_how_much_is_scanned_at_once(monkeypatch):
    text = text_of(50)
    whole = text.read(0, 50).tolist()
    monkeypatch.setattr("fairseq_fastweights.tasks.text_streams.SCANNED_AT_ONCE", 7)
    assert text.after_every(EOS).tolist() == [i + 1 for i, token in enumerate(whole) if token == EOS]


# --- the state


@pytest.mark.parametrize("rule, normalized", RULES)
def test_any_segment_length_gives_what_one_pass_gives(rule, normalized):
    text = text_of(90)
    model = build_model(build_task(), update_rule=rule, attention_normalization=normalized)
    with torch.no_grad():
        expected = read_at_once(model, text)
        assert not torch.allclose(expected, read_at_once(model.train(), text_of(90, seed=4)))
        model.eval()
        for length in (1, 7, 64, 90):
            samples = batches(build_task(tokens_per_sample=length), text)
            assert_close(read_in_segments(model, samples, text), expected)


@pytest.mark.parametrize("rule, normalized", RULES)
def test_streams_are_independent_and_begin_anew_in_every_epoch(rule, normalized):
    text = text_of(34)  # streams of 12, 11 and 11 tokens
    model = build_model(build_task(), update_rule=rule, attention_normalization=normalized)
    samples = batches(build_task(), text, streams=3)
    before = torch.cat([torch.tensor([EOS]), text.read(0, 34)])
    with torch.no_grad():
        expected = []
        for start, end in ((0, 12), (12, 23), (23, 34)):
            target = before[start + 1 : end + 1]
            logits = model(before[None, start:end])[0][0]
            expected.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
        for _ in range(2):
            assert_close(read_in_segments(model, samples, text, streams=3), torch.cat(expected))


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("rule, normalized", RULES)
def test_where_all_streams_have_ended_nothing_is_read_and_no_state_moves(rule, normalized, positions):
    options = {"attention_normalization": normalized, "no_token_positional_embeddings": not positions}
    model = build_model(build_task(), update_rule=rule, **options)
    segments = Segments(text_of(6), 4, 2, EOS, PAD, NO_RESETS)  # streams of 2, 2, 1 and 1 tokens
    segments.segments = 2  # as if another rank had more
    began, ended = (segments.collater([segments[i] for i in batch]) for batch in segments.batches(1))
    assert ended["ntokens"] == 0 and not ended["net_input"]["stream_start"].any()
    model.train()
    model(**began["net_input"])
    before = [x.clone() for state in model.carried_states() for x in state if x is not None]
    model(**ended["net_input"])[0].sum().backward()
    after = [x for state in model.carried_states() for x in state if x is not None]
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rule, normalized", [("delta", "true"), ("gated-sum", "true")])
@pytest.mark.parametrize("streams", [1, 2])
def test_reset_at_reads_separate_texts(rule, normalized, streams):
    text = text_of(40)
    model = build_model(build_task(), update_rule=rule, attention_normalization=normalized)
    samples = batches(build_task(reset_at="</s>", tokens_per_sample=3), text, streams)
    with torch.no_grad():
        expected = []
        for sentence in text.sentences:
            expected.append(read_at_once(model, Text([sentence], np.array([len(sentence)]))))
        expected = torch.cat(expected)
        result = read_in_segments(model, samples, text, streams)
    # a sentence that is cut between two streams is another text in the second
    cut = text.ends[np.searchsorted(text.ends, 20)]
    assert (cut > 20) and len(result) == 40
    keep = torch.ones(40, dtype=torch.bool)
    keep[20:cut] = streams == 1
    assert_close(result[keep], expected[keep])


def test_training_and_evaluation_have_states_of_their_own():
    text = text_of(30)
    model = build_model(build_task(), update_rule="delta", attention_normalization="true")
    samples = batches(build_task(tokens_per_sample=6), text)
    expected = read_at_once(model, text).detach()
    other = batches(build_task(tokens_per_sample=6), text_of(30, seed=8), streams=2)
    result = []
    for i, sample in enumerate(samples):
        result.append(read_in_segments(model.train(), [sample], text).detach())
        with torch.no_grad():
            model.eval()(**other[i % len(other)]["net_input"])
    assert_close(torch.cat(result), expected)


def test_without_stream_start_nothing_is_carried():
    text = text_of(12)
    model = build_model(build_task(), update_rule="delta")
    source = torch.cat([torch.tensor([EOS]), text.read(0, 11)])[None]
    with torch.no_grad():
        expected = model.decoder(source)[0]
        for reads in (model, model.decoder):
            read_in_segments(model, batches(build_task(), text_of(30, seed=8)), text)
            assert_close(reads(source)[0], expected)


def test_other_rows_are_refused_unless_they_begin_anew():
    model = build_model(build_task(), update_rule="delta")
    tokens = torch.full((3, 2), WORDS.nspecial)
    model(tokens[:2], stream_start=torch.tensor([True, True]))
    with pytest.raises(FastWeightError, match="2 streams are carried, the batch has 3 rows"):
        model(tokens, stream_start=torch.tensor([True, False, True]))
    model(tokens, stream_start=torch.tensor([True, True, True]))


def test_the_state_of_a_model_in_half_precision_is_float32():
    model = build_model(build_task(), update_rule="delta", attention_normalization="true").bfloat16()
    model.train()(torch.full((1, 4), WORDS.nspecial), stream_start=torch.tensor([True]))
    for state in model.carried_states():
        assert [x.dtype for x in state] == [torch.float32, torch.float32]
    assert len(model.carried_states()) == 2


# --- gradients


class Sgd:
    """Stands in for fairseq's optimizer."""

    def __init__(self):
        self.backwards = 0

    def backward(self, loss):
        self.backwards += 1
        loss.backward()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_epoch(task, model, samples):
    """Gradients of every update of an epoch, as fairseq's trainer asks for them; no step is taken."""
    criterion = CrossEntropyCriterion(task, sentence_avg=False)
    task.begin_epoch(1, model)
    frequency = task.args.update_freq[0]
    updates = []
    for i in range(0, len(samples), frequency):
        model.zero_grad()
        optimizer = Sgd()
        for sample in samples[i : i + frequency]:
            task.train_step(sample, model, criterion, optimizer, 0)
        updates.append((gradients(model), optimizer.backwards))
    return updates


@pytest.mark.parametrize("rule, normalized", RULES)
def test_state_gradient_is_that_of_one_long_segment(rule, normalized):
    text = text_of(50)  # ten segments: updates of 4, 4 and 2
    options = {"update_rule": rule, "attention_normalization": normalized}
    task = build_task(state_gradient=True, update_freq=[4])
    model = build_model(task, **options)
    updates = train_epoch(task, model, batches(task, text))
    long_task = build_task(tokens_per_sample=20)
    expected = train_epoch(long_task, build_model(long_task, **options), batches(long_task, text))
    assert [backwards for _, backwards in updates] == [1, 1, 1]
    assert len(expected) == 3
    for (result, _), (truth, _) in zip(updates, expected, strict=True):
        assert result.keys() == truth.keys()
        for name in truth:
            assert_close(result[name], truth[name], 1e-6)  # the criterion's softmax is in float32


def test_without_state_gradient_it_ends_at_the_segment():
    text = text_of(20)
    task, long_task = build_task(update_freq=[4]), build_task(tokens_per_sample=20)
    ((result, backwards),) = train_epoch(task, build_model(task), batches(task, text))
    ((truth, _),) = train_epoch(long_task, build_model(long_task), batches(long_task, text))
    assert backwards == 4
    name = "decoder.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(result[name], truth[name], rtol=1e-2)


@pytest.mark.parametrize("length", [1, 5])
def test_activation_checkpointing_reads_the_same_segment_again(length):
    text = text_of(20)
    found = []
    for options in ({}, {"checkpoint_activations": True}):
        task = build_task(tokens_per_sample=length)
        model = build_model(task, attention_normalization="true", **options)
        found.append(train_epoch(task, model, batches(task, text, streams=2)))
    for (plain, _), (checkpointed, _) in zip(*found, strict=True):
        for name in plain:
            assert_close(checkpointed[name], plain[name])


@pytest.mark.parametrize("state_gradient", [False, True])
def test_an_update_that_is_read_again_starts_from_the_same_states(state_gradient):
    """As fairseq does after an overflow under --amp."""
    text = text_of(40)
    task = build_task(update_freq=[2], state_gradient=state_gradient)
    model, criterion = build_model(task), CrossEntropyCriterion(task, sentence_avg=False)
    samples = batches(task, text)
    task.begin_epoch(1, model)
    losses = []
    for i in (0, 1, 2, 3, 2, 3):
        losses.append(float(task.train_step(samples[i], model, criterion, Sgd(), 0)[0]))
    assert losses[2:4] == losses[4:6]
    expected = float(-read_at_once(model, text)[15:20].sum())
    assert losses[3] == pytest.approx(expected, abs=1e-5)  # the criterion's softmax is in float32


def test_updates_are_counted_from_where_a_process_began():
    task = build_task(update_freq=[3, 2])
    task.begin_epoch(1, None)

    def places(segments):
        return [task._place_in_update({"segment": s, "segments": 8}) for s in segments]

    assert places(range(2, 8)) == [(True, False), (False, False), (False, True)] * 2
    task.begin_epoch(2, None)
    assert places(range(8)) == [(True, False), (False, True)] * 4
    task.begin_epoch(7, None)
    assert places(range(3, 8)) == [(True, False), (False, True)] * 2 + [(True, True)]


# --- refusals

REFUSED_OPTIONS = {
    "sample-break-mode must be none": {"sample_break_mode": "complete"},
    "drop --add-bos-token True": {"add_bos_token": True},
    "drop --past-target True": {"past_target": True},
    "drop --shorten-method truncate": {"shorten_method": "truncate"},
    "tokens-per-sample must be at least 1": {"tokens_per_sample": 0},
    "reset-at must be a symbol of the dictionary, got 'zz'": {"reset_at": "zz"},
}


@pytest.mark.parametrize("message", REFUSED_OPTIONS)
def test_options_that_make_no_sense_are_refused(message):
    with pytest.raises(FastWeightError, match=message):
        build_task(**REFUSED_OPTIONS[message])


FAVOR = {"feature_map": "favor", "favor_features": 4}
REFUSED_MODELS = {
    "softmax attention has no state": ({}, {"update_rule": "softmax"}),
    "favor-redraw-interval must be 0, got 1": ({}, FAVOR),
    "needs --update-freq of at least 2": ({"state_gradient": True}, {}),
    "eos is for generation": ({"sample_break_mode": "eos"}, {}),
    "exclude each other": (
        {"state_gradient": True, "update_freq": [2]},
        {"checkpoint_activations": True},
    ),
}


@pytest.mark.parametrize("message", REFUSED_MODELS)
def test_models_that_cannot_be_trained_so_are_refused(message):
    options, model_options = REFUSED_MODELS[message]
    with pytest.raises(FastWeightError, match=message):
        build_task(**options).build_model(model_args(**model_options))


def test_favor_is_fine_with_fixed_directions_and_for_evaluation():
    build_task().build_model(model_args(**FAVOR, favor_redraw_interval=0))
    build_task().build_model(model_args(**FAVOR), from_checkpoint=True)


REFUSED_BATCHES = {
    "--max-tokens does not": {"max_tokens": 100},
    "drop --skip-remainder-batch": {"max_sentences": 2, "skip_remainder_batch": True},
    "drop --skip-remainder-batch and --grouped-shuffling": {"max_sentences": 2, "grouped_shuffling": True},
}


@pytest.mark.parametrize("message", REFUSED_BATCHES)
def test_batches_that_make_no_sense_are_refused(message):
    with pytest.raises(FastWeightError, match=message):
        build_task().get_batch_iterator(text_of(30), **REFUSED_BATCHES[message])


def test_evaluation_reads_one_stream_and_does_not_ignore_max_tokens():
    (sample, *_) = build_task().eval_lm_dataloader(text_of(30), max_tokens=36000)
    assert sample["target"].shape == (1, 5)
    with pytest.raises(
        FastWeightError, match="--batch-size gives the number of streams, --max-tokens does not"
    ):
        build_task().eval_lm_dataloader(text_of(30), max_tokens=512)


def test_a_context_window_is_refused():
    with pytest.raises(FastWeightError, match="--context-window must be 0, got 8"):
        build_task().eval_lm_dataloader(text_of(30), context_window=8)


@pytest.mark.parametrize("length", [16, 17])
def test_segments_fit_the_positions_of_the_model(length):
    task = build_task(tokens_per_sample=length)
    positions = {"no_token_positional_embeddings": False, "decoder_learned_pos": True}
    task.build_model(model_args(**positions, max_target_positions=16, tokens_per_sample=16))
    refused = pytest.raises(FastWeightError, match="at most the model's 16 positions, got 17")
    with refused if length > 16 else nullcontext():
        batches(task, text_of(30))


def test_workers_end_with_their_epoch():
    """Not when Python's garbage collector finds their loader, which then waits 5 seconds for each."""
    gc.disable()
    try:
        batches = build_task().get_batch_iterator(text_of(30), num_workers=1, data_buffer_size=2)
        assert len(list(batches.next_epoch_itr())) == 6
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.join(timeout=10)
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
