"""Learns one sentencepiece model of all languages and cuts their text into its pieces.

    python sentencepieces.py TEXT OUT --languages en de --size 4000

TEXT holds {train,valid,test}.{en,de}; OUT gets the same names, and spm.model, learned from train: from all of it, or
from --sentences lines of it, drawn by a fixed seed.
"""

import argparse
from pathlib import Path

import sentencepiece


def learn(text: Path, languages: list[str], size: int, kind: str, prefix: Path, sentences: int = 0) -> None:
    """Write prefix.model. bos, eos and pad are fairseq's business. ``sentences`` 0: all lines."""
    sentencepiece.set_random_generator_seed(1)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(text / f"train.{language}") for language in languages],
        model_prefix=str(prefix),
        vocab_size=size,
        model_type=kind,
        character_coverage=1.0,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        input_sentence_size=sentences,
        shuffle_input_sentence=sentences > 0,
        minloglevel=2,
    )


def cut(processor: sentencepiece.SentencePieceProcessor, source: Path, target: Path) -> None:
    """Pieces of every line of ``source``, separated by blanks."""
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            print(*processor.encode(line, out_type=str), file=out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--languages", nargs="+", required=True)
    parser.add_argument("--size", type=int, default=4000)
    parser.add_argument("--type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--sentences", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    learn(args.text, args.languages, args.size, args.type, args.out / "spm", args.sentences)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "spm.model"))
    for split in ("train", "valid", "test"):
        for language in args.languages:
            name = f"{split}.{language}"
            cut(processor, args.text / name, args.out / name)


if __name__ == "__main__":
    main()
