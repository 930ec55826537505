"""Moses tokens of every line, cut by one byte pair encoding of all languages (subword-nmt).

    python subwords.py TEXT OUT --languages en de --size 32000

TEXT holds {train,valid,test}.{en,de}; OUT gets the same names, ``codes``, which subword-nmt and fairseq's
``--bpe subword_nmt`` read, and ``codes.fastbpe``, the same merges for fastBPE and ``--bpe fastbpe``. The merges are
learned from train. fairseq's ``--tokenizer moses`` undoes the tokens.
"""

import argparse
import io
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from sacremoses import MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

SPLITS = ("train", "valid", "test")
LINES_AT_A_TIME = 1000


class Tokenizer:
    """As fairseq's ``--tokenizer moses`` with its defaults."""

    def __init__(self, language: str) -> None:
        self.moses = MosesTokenizer(language)

    def __call__(self, line: str) -> str:
        return self.moses.tokenize(line, aggressive_dash_splits=True, return_str=True)


def tokenize(text: Path, tokens: Path, languages: list[str], workers: multiprocessing.pool.Pool) -> None:
    for language in languages:
        for name in (f"{split}.{language}" for split in SPLITS):
            convert(Tokenizer(language), text / name, tokens / name, workers)


def convert(function, source: Path, target: Path, workers: multiprocessing.pool.Pool) -> None:
    """Every line of ``source`` through a function."""
    with open(source, encoding="utf-8", newline="\n") as lines, open(target, "w", encoding="utf-8") as out:
        stripped = (line.rstrip("\n") for line in lines)
        for line in workers.imap(function, stripped, chunksize=LINES_AT_A_TIME):
            print(line, file=out)


def learn(tokens: Path, languages: list[str], size: int, codes: Path) -> None:
    text = (line for language in languages for line in read(tokens / f"train.{language}"))
    with open(codes, "w", encoding="utf-8") as out:
        learn_bpe(text, out, size)


def read(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as lines:
        yield from lines


def for_fastbpe(codes: str) -> str:
    """The merges with a third column, without the line of the version. fastBPE wants every merged string once."""
    seen, lines = set(), []
    for line in codes.splitlines()[1:]:
        if line.replace(" ", "") not in seen:
            seen.add(line.replace(" ", ""))
            lines.append(f"{line} 1\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--languages", nargs="+", required=True)
    parser.add_argument("--size", type=int, default=32000, help="merges")
    args = parser.parse_args()
    tokens, codes = args.out / "tokens", args.out / "codes"
    tokens.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as workers:
        tokenize(args.text, tokens, args.languages, workers)
        learn(tokens, args.languages, args.size, codes)
        merges = codes.read_text(encoding="utf-8")
        codes.with_name("codes.fastbpe").write_text(for_fastbpe(merges), encoding="utf-8")
        bpe = BPE(io.StringIO(merges))
        for language in args.languages:
            for split in SPLITS:
                name = f"{split}.{language}"
                convert(bpe.process_line, tokens / name, args.out / name, workers)


if __name__ == "__main__":
    main()
