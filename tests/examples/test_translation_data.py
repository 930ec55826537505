"""Sentence pairs prepared for translation, and the processing of the archives of IWSLT 2014 and WMT 2014."""

import gzip
import io
import shutil
import sys
import tarfile
from argparse import Namespace

import pytest
from fairseq.data import MMapIndexedDataset, encoders
from language_pair import ROOT, TRANSLATION, bash, sentences, write_pairs

sys.path.insert(0, str(ROOT / "examples/data"))

import tidy_pairs  # noqa: E402

LANGUAGES = ("en", "de")
SPLITS = ("train", "valid", "test")


def prepare(folder, out, ok=True, **environment) -> str:
    splits = [folder / split for split in SPLITS]
    return bash(TRANSLATION / "prepare_pairs.sh", "en", "de", *splits, out, ok=ok, **environment)


def lines(path) -> list[str]:
    return path.read_text().removesuffix("\n").split("\n")


def test_pieces_are_counted_and_give_the_text_back(pairs, prepared):
    data = prepared / "data"
    counts = {line.split(":")[0]: line.split() for line in lines(data / "counts")}
    for split in SPLITS:
        tokens = []
        for language in LANGUAGES:
            cut = lines(data / f"pieces/{split}.{language}")
            joined = [line.replace(" ", "").replace("\u2581", " ").strip() for line in cut]
            assert joined == lines(pairs / f"{split}.{language}")
            dataset = MMapIndexedDataset(str(data / f"bin/{split}.en-de.{language}"))
            assert dataset.sizes.sum() == sum(len(line.split()) + 1 for line in cut)
            tokens.append(str(dataset.sizes.sum()))
        assert [counts[split][1], counts[split][3], counts[split][5]] == [str(len(cut)), *tokens]
    for language in LANGUAGES:
        assert (data / f"raw/test.{language}").read_bytes() == (pairs / f"test.{language}").read_bytes()
    assert (data / "bin/dict.en.txt").read_bytes() == (data / "bin/dict.de.txt").read_bytes()


def test_prepared_pairs_are_used_again_and_mixed_with_no_other(pairs, tmp_path, without_binarising):
    settings = {"VOCAB": "60", **without_binarising}
    prepare(pairs, tmp_path / "data", **settings)
    made = (tmp_path / "data/pieces/spm.model").stat().st_mtime_ns
    (tmp_path / "data/bin").rmdir()  # as if it had been stopped before
    (tmp_path / "data/pieces.part").mkdir()
    prepare(pairs, tmp_path / "data", **settings)
    assert (tmp_path / "data/pieces/spm.model").stat().st_mtime_ns == made
    assert "already there" in prepare(pairs, tmp_path / "data", **settings)
    for other in ({"VOCAB": "61"}, {"CLEAN": "9:2"}, {"PIECES": "subword-nmt"}):
        said = prepare(pairs, tmp_path / "data", ok=False, **{**settings, **other})
        assert "was made of other text or settings (en-de VOCAB=60" in said


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"VOCAB": "0"}, "VOCAB must be a number"),
        ({"PIECES": "words"}, "PIECES must be 'sentencepiece' or 'subword-nmt', got 'words'"),
        ({"CLEAN": "250"}, "CLEAN must be LENGTH:RATIO"),
    ],
)
def test_wrong_settings(pairs, tmp_path, setting, message):
    assert message in prepare(pairs, tmp_path / "data", ok=False, **setting)


def test_pairs_must_be_there_and_of_one_length(pairs, tmp_path):
    assert "there is no" in prepare(tmp_path, tmp_path / "data", ok=False)
    shutil.copytree(pairs, tmp_path / "pairs")
    with open(tmp_path / "pairs/valid.de", "a") as more:
        more.write("Noch ein Satz.\n")
    said = prepare(tmp_path / "pairs", tmp_path / "data", ok=False)
    assert "valid.en has 12 lines" in said and "valid.de 13" in said


def test_odd_training_pairs_are_left_out_and_lines_stay_lines(tmp_path, monkeypatch):
    odd = [("", "leer"), ("a b c d e", "a b c d e"), ("a b", "a b c d")]
    good = [("one\rtwo", "eins\u2028zwei"), ("a\u00a0b ", "a  b"), ("a b", "a b c")]
    write_pairs(tmp_path, train=[*odd, *good], valid=odd, test=good)
    flags = [word for split in SPLITS for word in (f"--{split}", str(tmp_path / split))]
    flags += ["--languages", *LANGUAGES, "--clean", "4:1.5", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["tidy_pairs.py", *flags])
    tidy_pairs.main()
    assert lines(tmp_path / "out/train.en") == ["one two", "a b", "a b"]
    assert lines(tmp_path / "out/train.de") == ["eins zwei", "a b", "a b c"]
    assert lines(tmp_path / "out/valid.en") == [source for source, _ in odd]
    assert lines(tmp_path / "out/test.de") == ["eins zwei", "a b", "a b c"]


def test_subwords_give_the_text_back_by_the_flags_of_fairseq(pairs, tmp_path, without_binarising):
    prepare(pairs, tmp_path / "data", PIECES="subword-nmt", VOCAB="30", **without_binarising)
    folder = tmp_path / "data/pieces"
    merges = lines(folder / "codes")[1:]
    assert len(merges) == 30
    for_fastbpe = [line.split() for line in lines(folder / "codes.fastbpe")]
    assert {len(words) for words in for_fastbpe} == {3}
    assert [" ".join(words[:2]) for words in for_fastbpe] == merges
    moses = encoders.build_tokenizer(Namespace(tokenizer="moses", source_lang="en", target_lang="de"))
    cut = lines(folder / "test.de")
    assert any("@@ " in line for line in cut)
    assert [moses.decode(line.replace("@@ ", "")) for line in cut] == lines(pairs / "test.de")


def test_multi30k_of_a_folder(pairs, tmp_path, without_binarising):
    for name, split in (("train", "train"), ("val", "valid"), ("test_2016_flickr", "test")):
        for language in LANGUAGES:
            (tmp_path / "text").mkdir(exist_ok=True)
            shutil.copy(pairs / f"{split}.{language}", tmp_path / f"text/{name}.{language}")
    settings = {"VOCAB": "60", **without_binarising}
    bash(TRANSLATION / "prepare_multi30k.sh", tmp_path / "data", tmp_path / "text", **settings)
    assert lines(tmp_path / "data/raw/valid.de") == lines(pairs / "valid.de")
    assert lines(tmp_path / "data/text/train.en") == lines(pairs / "train.en")


def add(archive: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_iwslt14_is_dealt_out_pair_by_pair(tmp_path, without_binarising):
    talks = sentences(92, 4)
    tests = ["TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"]
    with tarfile.open(tmp_path / "de-en.tgz", "w:gz") as archive:
        for side, language in enumerate(LANGUAGES):
            told = "<url>http://x</url>\n<keywords>a, b</keywords>\n<talkid>1</talkid>\n"
            told += f"<title>Title in {language}</title>\n"
            text = told + "".join(f" {pair[side]}\n" for pair in talks)
            add(archive, f"de-en/train.tags.de-en.{language}", text)
            for name in tests:
                xml = (
                    f'<doc docid="1">\n<title>no</title>\n<seg id="1"> {name} &amp; {language} </seg>\n</doc>'
                )
                add(archive, f"de-en/IWSLT14.{name}.de-en.{language}.xml", xml)
    script = TRANSLATION / "prepare_iwslt14_de_en.sh"
    settings = {"VOCAB": "60", "CLEAN": "", **without_binarising}
    bash(script, tmp_path / "out", tmp_path / "de-en.tgz", **settings)
    german = ["Title in de", *(target for _, target in talks)]
    assert lines(tmp_path / "out/raw/valid.de") == german[::23]
    assert lines(tmp_path / "out/text/train.de") == [line for i, line in enumerate(german) if i % 23]
    assert lines(tmp_path / "out/raw/test.en") == [f"{name} & en" for name in tests]


def test_wmt14_joins_the_three_texts(tmp_path, without_binarising):
    downloads = tmp_path / "downloads"
    write_pairs(downloads, newstest2013=sentences(5, 5), newstest2014=sentences(5, 6))
    members = {
        "training-parallel-europarl-v7": "training/europarl-v7.de-en",
        "training-parallel-commoncrawl": "commoncrawl.de-en",
        "training-parallel-nc-v9": "training/news-commentary-v9.de-en",
    }
    everything = []
    for seed, (name, member) in enumerate(members.items()):
        text = sentences(40, 10 + seed)
        everything += text
        with tarfile.open(downloads / f"{name}.tgz", "w:gz") as archive:
            for side, language in enumerate(LANGUAGES):
                add(archive, f"{member}.{language}", "".join(pair[side] + "\n" for pair in text))
                add(archive, f"{member.replace('de', 'fr')}.{language}", "something else\n")
    settings = {"VOCAB": "60", "CLEAN": "9:9", **without_binarising}
    bash(TRANSLATION / "prepare_wmt14_en_de.sh", tmp_path / "out", downloads, **settings)
    for side, language in enumerate(LANGUAGES):
        assert lines(tmp_path / f"out/joined/train.{language}") == [pair[side] for pair in everything]
        kept = [pair[side] for pair in everything if len(pair[0].split()) <= 9]
        assert lines(tmp_path / f"out/text/train.{language}") == kept
        assert len(kept) < len(everything)
        assert lines(tmp_path / f"out/raw/test.{language}") == lines(downloads / f"newstest2014.{language}")
    (downloads / "training-parallel-nc-v9.tgz").write_bytes(gzip.compress(b"cut off"))
    said = bash(TRANSLATION / "prepare_wmt14_en_de.sh", tmp_path / "new", downloads, ok=False, **settings)
    assert "holds no training/news-commentary-v9.de-en.en" in said
    assert not (tmp_path / "new/joined/train.en").exists()
