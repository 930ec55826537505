"""--criterion attention_distillation and --train-only attention: the first part of a converted model's training."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from commands import EVERYWHERE, load, run_logged
from conversions import KINDS, batch, convert, load_model, next_commands
from torch.nn.parallel import DistributedDataParallel

from fairseq_fastweights import FastWeightError
from fairseq_fastweights.criterions.attention_distillation import AttentionDistillation, bare

QUICK = (
    "--cpu --num-workers 0 --no-progress-bar --log-interval 1 --no-epoch-checkpoints --batch-size 8".split()
)
SITES = {"translation": ("decoder", "encoder", "cross"), "language_modeling": ("decoder",)}


@pytest.fixture(scope="module")
def converted(softmax_models, tmp_path_factory):
    """By task: the converted checkpoint, delta at every site, and the command that distils."""
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind) / "out.pt"
        flags = EVERYWHERE if kind == "translation" else ["--update-rule", "delta"]
        printed = convert(softmax_models[kind], out, *flags)
        found[kind] = SimpleNamespace(out=out, distil=next_commands(printed)[0])
    return found


def criterion(task, teacher, **options):
    defaults = {"sentence_avg": False, "label_smoothing": 0.1}
    return AttentionDistillation(task, **defaults, teacher=str(teacher), **options)


def train(command, save_dir, *flags):
    """The log of a command with more flags, the last of a kind counting."""
    return run_logged("train", *command, *QUICK, "--save-dir", save_dir, *map(str, flags))


def values(log, name):
    return [float(x) for x in re.findall(rf"\b{name}=([\d.e-]+)", log)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_every_layer_falls(converted, tmp_path, kind):
    log = train(converted[kind].distil, tmp_path, "--max-update", 30, "--lr", 0.02, "--disable-validation")
    for name in ("loss", "distill", *(f"distill_{site}_0" for site in SITES[kind])):
        found = values(log, name)
        assert len(found) >= 30 and sum(found[-5:]) < 0.8 * sum(found[:5]), (name, found)


@pytest.mark.parametrize("kind", KINDS)
def test_only_attention_is_trained_and_in_the_optimizer(converted, tmp_path, kind):
    # with the cross entropy, which alone has a gradient for the rest
    more = "--max-update 2 --disable-validation --cross-entropy-weight 1".split()
    train(converted[kind].distil, tmp_path, *more)
    before, state = load(converted[kind].out)["model"], load(tmp_path / "checkpoint_last.pt")
    after = state["model"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if "attn." in name}
    assert changed == attention
    moments = [x["exp_avg"].numel() for x in state["last_optimizer_state"]["state"].values()]
    assert sum(moments) == sum(after[name].numel() for name in attention)


def test_cross_entropy_trains_the_rest_too(converted, tmp_path):
    more = "--max-update 2 --disable-validation --cross-entropy-weight 0.5 --train-only all".split()
    log = train(converted["translation"].distil, tmp_path, *more)
    assert len(values(log, "nll_loss")) >= 2
    name = "decoder.layers.0.fc1.weight"
    before, after = (
        load(converted["translation"].out)["model"],
        load(tmp_path / "checkpoint_last.pt")["model"],
    )
    assert not torch.equal(before[name], after[name])


def test_cross_entropy_is_added_with_its_weight(softmax_models, converted):
    model, task = load_model(converted["translation"].out)
    sample, losses = batch(task), {}
    for weight in (0.0, 1.0, 3.0):
        loss, size, logged = criterion(task, softmax_models["translation"], cross_entropy_weight=weight)(
            model, sample
        )
        assert size == sample["ntokens"]
        losses[weight] = float(loss.detach())
        assert float(logged["distill"]) == pytest.approx(losses[0.0], rel=1e-5)
    entropy = losses[1.0] - losses[0.0]
    assert entropy > size  # above 1 nat a token
    assert losses[3.0] == pytest.approx(losses[0.0] + 3 * entropy, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_loss(converted, kind):
    model, task = load_model(converted[kind].out)
    found = criterion(task, converted[kind].out).distances(model, batch(task))
    assert sorted(found) == sorted(f"{site}_0" for site in SITES[kind])
    assert all(float(x) < 1e-9 for x in found.values())


def test_an_attention_that_answers_nothing_has_loss_1(softmax_models, converted):
    model, task = load_model(converted["translation"].out)
    for attention in (model.decoder.layers[0].self_attn, model.encoder.layers[0].self_attn):
        torch.nn.init.zeros_(attention.out_proj.weight)
        torch.nn.init.zeros_(attention.out_proj.bias)
    found = criterion(task, softmax_models["translation"]).distances(model, batch(task))
    assert float(found["decoder_0"]) == pytest.approx(1) and float(found["encoder_0"]) == pytest.approx(1)


def test_padding_does_not_count(softmax_models, converted):
    """The batch's loss is that of its sentences one by one, put together by the length of the teacher's answers."""
    model, task = load_model(converted["translation"].out)
    task.load_dataset("test")
    dataset = task.dataset("test")
    chosen = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["target"]))
    chosen = [chosen[0], chosen[-1]]
    judge = criterion(task, softmax_models["translation"])
    together = judge.distances(model, dataset.collater([dataset[i] for i in chosen]))
    apart, sizes = [], []
    for i in chosen:
        sample = dataset.collater([dataset[i]])
        apart.append(judge.distances(model, sample))
        calls = judge.ask_teacher(
            ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"],
            sample["net_input"],
            next(model.parameters()),
        )
        sites = ("encoder_0", "decoder_0", "cross_0")
        sizes.append({s: call.out.pow(2).sum() for s, call in zip(sites, calls.values(), strict=True)})
    for site, x in together.items():
        total = sum(size[site] for size in sizes)
        expected = sum(part[site] * size[site] for part, size in zip(apart, sizes, strict=True)) / total
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_neither_saved_nor_trained(softmax_models, converted):
    _, task = load_model(converted["translation"].out)
    judge = criterion(task, softmax_models["translation"])
    assert not list(judge.parameters()) and not judge.state_dict()
    assert not any(p.requires_grad for p in judge.teachers[0].parameters())


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_mistakes_are_one_line(softmax_models, converted, tmp_path):
    model, task = load_model(converted["translation"].out)
    stock, lm_task = load_model(softmax_models["language_modeling"])
    for options, words in (
        ({"teacher": ""}, ["--teacher"]),
        ({"teacher": tmp_path / "no.pt"}, ["no.pt"]),
        (
            {"teacher": softmax_models["translation"], "cross_entropy_weight": -1.0},
            ["--cross-entropy-weight", "-1"],
        ),
    ):
        with pytest.raises(FastWeightError) as error:
            criterion(task, **options)
        assert_one_line(error, *words)
    judge = criterion(lm_task, softmax_models["language_modeling"])
    with pytest.raises(FastWeightError) as error:
        judge.distances(stock, batch(lm_task))
    assert_one_line(error, "no fast-weight attention")
    model.decoder.layers.append(copy.deepcopy(model.decoder.layers[0]))
    with pytest.raises(FastWeightError) as error:
        criterion(task, softmax_models["translation"]).distances(model, batch(task))
    assert_one_line(error, "no attention decoder.layers.1.self_attn")


def test_a_teacher_with_other_dictionaries_is_one_line(softmax_models, converted):
    _, task = load_model(converted["translation"].out)
    task.tgt_dict.add_symbol("one more")
    with pytest.raises(FastWeightError) as error:
        criterion(task, softmax_models["translation"])
    assert_one_line(error, "dictionaries")


def test_pytorch_s_ddp_is_refused():
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapped)
    with pytest.raises(FastWeightError, match="legacy_ddp"):
        bare(wrapped)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--train-only attn", ["--train-only", "'attn'"]),
        ("--train-only attention --update-rule softmax", ["--train-only", "no fast-weight"]),
        ("--train-only attention --checkpoint-activations", ["--checkpoint-activations"]),
    ],
)
def test_train_only_mistakes(converted, tmp_path, flags, words):
    with pytest.raises(FastWeightError) as error:
        train(converted["language_modeling"].distil, tmp_path, *flags.split())
    assert_one_line(error, *words)
