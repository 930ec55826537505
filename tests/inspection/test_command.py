"""fastweights-inspect on checkpoints that fairseq-train wrote."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import (
    EVERYWHERE,
    PACKAGE,
    run,
    train_lm,
    train_translation,
    write_sentences,
)

import fairseq_fastweights.inspection
from fairseq_fastweights import FastWeightError
from fairseq_fastweights.inspection.__main__ import main
from fairseq_fastweights.inspection.checkpoint import choose, load

UPDATES = ["--max-update", 2, "--fast-weight-backend", "chunked"]
SOURCE = ["--source", "big1 noun2"]
TEXT = ["--text", "xnoun2 xbig1 xnoun3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Binarised pairs and words, and checkpoints: translation (delta everywhere), lm (gated-delta), softmax."""
    folder = tmp_path_factory.mktemp("inspection")
    write_sentences(folder, {"train": 40})
    run("preprocess", "-s", "en", "-t", "xx", "--trainpref", folder / "train", "--destdir", folder / "pairs")
    run("preprocess", "--only-source", "--trainpref", folder / "train.xx", "--destdir", folder / "words")
    train_translation(folder / "pairs", folder / "translation", *EVERYWHERE, *UPDATES)
    train_lm(folder / "words", folder / "lm", "--update-rule", "gated-delta", *UPDATES)
    train_lm(folder / "words", folder / "softmax", "--update-rule", "softmax", *UPDATES)
    return folder


def checkpoint(folder, name):
    return str(folder / name / "checkpoint_last.pt")


def as_json(capsys, *arguments):
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_translation_as_json(folder, capsys):
    found = as_json(capsys, checkpoint(folder, "translation"), *TEXT, *SOURCE)
    assert [(x["site"], x["layer"], x["rule"]) for x in found] == [
        ("encoder", 0, "delta"),
        ("decoder", 0, "delta"),
        ("cross", 0, "delta"),
    ]
    target, source = ["</s>", "xnoun2", "xbig1", "xnoun3"], ["big1", "noun2", "</s>"]
    tokens = {x["site"]: (x["reading"], x["written"]) for x in found}
    assert tokens == {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}
    for attention in found:
        assert attention["error"] < 1e-9
        for head in attention["heads"]:
            weights, written = torch.tensor(head["weights"]), len(attention["written"])
            assert weights.shape == (len(attention["reading"]), written)
            assert len(head["write"]) == len(head["singular_values"]) == written
            assert head["mean_write"] == pytest.approx(sum(head["write"]) / written, rel=1e-4)
            assert (head["mean_distance"] is None) == (attention["site"] == "cross")
            assert head["decay"] is None


def test_the_numbers_are_the_models(folder, capsys):
    """beta from the checkpoint's parameters and the decoder's input, which the first layer's norm comes after."""
    model, task = load(checkpoint(folder, "lm"))
    (found,) = as_json(capsys, checkpoint(folder, "lm"), *TEXT)
    ids = task.source_dictionary.encode_line(TEXT[1], add_if_not_exist=False).long()  # ends with </s>
    inputs = torch.cat([ids[-1:], ids[:-1]])[None]
    layer = model.decoder.layers[0]
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda *call: seen.append(call[2]["query"]), with_kwargs=True)
    with torch.no_grad():
        model(inputs)
        beta = torch.sigmoid(layer.self_attn.rule.beta_proj(seen[0]))[:, 0].T
    assert torch.allclose(torch.tensor([head["write"] for head in found["heads"]]).double(), beta, rtol=1e-5)


def test_choice_of_site_layer_and_head(folder, capsys):
    flags = ["--site", "cross", "--layers", "0", "--heads", "1"]
    found = as_json(capsys, checkpoint(folder, "translation"), *TEXT, *SOURCE, *flags)
    assert [(x["site"], [head["head"] for head in x["heads"]]) for x in found] == [("cross", [1])]


def test_choice_among_several_layers():
    recordings = [SimpleNamespace(site=site, layer=n) for n in range(3) for site in ("decoder", "cross")]
    chosen = choose(recordings, ["cross"], [2, 0])
    assert [(r.site, r.layer) for r in chosen] == [("cross", 0), ("cross", 2)]
    assert choose(recordings) == recordings


def test_table_and_pictures(folder, tmp_path, capsys):
    pytest.importorskip("rich"), pytest.importorskip("matplotlib")
    main([checkpoint(folder, "lm"), *TEXT, "--heads", "1", "--out", str(tmp_path / "new" / "pictures")])
    out, err = capsys.readouterr()
    assert "decoder, layer 0: gated-delta rule" in out and "eff. rank" in out
    written = sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir())
    names = [f"decoder.0.{what}.{kind}" for what in ("gates", "state", "weights") for kind in ("png", "svg")]
    assert written == names
    assert all(name in err for name in names)


def test_unknown_words_are_shown_as_such(folder, capsys):
    main([checkpoint(folder, "lm"), "--text", "xnoun2 zebra", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["written"] == ["</s>", "xnoun2", "<unk> zebra"]
    assert "1 of 3 tokens of --text are not in the dictionary: zebra" in err


def test_sentencepiece(folder, tmp_path, capsys):
    import sentencepiece

    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.xx"), model_prefix=str(tmp_path / "spm"), **options
    )
    model = str(tmp_path / "spm.model")
    (found,) = as_json(capsys, checkpoint(folder, "lm"), *TEXT, "--sentencepiece-model", model)
    pieces = [label.removeprefix("<unk> ") for label in found["written"][1:]]
    assert "".join(pieces).replace("▁", " ").strip() == TEXT[1]


def test_dictionaries_that_have_moved(folder, tmp_path, capsys):
    """The checkpoint says where they were; --data says where they are."""
    state = torch.load(checkpoint(folder, "lm"), weights_only=True)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    with pytest.raises(FastWeightError, match="dict.txt.*--data FOLDER"):
        main([str(tmp_path / "moved.pt"), *TEXT])
    found = as_json(capsys, str(tmp_path / "moved.pt"), *TEXT, "--data", str(folder / "words"))
    assert found == as_json(capsys, checkpoint(folder, "lm"), *TEXT)


MISTAKES = {
    "softmax model": ("softmax", TEXT, "no fast-weight attention"),
    "softmax site": ("lm", [*TEXT, "--site", "cross"], "--site cross.*--update-rule-cross.*: decoder$"),
    "no source": ("translation", TEXT, "--source"),
    "a source too many": ("lm", [*TEXT, *SOURCE], "language model"),
    "no such layer": ("lm", [*TEXT, "--layers", "3"], "--layers must be among 0, got 3"),
    "no such head": ("lm", [*TEXT, "--heads", "0", "2"], "--heads must be from 0 to 1.*got 2"),
    "empty text": ("lm", ["--text", " "], "--text is empty"),
    "long text": ("lm", ["--text", "xnoun2 " * 16], "--text has 17 tokens.*16"),
    "long source": ("translation", [*TEXT, "--source", "noun1 " * 1024], "--source has 1025 tokens.*1024"),
    "no such data of pairs": (
        "translation",
        [*TEXT, *SOURCE, "--data", "nowhere"],
        "there is no nowhere: give --data",
    ),
    "only dictionaries": ("translation", [*TEXT, *SOURCE, "--data", PACKAGE], "SPLIT.SRC-TGT.*--data FOLDER"),
    "no such data": ("lm", [*TEXT, "--data", "nowhere"], "there is no nowhere/dict.txt: give --data"),
    "no such pieces": ("lm", [*TEXT, "--sentencepiece-model", "no.model"], "there is no file no.model"),
    "no such checkpoint": ("nowhere", TEXT, "not found"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(folder, mistake):
    name, arguments, message = MISTAKES[mistake]
    with pytest.raises(FastWeightError, match=message) as caught:
        main([checkpoint(folder, name), *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package, flags", [("rich", []), ("matplotlib", ["--out", "pictures"])])
def test_a_missing_package_is_named(folder, monkeypatch, package, flags):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # import fails
    monkeypatch.delitem(sys.modules, "fairseq_fastweights.inspection.pictures", raising=False)
    monkeypatch.delattr(fairseq_fastweights.inspection, "pictures", raising=False)
    with pytest.raises(FastWeightError, match=f"pip install {package}"):
        main([checkpoint(folder, "lm"), *TEXT, *flags])


def test_as_a_module(folder):
    """In a process of its own, which registers the plugin and prints mistakes in one line itself."""
    command = [sys.executable, "-m", "fairseq_fastweights.inspection", checkpoint(folder, "softmax"), *TEXT]
    done = subprocess.run(command, cwd=Path(PACKAGE).parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fairseq_fastweights: error: ") and not done.stdout
    assert "Traceback" not in done.stderr
