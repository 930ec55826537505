"""The quick start's scripts on made-up pages: aligned, clean, and no sentence of the test in the training text."""

import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, DATA / script, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def page(sentences):
    body = "".join(f'<p id="par_{i}">{text}</p>\n' for i, text in enumerate(sentences))
    return f"<html><body>{body}</body></html>"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 pages of 5 sentences of their own and one that all pages share."""
    root = tmp_path_factory.mktemp("help")
    help_dir = root / "usr/share/libreoffice/help"
    for language, (word, shared) in {
        "en-US": ("Choose the table", "Click the button with the left mouse key."),
        "de": ("Wählen Sie die Tabelle", "Klicken Sie mit der linken Maustaste auf die Schaltfläche."),
    }.items():
        folder = help_dir / language / "text"
        folder.mkdir(parents=True)
        for p in range(40):
            letters = chr(97 + p % 26) + chr(97 + p // 26)
            own = [f"{word} {letters}{chr(97 + i)} oder {letters}." for i in range(5)]
            (folder / f"page{p}.html").write_text(page([*own, shared]), encoding="utf-8")
    out = root / "out"
    run("libreoffice_en_de.py", root, out, "--valid", 10, "--test", 15)
    return out


def lines(text, name):
    return (text / name).read_text(encoding="utf-8").splitlines()


def test_pairs_are_aligned(text):
    for split in ("train", "valid", "test"):
        english, german = lines(text, f"{split}.en"), lines(text, f"{split}.de")
        assert len(english) == len(german) > 0
        for en, de in zip(english, german, strict=True):
            assert en.split()[-3:] == de.split()[-3:] or en.startswith("Click") and de.startswith("Klicken")


@pytest.mark.parametrize("language", ["en", "de"])
def test_no_sentence_occurs_twice_in_any_split(text, language):
    everything = [line for split in ("train", "valid", "test") for line in lines(text, f"{split}.{language}")]
    assert len(everything) == len(set(everything)) == 201


def test_pieces_give_the_text_back(text, tmp_path):
    run("sentencepieces.py", text, tmp_path, "--languages", "en", "de", "--size", 60)
    for name in ("train.en", "test.de"):
        pieces = lines(tmp_path, name)
        assert [p.replace(" ", "").replace("\u2581", " ").strip() for p in pieces] == lines(text, name)


def test_side_by_side_shows_the_same_line_of_every_file(text):
    shown = run(
        "side_by_side.py", "--samples", 3, f"source={text / 'test.en'}", f"reference={text / 'test.de'}"
    )
    blocks = [block.splitlines() for block in shown.strip("\n").split("\n\n")]
    assert len(blocks) == 3
    english, german = lines(text, "test.en"), lines(text, "test.de")
    for source, reference in blocks:
        at = english.index(source.split("source  ")[1])
        assert reference.split("reference  ")[1] == german[at]
