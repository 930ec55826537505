"""fairseq's commands with the plugin: by path and by name, translation and language model."""

import contextlib
import os
import re
from pathlib import Path

import fairseq
import pytest
from commands import (
    EVERYWHERE,
    PACKAGE,
    SEARCH,
    TINY,
    TRAIN,
    finish,
    generate,
    hypotheses,
    load,
    run,
    run_logged,
    start,
)


@pytest.fixture(scope="module")
def generated(data, translation):
    return hypotheses(generate(data.pairs, translation, "--batch-size", 8))


def test_every_test_sentence_is_translated(generated):
    assert sorted(generated) == list(range(21))


def test_translations_do_not_depend_on_the_batch(data, translation, generated):
    assert hypotheses(generate(data.pairs, translation, "--batch-size", 1)) == generated


def test_model_has_learned_the_language(generated):
    words = " ".join(generated.values()).split()
    assert words and all(re.fullmatch(r"x(noun|big)\d", word) for word in words)


def test_interactive_translates_as_generate_does(data, translation, generated):
    out = run(
        *("interactive", data.pairs, "--path", translation, *SEARCH),
        *("--input", data.text / "test.en", "--buffer-size", 9, "--batch-size", 4),
    )
    assert hypotheses(out) == generated


@pytest.mark.parametrize("task", ["translation", "language_modeling"])
def test_validate_sees_the_loss_of_a_trained_model(data, translation, language_model, task):
    where, checkpoint = {
        "translation": (data.pairs, translation),
        "language_modeling": (data.words, language_model),
    }[task]
    log = run_logged(
        *("validate", where, "--path", checkpoint, "--user-dir", PACKAGE, "--task", task),
        *("--batch-size", 8, "--num-workers", 0, "--cpu", "--no-progress-bar"),
    )
    loss = float(re.search(r"valid on 'valid' subset \| loss ([\d.]+)", log)[1])
    assert loss < 3.2  # bits a word; 13 words that all look alike have 3.7


def test_eval_lm_knows_the_language(data, language_model):
    log = run_logged(
        *("eval_lm", data.words, "--path", language_model, "--user-dir", PACKAGE),
        *("--tokens-per-sample", 16, "--batch-size", 4, "--num-workers", 0, "--cpu"),
    )
    assert float(re.search(r"Perplexity: ([\d.]+)", log)[1]) < 9  # of 13


def test_language_model_goes_on_from_prompts(data, language_model):
    out = generate(
        *(data.words, language_model, "--task", "language_modeling"),
        *("--sample-break-mode", "eos", "--prefix-size", 2, "--batch-size", 8),
    )
    found = hypotheses(out)
    assert sorted(found) == list(range(21))
    lines = (data.text / "test.xx").read_text().splitlines()
    for number, text in found.items():
        assert text.split()[:2] == lines[number].split()[:2]


def test_language_model_goes_on_from_typed_prompts(data, language_model, tmp_path):
    """fairseq-interactive reads prompts of 12 words as it reads them word by word."""
    lines = (data.text / "test.xx").read_text().split()
    prompts = [" ".join(lines[i : i + 12]) for i in range(3)]
    (tmp_path / "prompts").write_text("".join(prompt + "\n" for prompt in prompts))
    flags = [data.words, "--path", language_model, *SEARCH, "--task", "language_modeling", "--max-len-b", 16]
    flags += ["--input", tmp_path / "prompts", "--buffer-size", 3, "--batch-size", 3]
    found = hypotheses(run("interactive", *flags))
    assert [found[i].split()[:12] for i in range(3)] == [prompt.split() for prompt in prompts]
    assert all(len(text.split()) > 12 for text in found.values())
    with pytest.MonkeyPatch.context() as patch:  # without the scan that reads a prompt at once
        patch.setattr(
            "fairseq_fastweights.models.prompts.prompts_read_at_once", lambda *_: contextlib.nullcontext()
        )
        assert hypotheses(run("interactive", *flags)) == found


@pytest.mark.parametrize("kind", ["translation", "language_model"])
def test_checkpoint_is_data_and_holds_the_flags(kind, request):
    model = load(request.getfixturevalue(kind))["cfg"]["model"]
    options = model if isinstance(model, dict) else vars(model)
    assert options["update_rule"] == "delta"
    assert options["feature_map"] == "elu"
    assert "fast_weight_backend" in options


def test_generation_takes_overrides_of_the_flags(data, translation, generated):
    other = "{'fast_weight_backend': 'reference', 'fast_weight_chunk_size': 2}"
    found = hypotheses(generate(data.pairs, translation, "--model-overrides", other))
    assert found == generated


def train_flags(data, folder):
    arch = ["--arch", "fast_weight_transformer", *TINY, *TRAIN, *EVERYWHERE]
    return [data.pairs, *arch, "--max-update", 2, "--save-dir", folder]


def test_training_by_installed_name(data, tmp_path):
    # the layout of site-packages, fairseq and the plugin side by side, in a folder of links
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    (site / "fairseq").mkdir(parents=True)
    elsewhere.mkdir()
    for part in Path(fairseq.__file__).parent.iterdir():
        (site / "fairseq" / part.name).symlink_to(part)
    (site / "fairseq_fastweights").symlink_to(PACKAGE)
    flags = train_flags(data, tmp_path / "saved")
    process = start(
        *("train", *flags, "--user-dir", "fairseq_fastweights"),
        cwd=elsewhere,
        PYTHONPATH=str(site),
    )
    status, _, err = finish(process)
    assert status == 0, err[-2000:]
    assert (tmp_path / "saved" / "checkpoint_last.pt").exists()


def test_training_by_relative_path(data, tmp_path):
    process = start(
        *("train", *train_flags(data, tmp_path), "--user-dir", os.path.basename(PACKAGE)),
        cwd=os.path.dirname(PACKAGE),
    )
    status, _, err = finish(process)
    assert status == 0, err[-2000:]


HYDRA = (
    "dataset.batch_size=8 optimization.max_update=2 optimization.lr=[0.01] common.cpu=true "
    "+optimizer._name=adam lr_scheduler._name=fixed dataset.num_workers=0 checkpoint.no_epoch_checkpoints=true "
    "dataset.disable_validation=true +model.update_rule=gated-delta +model.fast_weight_stats=2"
).split()
HYDRA_MODELS = {
    "fast_weight_lm": "+task._name=language_modeling +task.tokens_per_sample=16 +model.decoder_layers=1 "
    "+model.decoder_embed_dim=16 +model.decoder_ffn_embed_dim=16 +model.decoder_attention_heads=2",
    "fast_weight_transformer": "+task._name=translation +model.encoder_layers=1 +model.decoder_layers=1 "
    "+model.encoder_embed_dim=16 +model.decoder_embed_dim=16 +model.update_rule_cross=sum "
    "+model.feature_map=dpfp +model.dpfp_nu=2",
}


@pytest.mark.parametrize("name", HYDRA_MODELS)
def test_hydra_trains(data, tmp_path, name):
    where = data.words if name == "fast_weight_lm" else data.pairs
    process = start(
        *("hydra_train", f"common.user_dir={PACKAGE}", f"+task.data={where}", *HYDRA),
        *(f"+model._name={name}", *HYDRA_MODELS[name].split()),
        *("criterion._name=cross_entropy", f"checkpoint.save_dir={tmp_path}"),
        *(f"hydra.run.dir={tmp_path}/hydra",),
        cwd=tmp_path,
    )
    status, out, err = finish(process)
    assert status == 0, err[-3000:]
    assert "0_state_norm" in out + err
    state = load(tmp_path / "checkpoint_last.pt")
    assert any(n.endswith("self_attn.rule.decay.log_rate") for n in state["model"])
    model = state["cfg"]["model"]
    options = model if isinstance(model, dict) else vars(model)
    assert options["update_rule"] == "gated-delta"
