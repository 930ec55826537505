"""Sentence pairs from WIT3's archive de-en.tgz of IWSLT 2014, split much as fairseq's example does.

    python iwslt14_de_en.py de-en.tgz OUT

writes OUT/{train,valid,test}.{de,en}. Every 23rd pair of the training text becomes valid (in fairseq's example every
23rd of those that are left after cleaning: not the same ones); test is the development and test sets of 2010 to 2012,
one after another. Titles and descriptions of talks are sentences; the rest of what is told
about a talk (its address, keywords, speaker, ...) is left out.
"""

import argparse
import html
import re
import tarfile
from pathlib import Path

LANGUAGES = ("de", "en")
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
VALID_EVERY = 23
KEPT_TAG = re.compile(r"</?(title|description)>")
SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>", re.DOTALL)


def read(archive: tarfile.TarFile, ending: str) -> str:
    """The text of the one file whose path ends like this. SystemExit without one."""
    names = [name for name in archive.getnames() if name.endswith(ending)]
    if len(names) != 1:
        raise SystemExit(f"iwslt14_de_en.py: {archive.name} holds {len(names)} files {ending}, not one")
    return archive.extractfile(names[0]).read().decode("utf-8")


def training_sentences(text: str) -> list[str]:
    lines = (KEPT_TAG.sub("", line).strip() for line in text.rstrip("\n").split("\n"))
    return [line for line in lines if not line.startswith("<")]  # an empty line has a translation, too


def segments(text: str) -> list[str]:
    return [" ".join(html.unescape(found).split()) for found in SEGMENT.findall(text)]


def splits(archive: tarfile.TarFile, language: str) -> dict[str, list[str]]:
    train = training_sentences(read(archive, f"train.tags.de-en.{language}"))
    tests = [segments(read(archive, f"IWSLT14.{name}.de-en.{language}.xml")) for name in TEST_SETS]
    return {
        "train": [line for i, line in enumerate(train) if i % VALID_EVERY],
        "valid": train[::VALID_EVERY],
        "test": [line for test in tests for line in test],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(args.archive) as archive:
        found = {language: splits(archive, language) for language in LANGUAGES}
    for language, by_split in found.items():
        for split, lines in by_split.items():
            (args.out / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
