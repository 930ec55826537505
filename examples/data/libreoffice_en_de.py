"""English-German sentence pairs from the LibreOffice help packages of Debian and Ubuntu (licence: MPL-2.0).

    apt-get download libreoffice-help-en-us libreoffice-help-de
    for package in libreoffice-help-*.deb; do dpkg -x "$package" unpacked; done
    python libreoffice_en_de.py unpacked out

writes out/{train,valid,test}.{en,de}, one sentence a line. A paragraph has the same id in both languages, which
aligns the text. Pages are dealt to the splits in an order that only their names decide, so the same packages
always give the same files. No sentence occurs twice, neither within a split nor across splits, in either
language; letter case, digits and punctuation do not make two sentences different.
"""

import argparse
import hashlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

Pair = tuple[str, str]

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
CODE_CLASSES = {"code", "bascode", "pycode", "sqlcode"}
SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?])(?=\s|$)")  # left behind by an icon
SENTENCE_END = re.compile(r'(?<=[.!?]) +(?=["„A-ZÄÖÜ])')
NO_LETTERS = re.compile(r"[\W\d_]+")


class HelpPage(HTMLParser):
    """Collects the ``paragraphs`` of a help page: {id: text}, without program code.

    Text that differs by operating system or application comes in several spans. Only the default one is kept.
    Those of a system or application have its name, in capitals, as class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: dict[str, str] = {}
        self._id = None  # of the open paragraph, if it is one to keep
        self._text: list[str] = []
        self._skipped_spans = 0  # how many spans are open, from the outermost that is skipped

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        if tag == "span":
            if self._skipped_spans or attributes.get("class", "").isupper():
                self._skipped_spans += 1
        elif tag in BLOCKS:
            is_code = CODE_CLASSES.intersection(attributes.get("class", "").split())
            self._id = None if is_code else attributes.get("id")
            self._text = []
            self._skipped_spans = 0  # a span never crosses a paragraph

    def handle_endtag(self, tag):
        if tag == "span":
            self._skipped_spans = max(0, self._skipped_spans - 1)
        elif tag in BLOCKS and self._id:
            text = " ".join("".join(self._text).split())
            self.paragraphs[self._id] = SPACE_BEFORE_MARK.sub(r"\1", text)
            self._id = None

    def handle_data(self, data):
        if self._id and not self._skipped_spans:
            self._text.append(data)


def read_paragraphs(path: Path) -> dict[str, str]:
    """The paragraphs of one help page by id."""
    page = HelpPage()
    page.feed(path.read_text(encoding="utf-8", errors="replace"))
    page.close()
    return page.paragraphs


def split_sentences(english: str, german: str) -> list[Pair]:
    """Sentence pairs of two aligned paragraphs, which stay whole if their sentences do not match one to one."""
    sentences = SENTENCE_END.split(english), SENTENCE_END.split(german)
    if len(sentences[0]) == len(sentences[1]):
        return list(zip(*sentences))
    return [(english, german)]


def is_translation(english: str, german: str) -> bool:
    """Whether the pair looks like a sentence and its translation."""
    n, m = len(english.split()), len(german.split())
    similar_length = n < 2.5 * m + 3 and m < 2.5 * n + 3
    return english != german and 3 <= n <= 80 and 2 <= m <= 80 and similar_length


def read_page(english: Path, german: Path) -> list[Pair]:
    """All sentence pairs of a page and its translation."""
    german_paragraphs = read_paragraphs(german)
    return [
        pair
        for paragraph, text in read_paragraphs(english).items()
        for pair in split_sentences(text, german_paragraphs.get(paragraph, ""))
        if is_translation(*pair)
    ]


def read_pages(root: Path) -> dict[str, list[Pair]]:
    """The sentence pairs of every page that exists in both languages, by the page's relative path."""
    help_dir = root / "usr/share/libreoffice/help"
    english_dir, german_dir = help_dir / "en-US/text", help_dir / "de/text"
    names = sorted(path.relative_to(english_dir).as_posix() for path in english_dir.rglob("*.html"))
    return {
        name: read_page(english_dir / name, german_dir / name)
        for name in names
        if (german_dir / name).exists()
    }


def letters(sentence: str) -> str:
    """What must differ between two sentences."""
    return NO_LETTERS.sub("", sentence).casefold()


def deal(pages: dict[str, list[Pair]], valid: int, test: int) -> dict[str, list[Pair]]:
    """Fill test with whole pages until it has ``test`` pairs, then valid; train gets the rest.

    A pair of which either sentence has been dealt already is dropped. So the small splits, which come first, lose
    nothing to train.
    """
    wanted = {"test": test, "valid": valid, "train": sys.maxsize}
    splits: dict[str, list[Pair]] = {name: [] for name in wanted}
    seen_english, seen_german = set(), set()
    for page in sorted(pages, key=lambda name: hashlib.md5(name.encode()).digest()):
        split = next(name for name in wanted if len(splits[name]) < wanted[name])
        for english, german in pages[page]:
            keys = letters(english), letters(german)
            if keys[0] in seen_english or keys[1] in seen_german:
                continue
            seen_english.add(keys[0])
            seen_german.add(keys[1])
            splits[split].append((english, german))
    return splits


def write(splits: dict[str, list[Pair]], out: Path) -> None:
    """One file for each split and language."""
    out.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        for side, language in enumerate(("en", "de")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (out / f"{name}.{language}").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Sentence pairs from unpacked LibreOffice help packages.")
    parser.add_argument("root", type=Path, help="where the packages were unpacked")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--valid", type=int, default=400, help="pairs for validation (default 400)")
    parser.add_argument("--test", type=int, default=500, help="pairs for the test (default 500)")
    args = parser.parse_args()
    splits = deal(read_pages(args.root), args.valid, args.test)
    for name, pairs in splits.items():
        if not pairs:
            sys.exit(f"{args.root} has too few pages in both languages: no pair is left for {name}")
    write(splits, args.out)
    print(", ".join(f"{len(pairs)} {name}" for name, pairs in splits.items()), "pairs")


if __name__ == "__main__":
    main()
