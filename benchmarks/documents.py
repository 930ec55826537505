"""Translating documents: what the decoder keeps and how long a step takes, by the length of the translation.

    python benchmarks/documents.py DATA CHECKPOINT [CHECKPOINT ...]

DATA is a folder of examples/translation/prepare_pairs.sh, CHECKPOINT a translation model. Documents are 20 test
sentences joined; beam 5, and no translation ends before --words words, as the models have seen single sentences.
Bytes are those of the incremental state of a hypothesis at the end of a step, without what cross-attention computed
once from the source.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from decoding import state_bytes
from fairseq import checkpoint_utils, utils
from measure import machine

import fairseq_fastweights

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples/translation"))

from evaluate import read_data  # noqa: E402

STRETCH = 50  # steps of a row of the table


def documents(folder: Path, sentences: int, count: int) -> list[str]:
    """The first ``count`` documents of the test set, in pieces."""
    data = read_data(folder)
    lines = data.raw("test", data.source)
    cut = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces/spm.model"))
    joined = [" ".join(lines[i * sentences : (i + 1) * sentences]) for i in range(count)]
    return [" ".join(cut.encode(text, out_type=str)) for text in joined]


def measure(path: str, folder: Path, texts: list[str], words: int) -> tuple[list[float], list[float]]:
    """(bytes a hypothesis, seconds) of every step."""
    overrides = {"data": str(folder / "bin"), "max_source_positions": 4096, "max_target_positions": 4096}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], overrides)
    (model,) = models
    model.eval().prepare_for_inference_(cfg)
    rows = [task.source_dictionary.encode_line(text, add_if_not_exist=False).long() for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    pad = task.source_dictionary.pad()
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    for row, text in zip(tokens, rows):
        row[len(row) - len(text) :] = text  # fairseq pads sources on the left
    kept, seconds, decode = [], [], model.decoder.forward

    def watched(previous, *args, incremental_state=None, **kwargs):
        start = time.perf_counter()
        out = decode(previous, *args, incremental_state=incremental_state, **kwargs)
        seconds.append(time.perf_counter() - start)
        own = {name: x for name, x in incremental_state.items() if id_of(name) not in crossed}
        kept.append(state_bytes(own) / previous.shape[0])
        return out

    crossed = {layer.encoder_attn._incremental_state_id for layer in model.decoder.layers}
    model.decoder.forward = watched
    search = argparse.Namespace(beam=5, min_len=words, max_len_a=0, max_len_b=words + 1)
    generator = task.build_generator([model], search)
    task.inference_step(generator, [model], {"net_input": {"src_tokens": tokens, "src_lengths": lengths}})
    return kept, seconds


def id_of(name: str) -> str:
    """The attention to which an entry of an incremental state belongs."""
    return name.partition(".")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--sentences", type=int, default=20, help="of a document")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--words", type=int, default=400, help="steps, at least")
    args = parser.parse_args()
    utils.import_user_module(argparse.Namespace(user_dir=str(Path(fairseq_fastweights.__file__).parent)))
    texts = documents(args.data, args.sentences, args.documents)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    pieces = [len(text.split()) for text in texts]
    print(f"{len(texts)} documents of {args.sentences} sentences, {min(pieces)} to {max(pieces)} pieces\n")
    print("| checkpoint | steps | most bytes a hypothesis | ms a step, median |\n|---|---:|---:|---:|")
    for path in args.checkpoints:
        kept, seconds = measure(path, args.data, texts, args.words)
        for first in range(0, args.words, STRETCH):
            steps = slice(first, first + STRETCH)
            milliseconds = 1e3 * statistics.median(seconds[steps])
            span = f"{first + 1}-{first + STRETCH}"
            name = Path(path).parent.name
            print(f"| {name} | {span} | {max(kept[steps]):,.0f} | {milliseconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
