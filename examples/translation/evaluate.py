"""Translates with a checkpoint and scores it: BLEU and chrF of sacreBLEU with their signatures, BLEU by source length.

    python evaluate.py CHECKPOINT DATA                                    # valid and test, beam 5
    python evaluate.py CHECKPOINT DATA --beam 4 5 8 --lenpen 0.6 1.0 1.4  # all of them on valid, the best on test
    python evaluate.py CHECKPOINT DATA --split test -- --fp16             # further flags go to fairseq-generate

DATA is a folder of prepare_pairs.sh. Hypotheses are detokenised and compared with the text as it came. The first split
is translated with every beam and length penalty; that of the highest BLEU is used for the other splits. --out (default:
the checkpoint's name with -scores) gets the hypotheses and scores.json; hypotheses that are there, of the same
checkpoint, data and flags, and newer than the checkpoint are used again.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

ROOT = Path(__file__).resolve().parents[2]
HYPOTHESIS = re.compile(r"^D-(\d+)\t\S+\t(.*)$", re.MULTILINE)
# long enough for any translation; without it a model that never ends writes 200 tokens
LONGEST = "--max-len-a 2 --max-len-b 10"
LENGTHS = (10, 20, 30, 40, 50)  # words


@dataclass
class Data:
    """A folder of prepare_pairs.sh."""

    folder: Path
    source: str
    target: str

    def raw(self, split: str, language: str) -> list[str]:
        return read_lines(self.folder / "raw" / f"{split}.{language}")

    def detokenisation(self) -> list[str]:
        """The flags of fairseq-generate that join pieces to text."""
        if (self.folder / "pieces/spm.model").exists():
            return ["--remove-bpe", "sentencepiece"]
        return ["--remove-bpe", "--tokenizer", "moses"]


@dataclass
class Scores:
    """Of one split with one beam and length penalty. ``by_length``: (source words, sentences, BLEU) of every bucket."""

    split: str
    beam: int
    lenpen: float
    bleu: float
    bleu_line: str
    chrf: float
    chrf_line: str
    by_length: list[tuple[str, int, float | None]]
    hypotheses: str


def read_data(folder: Path) -> Data:
    """SystemExit if it is not what prepare_pairs.sh makes."""
    (name, *_) = [path.name for path in folder.glob("bin/test.*-*.*.idx")] or [""]
    found = re.fullmatch(r"test\.([^-]+)-([^.]+)\..*", name)
    if found is None:
        raise SystemExit(f"evaluate.py: {folder} is no folder of prepare_pairs.sh: it has no bin/test.*.idx")
    return Data(folder, *found.groups())


def read_lines(path: Path) -> list[str]:
    """The lines of a text: what a line feed ends, and nothing else."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        return lines.read().removesuffix("\n").split("\n")


def translate(
    checkpoint: str, data: Data, split: str, beam: int, lenpen: float, flags: Sequence[str]
) -> list[str]:
    """Hypotheses in the order of the text, by fairseq-generate. SystemExit with its last lines if it fails."""
    command = [sys.executable, "-m", "fairseq_cli.generate", str(data.folder / "bin")]
    command += ["--user-dir", str(ROOT / "fairseq_fastweights"), "--path", checkpoint, "--gen-subset", split]
    command += ["--source-lang", data.source, "--target-lang", data.target, *data.detokenisation()]
    command += ["--beam", str(beam), "--lenpen", str(lenpen), *LONGEST.split(), "--max-tokens", "4000"]
    command += ["--required-batch-size-multiple", "1", "--no-progress-bar", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            "\n".join(["evaluate.py: fairseq-generate failed:", *done.stderr.splitlines()[-15:]])
        )
    by_number = {int(number): text for number, text in HYPOTHESIS.findall(done.stdout)}
    missing = set(range(len(by_number))) - set(by_number)
    if missing:
        raise SystemExit(
            f"evaluate.py: fairseq-generate gave no hypothesis for sentence {min(missing)} of {split}"
        )
    return [by_number[number] for number in range(len(by_number))]


def bucket_names(bounds: Sequence[int]) -> list[str]:
    """Of (10, 20): 1-10, 11-20, 21+."""
    starts = [1, *(bound + 1 for bound in bounds)]
    return [*(f"{start}-{end}" for start, end in zip(starts, bounds, strict=False)), f"{starts[-1]}+"]


def bucket_of(sentence: str, bounds: Sequence[int]) -> int:
    """The bucket of a source sentence by its words: a bound is the last length of its bucket."""
    return sum(len(sentence.split()) > bound for bound in bounds)


def bleu_by_length(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], bounds: Sequence[int]
) -> list[tuple[str, int, float | None]]:
    """(source words, sentences, BLEU of these sentences as a corpus), None of an empty bucket."""
    found = []
    for i, name in enumerate(bucket_names(bounds)):
        own = [n for n, sentence in enumerate(sources) if bucket_of(sentence, bounds) == i]
        bleu = corpus_bleu([hypotheses[n] for n in own], [references[n] for n in own]) if own else None
        found.append((name, len(own), bleu))
    return found


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    return BLEU().corpus_score(hypotheses, [references]).score


def described(metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """The score, and the line with signature that sacreBLEU prints."""
    score = metric.corpus_score(hypotheses, [references])
    return score.score, score.format(signature=str(metric.get_signature()))


def score(
    data: Data, split: str, beam: int, lenpen: float, hypotheses: list[str], bounds: Sequence[int], path: Path
) -> Scores:
    """SystemExit if there is not a hypothesis for every reference."""
    references = data.raw(split, data.target)
    if len(hypotheses) != len(references):
        raise SystemExit(
            f"evaluate.py: {len(hypotheses)} hypotheses for the {len(references)} sentences of {split}"
        )
    bleu, chrf = (described(metric, hypotheses, references) for metric in (BLEU(), CHRF()))
    by_length = bleu_by_length(data.raw(split, data.source), hypotheses, references, bounds)
    return Scores(split, beam, lenpen, *bleu, *chrf, by_length, path.name)


def evaluate(args: argparse.Namespace) -> list[Scores]:
    """Of the first split with every setting, of the others with the best one."""
    data, settings, found = read_data(args.data), list(product(args.beam, args.lenpen)), []
    for split in args.split:
        here = []
        for beam, lenpen in settings:
            path = args.out / f"{split}.beam{beam}.lenpen{lenpen:g}.{data.target}"
            if not (args.again and is_newer(path, args.checkpoint)):
                write_lines(path, translate(args.checkpoint, data, split, beam, lenpen, args.flags))
            here.append(score(data, split, beam, lenpen, read_lines(path), args.lengths, path))
            show(here[-1])
        best = max(here, key=lambda scores: scores.bleu)
        settings = [(best.beam, best.lenpen)]
        found += here
    return found


def asked_before(args: argparse.Namespace) -> bool:
    """Whether what lies in --out is of this checkpoint, data and flags; says so for the next time."""
    asked = {"checkpoint": args.checkpoint, "data": str(args.data.resolve()), "flags": args.flags}
    said = args.out / "made-of.json"
    same = said.exists() and json.loads(said.read_text()) == asked
    said.write_text(json.dumps(asked))
    return same


def is_newer(path: Path, checkpoints: str) -> bool:
    made = [Path(checkpoint).stat().st_mtime for checkpoint in checkpoints.split(":")]
    return path.exists() and path.stat().st_mtime > max(made)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    part.replace(path)


def show(scores: Scores) -> None:
    """The last line is the BLEU, which fastweights-compare reads."""
    print(f"\n== {scores.split}, beam {scores.beam}, length penalty {scores.lenpen:g}")
    print("source words  sentences   BLEU")
    for name, sentences, bleu in scores.by_length:
        print(f"{name:>12} {sentences:>10} {'-' if bleu is None else format(bleu, '.2f'):>6}")
    print(scores.chrf_line)
    print(scores.bleu_line, flush=True)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="several, joined by colons, are an ensemble")
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", nargs="+", default=["valid", "test"])
    parser.add_argument("--beam", nargs="+", type=int, default=[5])
    parser.add_argument("--lenpen", nargs="+", type=float, default=[1.0])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="where buckets end (words)")
    parser.add_argument("--out", type=Path)
    own, flags = words, []
    if "--" in words:
        own, flags = words[: words.index("--")], words[words.index("--") + 1 :]
    args = parser.parse_args(own)
    args.flags, args.again = flags, False
    for checkpoint in args.checkpoint.split(":"):
        if not Path(checkpoint).exists():
            parser.error(f"there is no checkpoint {checkpoint}")
    if list(args.lengths) != sorted(set(args.lengths)):
        parser.error(f"--lengths must grow, got {args.lengths}")
    first, *others = map(Path, args.checkpoint.split(":"))
    args.out = args.out or first.with_name("+".join(x.stem for x in (first, *others)) + "-scores")
    return args


def main() -> None:
    args = arguments(sys.argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    args.again = asked_before(args)
    found = evaluate(args)
    (args.out / "scores.json").write_text(json.dumps([asdict(scores) for scores in found], indent=1))


if __name__ == "__main__":
    main()
