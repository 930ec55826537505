"""Decoding: fast weights against fairseq's transformers with their key-value cache, same sizes, random weights.

    python benchmarks/decoding.py                     # translation with beam search, then a language model by position
    python benchmarks/decoding.py --row translation

translation: fairseq's SequenceGenerator, beam 5, sentences of WMT's lengths, targets as long as their sources; tokens
a second of the best hypotheses. The fast-weight model's hypotheses are compared with those of its plain path
(backend chunked). language-model: seconds a token at a position, batch 16, and bytes of the incremental state.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, summary, write_json
from training import LM, VOCABULARY, prepare

from fairseq_fastweights.ops.lazy_state import LazyState

TRANSLATION = {
    "softmax": "--arch transformer_iwslt_de_en",
    "delta": "--arch fast_weight_transformer_iwslt_de_en --update-rule delta --feature-map elu",
    "delta, plain path": "--arch fast_weight_transformer_iwslt_de_en --update-rule delta --feature-map elu "
    "--fast-weight-backend chunked",
}
LANGUAGE_MODEL = {
    "softmax": f"{LM} --arch transformer_lm",
    "delta": f"{LM} --arch fast_weight_lm --update-rule delta --feature-map elu",
}


def build(data: Path, options: str):
    """(task, model in evaluation mode) as fairseq-generate would have them, with weights of seed 1."""
    from fairseq import options as fairseq_options
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    from fairseq_fastweights import compat  # noqa: F401

    parser = fairseq_options.get_training_parser()
    args = fairseq_options.parse_args_and_arch(parser, [str(data), "--cpu", *options.split()])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).eval()
    model.prepare_for_inference_(cfg)
    return task, model


def wmt_batches(task, sentences: int, rng: random.Random):
    """Batches of about 40 sentences of newstest's lengths in sub-words (log-normal, median 28), shortest first."""
    lengths = sorted(max(3, min(120, int(rng.lognormvariate(3.33, 0.55)))) for _ in range(sentences))
    dictionary = task.source_dictionary
    batches = []
    for first in range(0, sentences, 40):
        group = lengths[first : first + 40]
        tokens = torch.full((len(group), max(group) + 1), dictionary.pad(), dtype=torch.long)
        for row, length in zip(tokens, group):
            words = torch.tensor(
                [4 + int(VOCABULARY ** rng.random()) % (len(dictionary) - 4) for _ in range(length)]
            )
            row[-length - 1 : -1], row[-1] = words, dictionary.eos()  # fairseq pads sources on the left
        batches.append({"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor(group) + 1}})
    return batches


def translation(data: Path, sentences: int, repeats: int):
    """Seconds a token for every model, in turns batch by batch; and how far fast and plain hypotheses agree."""
    options = "--task translation --share-all-embeddings --criterion cross_entropy --optimizer adam"
    runs = {name: build(data, f"{options} {arch}") for name, arch in TRANSLATION.items()}
    batches = wmt_batches(next(iter(runs.values()))[0], sentences, random.Random(2))
    generators = {}
    for name, (task, model) in runs.items():
        search = argparse.Namespace(beam=5, max_len_a=1.0, max_len_b=0, lenpen=1.0)
        generators[name] = task.build_generator([model], search)
    seconds = {name: [] for name in runs}
    best = {name: [] for name in runs}
    for repeat in range(repeats):
        # the plain path is there for its hypotheses: once is enough
        taking_turns = {n: run for n, run in runs.items() if repeat == 0 or not n.endswith("plain path")}
        spent, tokens = dict.fromkeys(taking_turns, 0.0), dict.fromkeys(taking_turns, 0)
        for batch in batches:
            for name, (task, model) in taking_turns.items():
                start = time.perf_counter()
                hypotheses = task.inference_step(generators[name], [model], batch)
                spent[name] += time.perf_counter() - start
                tokens[name] += sum(len(h[0]["tokens"]) for h in hypotheses)
                if repeat == 0:
                    best[name] += [(h[0]["tokens"].tolist(), float(h[0]["score"])) for h in hypotheses]
        for name in taking_turns:
            seconds[name].append(spent[name] / tokens[name])
    ties = [abs(a[1] - b[1]) for a, b in zip(best["delta"], best["delta, plain path"]) if a[0] != b[0]]
    same = {
        "sentences": sentences,
        "different": len(ties),
        "largest score difference of those": max(ties, default=0),
    }
    return {
        name: {**summary(s), "tokens_per_second": 1 / statistics.median(s)} for name, s in seconds.items()
    }, same


def state_at(model, tokens, position: int):
    """The incremental state after ``position`` tokens, filled directly: only its size matters.

    A fast-weight state has its matrices by then, and pairs since.
    """
    state = {}
    model.decoder(tokens[:, :1], incremental_state=state)
    for layer in model.decoder.layers:
        attention = layer.self_attn
        buffer = attention._get_input_buffer(state)
        for name in ("prev_key", "prev_value"):
            if name in buffer:
                batch, heads, _, width = buffer[name].shape
                buffer[name] = torch.randn(batch, heads, position, width)
        if "kept" in buffer:
            buffer["kept"].fold()
        if "prev_key" in buffer:
            attention._set_input_buffer(state, buffer)
    return state


def state_bytes(state) -> int:
    """Bytes that the tensors of an incremental state hold, shared memory counted once."""
    storages = {}
    for entry in state.values():
        tensors = list(entry.values())
        tensors += [x for lazy in tensors if isinstance(lazy, LazyState) for x in vars(lazy).values()]
        for x in tensors:
            if torch.is_tensor(x):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def language_model(data: Path, batch: int, steps: int, positions=(256, 4096)):
    """Seconds a token after so many tokens, and bytes of the state a hypothesis, for every model and position."""
    results = {}
    runs = {
        name: build(data, f"{options} --max-target-positions 8192")[1]
        for name, options in LANGUAGE_MODEL.items()
    }
    tokens = torch.randint(4, VOCABULARY, (batch, max(positions) + steps + 8))
    with torch.no_grad():
        states = {(name, p): state_at(model, tokens, p) for name, model in runs.items() for p in positions}
        seconds = {key: [] for key in states}
        for step in range(steps + 2):
            for (name, position), state in states.items():
                start = time.perf_counter()
                runs[name].decoder(tokens[:, : position + step + 1], incremental_state=state)
                if step >= 2:
                    seconds[name, position].append(time.perf_counter() - start)
    for (name, position), taken in seconds.items():
        results.setdefault(name, {})[position] = {
            **summary(taken),
            "bytes": state_bytes(states[name, position]) / batch,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=["translation", "language-model"])
    parser.add_argument("--sentences", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="language-model: tokens timed at each position")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = args.row or ["translation", "language-model"]
        if "translation" in rows:
            rates, same = translation(Path(folder) / "mt", args.sentences, args.repeats)
            results["translation"] = {**rates, "hypotheses": same}
            for name, rate in rates.items():
                print(
                    f"translation, {name}: {rate['tokens_per_second']:.0f} tokens/s (spread {rate['spread']:.0%})"
                )
            print(f"translation, delta against its plain path: {same}", flush=True)
        if "language-model" in rows:
            results["language-model"] = language_model(Path(folder) / "lm", 16, args.steps)
            for name, positions in results["language-model"].items():
                for position, r in positions.items():
                    print(
                        f"language-model, {name}, position {position}: {1e3 * r['median']:.1f} ms a step of 16 "
                        f"(spread {r['spread']:.0%}), {r['bytes'] / 1e6:.2f} MB a hypothesis"
                    )
    write_json(args.json, results)


if __name__ == "__main__":
    main()
