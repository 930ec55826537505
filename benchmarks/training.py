"""Words per second of fairseq's training loop: fast weights against fairseq's own transformers of the same size.

    python benchmarks/training.py                              # all rows
    python benchmarks/training.py --row lm-1024 --updates 9    # one row

Every row builds two models as fairseq-train does, with the task, criterion, optimizer and Trainer it would use, and
gives them the same batches in turns in one process. Words per second is fairseq's: target tokens over the time of
Trainer.train_step, dropout and optimizer included. The ratio is the median over the updates.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, summary, write_json

VOCABULARY = 10_000

LM = (
    "--task language_modeling --decoder-layers 6 --decoder-embed-dim 512 --decoder-ffn-embed-dim 2048 "
    "--decoder-attention-heads 8 --share-decoder-input-output-embed --dropout 0.1 --sample-break-mode none"
)
MT = (
    "--task translation --arch {} --share-all-embeddings --criterion label_smoothed_cross_entropy "
    "--label-smoothing 0.1 --dropout 0.3 --max-tokens 2000"
)


def lm(tokens: int, batch: int):
    sizes = f"{LM} --tokens-per-sample {tokens} --max-target-positions {tokens} --batch-size {batch}"
    return {
        "softmax": f"{sizes} --arch transformer_lm",
        "delta": f"{sizes} --arch fast_weight_lm --update-rule delta --feature-map elu",
    }


ROWS = {
    "lm-256": lm(256, 8),
    "lm-1024": lm(1024, 2),
    "lm-4096": lm(4096, 1),
    "translation-iwslt": {
        "softmax": MT.format("transformer_iwslt_de_en"),
        "delta": MT.format("fast_weight_transformer_iwslt_de_en") + " --update-rule delta --feature-map elu",
    },
}
UPDATES = {"lm-256": 9, "lm-1024": 9, "lm-4096": 5, "translation-iwslt": 13}


def zipf_line(rng: random.Random, words: int) -> str:
    """Words w1, w2, ... with Zipf's frequencies: what a tokenizer's output looks like to a training loop."""
    ranks = [min(VOCABULARY - 4, int(VOCABULARY ** rng.random())) for _ in range(words)]
    return " ".join(f"w{rank}" for rank in ranks)


def prepare(folder: Path) -> None:
    """A language-model text and 4000 sentence pairs of IWSLT's lengths (log-normal, median 19), binarised."""
    rng = random.Random(1)
    (folder / "dict.txt").write_text("".join(f"w{n} {VOCABULARY - n}\n" for n in range(VOCABULARY - 4)))
    lines = [zipf_line(rng, 100) for _ in range(2000)]
    (folder / "text").write_text("\n".join(lines) + "\n")
    for language in ("a", "b"):
        lengths = [max(1, min(150, int(rng.lognormvariate(2.95, 0.6)))) for _ in range(4000)]
        (folder / f"pairs.{language}").write_text("".join(zipf_line(rng, n) + "\n" for n in lengths))
    preprocess = [sys.executable, "-m", "fairseq_cli.preprocess", "--srcdict", str(folder / "dict.txt")]
    for options in (
        ["--only-source", "--trainpref", str(folder / "text"), "--destdir", str(folder / "lm")],
        ["--joined-dictionary", "-s", "a", "-t", "b", "--trainpref", str(folder / "pairs")]
        + ["--destdir", str(folder / "mt")],
    ):
        subprocess.run([*preprocess, *options], check=True, capture_output=True)


class Training:
    """A model, its trainer and an endless supply of batches, as fairseq_cli.train sets them up."""

    def __init__(self, data: Path, options: str):
        from fairseq import options as fairseq_options
        from fairseq import tasks
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.trainer import Trainer

        from fairseq_fastweights import compat  # noqa: F401

        parser = fairseq_options.get_training_parser()
        common = "--cpu --optimizer adam --lr 1e-4 --clip-norm 1.0 --seed 1 --no-save --disable-validation"
        args = fairseq_options.parse_args_and_arch(parser, [str(data), *common.split(), *options.split()])
        cfg = convert_namespace_to_omegaconf(args)
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        task.load_dataset("train")
        model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, task, model, criterion)
        self.trainer.get_train_iterator(epoch=1)
        self.batches = task.get_batch_iterator(
            task.dataset("train"),
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            max_positions=(10**6, 10**6) if cfg.task._name == "translation" else 10**6,
            required_batch_size_multiple=8 if cfg.dataset.max_tokens else 1,
            seed=1,
        )
        self.iterator = iter(())
        self.parameters = sum(p.numel() for p in model.parameters())

    def update(self) -> float:
        """Seconds a target token of the next update; every run gets the same batches in the same order."""
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = self.batches.next_epoch_itr(shuffle=True)
            batch = next(self.iterator)
        start = time.perf_counter()
        self.trainer.train_step([batch])
        return (time.perf_counter() - start) / batch["ntokens"]


def measure(data: Path, options, updates: int):
    runs = {name: Training(data, option) for name, option in options.items()}
    seconds = {name: [] for name in runs}
    for number in range(updates + 2):  # the first two warm up
        for name, run in runs.items():
            taken = run.update()
            if number >= 2:
                seconds[name].append(taken)
    result = {
        name: {
            **summary(times),
            "words_per_second": 1 / statistics.median(times),
            "parameters": runs[name].parameters,
        }
        for name, times in seconds.items()
    }
    # update by update, since batches of different shapes differ in speed
    result["ratio"] = statistics.median(s / d for s, d in zip(seconds["softmax"], seconds["delta"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=list(ROWS))
    parser.add_argument("--updates", type=int, help="timed updates of each model; default: a row's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="training.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in args.row or ROWS:
            data = Path(folder) / ("mt" if name.startswith("translation") else "lm")
            row = measure(data, ROWS[name], args.updates or UPDATES[name])
            results.append({"row": name, **row})
            rates = ", ".join(
                f"{n} {row[n]['words_per_second']:.0f} (spread {row[n]['spread']:.0%})" for n in ROWS[name]
            )
            print(f"{name}: words/s {rates}; ratio {row['ratio']:.2f}", flush=True)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
