"""fastweights-convert: old and new checkpoints of fairseq's softmax models become ours, and training goes on."""

import argparse
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from commands import EVERYWHERE, PACKAGE, hypotheses, load, run, run_logged
from conversions import KINDS, batch, convert, load_model, next_commands, train_softmax

from fairseq_fastweights import FastWeightError

SOFTMAX = "--update-rule softmax --update-rule-encoder softmax --update-rule-cross softmax".split()
ALL = {"translation": EVERYWHERE, "language_modeling": ["--update-rule", "delta"]}


def logits(checkpoint):
    model, task = load_model(checkpoint)
    with torch.no_grad():
        return model(**batch(task)["net_input"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_everywhere_is_the_same_model_to_the_bit(softmax_models, tmp_path, kind):
    convert(softmax_models[kind], tmp_path / "out.pt", *SOFTMAX)
    model, _ = load_model(tmp_path / "out.pt")
    assert type(model).__name__.startswith("FastWeight")
    assert torch.equal(logits(tmp_path / "out.pt"), logits(softmax_models[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_fits_is_kept(softmax_models, tmp_path, kind):
    printed = convert(softmax_models[kind], tmp_path / "out.pt", *ALL[kind])
    old, new = load(softmax_models[kind])["model"], load(tmp_path / "out.pt")["model"]
    made = set(new) - set(old)
    assert made and all(name.endswith("rule.beta_proj.weight") for name in made)
    assert set(old) <= set(new)
    factors = {"q_proj": 8**0.25, "k_proj": 8**0.25, "v_proj": 2 * 8**0.5}  # heads of 8
    for name, x in old.items():
        factor = next((f for part, f in factors.items() if part in name), 1.0)
        if factor == 1:
            assert torch.equal(new[name], x), name
        else:
            torch.testing.assert_close(new[name], x * factor)
    counts = dict(
        re.findall(r"^(kept|made new|dropped): \d+ tensors, ([\d,]+) numbers", printed, re.MULTILINE)
    )
    numbers = {name: int(count.replace(",", "")) for name, count in counts.items()}
    # --share-decoder-input-output-embed: once under two names
    shared = old["decoder.output_projection.weight"] if kind == "translation" else torch.empty(0)
    assert numbers["kept"] == sum(x.numel() for x in old.values()) - shared.numel()
    assert numbers["made new"] == sum(new[name].numel() for name in made)
    assert numbers["dropped"] == 0
    assert re.search(r"the optimizer's state \([\d,]+ numbers\)", printed)


def test_biases_are_dropped_where_the_new_attention_has_none(softmax_models, tmp_path):
    printed = convert(softmax_models["language_modeling"], tmp_path / "out.pt", "--no-projection-bias")
    assert "dropped: 4 tensors, 64 numbers" in printed
    assert re.search(r"dropped.*\n(.*self_attn.*bias.*\n){4}", printed)
    assert torch.isfinite(logits(tmp_path / "out.pt")).all()


def test_other_sites_are_left_alone(softmax_models, tmp_path):
    convert(softmax_models["translation"], tmp_path / "out.pt", "--update-rule", "sum")
    old, new = load(softmax_models["translation"])["model"], load(tmp_path / "out.pt")["model"]
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith("decoder.layers.0.self_attn.") for name in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_commands_go_on(softmax_models, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    printed = convert(softmax_models[kind], "out.pt", *ALL[kind])
    common = "--max-update 2 --cpu --num-workers 0 --no-progress-bar --required-batch-size-multiple 1".split()
    distil, train = next_commands(printed)
    assert (
        "--decoder-layers" in train and "--activation-fn" not in train
    )  # what differs from the architecture alone
    assert train[train.index("--max-update") + 1] == "3"  # a tenth of 30
    assert "--update-freq" not in train and "--fp16" not in train
    assert "loading pretrained model from out.pt" in run_logged("train", *distil, *common)
    log = run_logged("train", *train, *common)
    assert "loading pretrained model from out-distilled/checkpoint_best.pt" in log
    first, last = (
        load("out-distilled/checkpoint_best.pt")["model"],
        load("out-trained/checkpoint_last.pt")["model"],
    )
    name = "decoder.layers.0.fc1.weight"
    assert torch.equal(first[name], load(softmax_models[kind])["model"][name])
    assert not torch.equal(last[name], first[name])


def test_the_printed_commands_have_batches_as_large(softmax_models, tmp_path):
    """8 GPUs and 2 steps an update, in float16: 16 steps of one process."""
    state = load(softmax_models["translation"])
    state["cfg"]["optimization"]["update_freq"] = [2]
    state["cfg"]["distributed_training"]["distributed_world_size"] = 8
    state["cfg"]["common"]["fp16"] = True
    torch.save(state, tmp_path / "in.pt")
    for command in next_commands(convert(tmp_path / "in.pt", tmp_path / "out.pt")):
        assert command[command.index("--update-freq") + 1] == "16" and "--fp16" in command


VARIANTS = {
    "transformer_wmt_en_de_big_t2t": ("translation", "--activation-fn gelu"),
    "transformer": ("translation", "--encoder-learned-pos --decoder-normalize-before"),
    "transformer_lm_gpt2_tiny": ("language_modeling", ""),
    "transformer_lm_baevski_wiki103": (
        "language_modeling",
        "--adaptive-input-cutoff 5,9 --adaptive-softmax-cutoff 5,9 --decoder-input-dim 16 --decoder-output-dim 16 "
        "--criterion adaptive_loss --ddp-backend legacy_ddp",
    ),
    "fast_weight_transformer_tiny": ("translation", " ".join(SOFTMAX)),
    "fast_weight_lm_tiny": ("language_modeling", "--update-rule softmax"),
    "fast_weight_lm_wt103_small": (
        "language_modeling",
        "--update-rule softmax --adaptive-input-cutoff 5,9 --adaptive-softmax-cutoff 5,9 --decoder-input-dim 16 "
        "--decoder-output-dim 16 --criterion adaptive_loss --ddp-backend legacy_ddp",
    ),
}


@pytest.mark.parametrize("arch", VARIANTS)
def test_variants_of_the_architectures(data, tmp_path, monkeypatch, arch):
    """The options that the name of an architecture stands for reach the converted model and the command."""
    kind, flags = VARIANTS[arch]
    monkeypatch.chdir(tmp_path)
    softmax = train_softmax(kind, data, tmp_path, "--arch", arch, *flags.split(), "--max-update", 1)
    printed = convert(softmax, "out.pt", *SOFTMAX)
    model, task = load_model("out.pt")
    old, _ = load_model(softmax)
    sample = batch(task)
    with torch.no_grad():
        features = [m(**sample["net_input"], features_only=True)[0] for m in (model, old)]
    assert torch.equal(*features)
    if kind == "language_modeling":
        convert(softmax, "delta.pt", "--update-rule", "delta")
        assert torch.isfinite(load_model("delta.pt")[0](**sample["net_input"], features_only=True)[0]).all()
    _, train = next_commands(printed)
    train[train.index("--finetune-from-model") + 1] = "out.pt"
    log = run_logged("train", *train, "--max-update", 1, "--cpu", "--num-workers", 0, "--disable-validation")
    assert "Loaded checkpoint out.pt" in log


def test_restore_file_without_the_optimizer(softmax_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distil, _ = next_commands(convert(softmax_models["language_modeling"], "out.pt"))
    start = distil.index("--finetune-from-model")
    distil[start : start + 2] = ["--restore-file", "out.pt", "--reset-optimizer", "--reset-lr-scheduler"]
    more = (
        "--reset-meters --reset-dataloader --max-update 1 --cpu --num-workers 0 --disable-validation".split()
    )
    assert "Loaded checkpoint out.pt" in run_logged("train", *distil, *more)


def test_a_converted_translation_model_generates(data, softmax_models, tmp_path):
    convert(softmax_models["translation"], tmp_path / "out.pt", *EVERYWHERE)
    flags = "--beam 2 --max-len-b 6 --max-len-a 0 --num-workers 0 --cpu".split()
    out = run("generate", data.pairs, "--path", tmp_path / "out.pt", "--user-dir", PACKAGE, *flags)
    assert sorted(hypotheses(out)) == list(range(21))


def test_a_converted_language_model_is_evaluated(data, softmax_models, tmp_path):
    convert(
        softmax_models["language_modeling"],
        tmp_path / "out.pt",
        "--feature-map",
        "favor",
        "--favor-features",
        6,
    )
    flags = "--tokens-per-sample 16 --batch-size 4 --num-workers 0 --cpu".split()
    log = run_logged("eval_lm", data.words, "--path", tmp_path / "out.pt", "--user-dir", PACKAGE, *flags)
    assert 1 < float(re.search(r"Perplexity: ([\d.]+)", log)[1]) < 40


def test_what_is_made_new_depends_on_the_seed_alone(softmax_models, tmp_path):
    flags = ["--feature-map", "favor", "--favor-features", 6]
    models = []
    for n, seed in enumerate((1, 1, 2)):
        convert(softmax_models["language_modeling"], tmp_path / f"{n}.pt", *flags, "--seed", seed)
        models.append(
            load(tmp_path / f"{n}.pt")["model"]["decoder.layers.0.self_attn.feature_map.projection"]
        )
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def as_written_long_ago(checkpoint: Path, out: Path) -> Path:
    """The same model in the layout of older fairseqs: args, joined q, k and v, numbered norms, fused copies."""
    state = load(checkpoint)
    state["args"] = argparse.Namespace(**vars(state["cfg"]["model"]))
    state["args"].task = "translation"
    state["cfg"] = None
    old = state["model"]
    for place in {name.rpartition(".q_proj")[0] for name in old if name.endswith("q_proj.weight")}:
        for kind in ("weight", "bias"):
            joined = [old.pop(f"{place}.{x}_proj.{kind}") for x in "qkv"]
            old[f"{place}.in_proj_{kind}"] = torch.cat(joined)
    norms = {
        "encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    }
    for side, names in norms.items():
        for n, name in enumerate(names):
            for kind in ("weight", "bias"):
                new = f"{side}.layers.0.{name}.{kind}"
                old[f"{side}.layers.0.layer_norms.{n}.{kind}"] = old.pop(new)
        old[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
    old["encoder.layers.0.in_proj_weight"] = old["encoder.layers.0.self_attn.in_proj_weight"]
    old["encoder.layers.0.fc1_weight"] = old["encoder.layers.0.fc1.weight"]
    torch.save(state, out)
    return out


@pytest.mark.parametrize("flags", [SOFTMAX, EVERYWHERE], ids=["softmax", "delta"])
def test_an_old_checkpoint_is_converted_as_a_new_one(softmax_models, tmp_path, flags):
    new = softmax_models["translation"]
    old = as_written_long_ago(new, tmp_path / "old.pt")
    convert(new, tmp_path / "a.pt", *flags)
    printed = convert(old, tmp_path / "b.pt", *flags)
    assert "encoder.layers.*.fc1_weight" in printed.partition("dropped:")[2]
    assert torch.equal(logits(tmp_path / "a.pt"), logits(tmp_path / "b.pt"))


class Code:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_checkpoint_with_code_is_refused_and_nothing_runs(softmax_models, tmp_path, save):
    victim = tmp_path / "ran"
    save({**load(softmax_models["translation"]), "extra": Code(victim)}, tmp_path / "in.pt")
    with pytest.raises(FastWeightError, match=r"in\.pt (is refused|cannot be read)"):
        convert(tmp_path / "in.pt", tmp_path / "out.pt")
    assert not victim.exists() and not (tmp_path / "out.pt").exists()


def mistakes(softmax_models, language_model, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    translation, lm = softmax_models["translation"], softmax_models["language_modeling"]
    state = load(translation)
    state["cfg"]["model"]._name = state["cfg"]["model"].arch = "lstm"
    torch.save(state, tmp_path / "lstm.pt")
    out = tmp_path / "out.pt"
    return {
        "missing": ([tmp_path / "no.pt", out], ["no.pt"]),
        "text": ([tmp_path / "text.pt", out], ["text.pt", "cannot be read"]),
        "lstm": ([tmp_path / "lstm.pt", out], ["'lstm'", "transformer_lm"]),
        "fast already": ([language_model, out], ["fast weights already", "delta"]),
        "onto itself": ([lm, lm], ["another file"]),
        "no folder": ([lm, tmp_path / "no" / "out.pt"], ["cannot write"]),
        "unknown rule": ([lm, out, "--update-rule", "dleta"], ["'dleta'", "gated-delta"]),
        "favor": ([lm, out, "--feature-map", "favor"], ["--favor-features"]),
        "cross in a language model": ([lm, out, "--update-rule-cross", "delta"], ["--update-rule-cross"]),
        "serial in the encoder": (
            [translation, out, "--update-rule-encoder", "delta-rnn"],
            ["delta-rnn", "causal"],
        ),
    }


def test_a_mistake_is_one_line(softmax_models, language_model, tmp_path):
    for name, (arguments, words) in mistakes(softmax_models, language_model, tmp_path).items():
        with pytest.raises(FastWeightError) as error:
            convert(*arguments)
        message = str(error.value)
        assert "\n" not in message and len(message) < 600, name
        assert all(word in message for word in words), message
    assert not list(tmp_path.glob("*.half")) and not (tmp_path / "out.pt").exists()


def test_the_module_is_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["fastweights-convert", str(tmp_path / "no.pt"), str(tmp_path / "out.pt")]
    )
    with pytest.raises(FastWeightError, match="no.pt"):
        runpy.run_module("fairseq_fastweights.convert", run_name="__main__")
