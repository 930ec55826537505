"""Documents: 20 sentences joined are translated with memory that does not grow from step to step."""

import sys
from pathlib import Path

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import SOFTMAX, WORDS, lively, source_batch, teacher_forced_scores, translation_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from decoding import state_bytes  # noqa: E402

STEPS, WARM = 160, 40  # by then the pairs that are kept before a matrix is made have been folded once
RULES = {
    "delta everywhere": {
        "update_rule": "delta",
        "update_rule_encoder": "delta",
        "update_rule_cross": "delta",
    },
    "delta in the decoder": {**SOFTMAX, "update_rule": "delta"},
    "sum everywhere": {"update_rule": "sum", "update_rule_encoder": "sum", "update_rule_cross": "sum"},
    "gated-delta, plain path": {**SOFTMAX, "update_rule": "gated-delta", "fast_weight_backend": "chunked"},
    "softmax": SOFTMAX,
}


def document():
    """20 sentences of one to twelve words as one."""
    tokens, _ = source_batch(lengths=[1 + i * 7 % 12 for i in range(20)])
    words = tokens[(tokens != WORDS.pad()) & (tokens != WORDS.eos())]
    return torch.cat([words, torch.tensor([WORDS.eos()])])[None]


@pytest.mark.parametrize("rules", RULES)
def test_memory_of_a_step_does_not_grow(rules):
    model = lively(translation_model(**RULES[rules]))
    kept, decode = [], model.decoder.forward

    def watched(previous, *args, incremental_state=None, **kwargs):
        out = decode(previous, *args, incremental_state=incremental_state, **kwargs)
        kept.append(state_bytes(incremental_state))
        return out

    model.decoder.forward = watched
    tokens = document()
    generator = SequenceGenerator([model], WORDS, beam_size=3, max_len_a=0, max_len_b=STEPS, min_len=STEPS)
    net_input = {"src_tokens": tokens, "src_lengths": torch.tensor([tokens.shape[1]])}
    ((best, *_),) = generator.generate([model], {"net_input": net_input})
    assert len(kept) == len(best["tokens"]) == STEPS + 1
    assert (max(kept[WARM:]) > max(kept[:WARM])) == (rules == "softmax")
    model.decoder.forward = decode
    expected = teacher_forced_scores(model, best, tokens, net_input["src_lengths"])
    # fairseq keeps sums of scores, in float32
    assert (best["positional_scores"] - expected).abs().max() < 1e-4 * expected.sum().abs()
