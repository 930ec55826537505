"""A user's mistake ends a command with exit status 1 and one line that says what is wrong."""

import pytest
from commands import EVERYWHERE, PACKAGE, TINY, TRAIN, finish, start

MISTAKES = {
    "unknown rule": (["--update-rule", "dleta"], ["update rule", "'dleta'", "gated-delta"]),
    "nu too large": (["--feature-map", "dpfp", "--dpfp-nu", "16"], ["dpfp nu", "15", "16"]),
    "favor without features": (["--feature-map", "favor"], ["favor", "--favor-features"]),
    "sum with signed map": (
        ["--update-rule", "sum", "--feature-map", "tanh"],
        ["tanh", "attention_normalization"],
    ),
    "cross_self_attention": (["--cross-self-attention"], ["--cross-self-attention"]),
}


def assert_one_line(process, *words):
    status, out, err = finish(process)
    lines = [line for line in err.splitlines() if line.startswith("fairseq_fastweights: error:")]
    assert status == 1, err[-2000:]
    assert len(lines) == 1, err[-2000:]
    assert "Traceback" not in err + out, err[-2000:]
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_training_with_a_wrong_flag(data, tmp_path, mistake):
    flags, words = MISTAKES[mistake]
    arch = ["--user-dir", PACKAGE, "--arch", "fast_weight_transformer", *TINY, *TRAIN]
    assert_one_line(start("train", data.pairs, *arch, *EVERYWHERE, *flags, "--save-dir", tmp_path), *words)


def generate(data, checkpoint, *flags):
    return start("generate", data.pairs, "--path", checkpoint, "--user-dir", PACKAGE, "--cpu", *flags)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("{'update_rule': 'sum'}", ["checkpoint does not fit", "beta_proj", "--update-rule"]),
        ("{'decoder_ffn_embed_dim': 24}", ["checkpoint does not fit", "24", "16"]),
    ],
)
def test_checkpoint_of_another_model(data, translation, overrides, words):
    assert_one_line(generate(data, translation, "--model-overrides", overrides), *words)


def test_half_written_checkpoint(data, translation, tmp_path):
    half = tmp_path / "half.pt"
    content = translation.read_bytes()
    half.write_bytes(content[: len(content) // 2])
    assert_one_line(generate(data, half), "half.pt", "truncated")


def test_alignment_without_attention_weights(data, translation):
    assert_one_line(generate(data, translation, "--print-alignment"), "--print-alignment")
