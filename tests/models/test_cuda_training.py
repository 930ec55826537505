"""Whole models on the CUDA kernels, run on the CPU: some updates and beam search equal those of the PyTorch backend."""

import pytest
import torch
from tiny_models import WORDS, lively, lm_model, source_batch, translate, translation_model

RULES = {
    "delta, dpfp": {"feature_map": "dpfp"},
    "sum": {"update_rule": "sum"},
    "gated-delta": {"update_rule": "gated-delta"},
    "delta, attention-normalised": {"attention_normalization": "true"},
    "fast weights everywhere": {"update_rule_encoder": "delta", "update_rule_cross": "delta"},
}


def train(model, updates=3):
    """Losses and parameters of some updates on fixed random sentences."""
    g = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(updates):
        tokens = torch.randint(WORDS.nspecial, len(WORDS), (2, 21), generator=g)
        if hasattr(model, "encoder"):
            lengths = torch.tensor([21, 17])
            source = tokens.clone()
            source[1, 17:] = WORDS.pad()
            logits = model(source, lengths, tokens[:, :-1])[0]
        else:
            logits = model(tokens[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_training_equals_the_pytorch_backend(cupy, options):
    results = {}
    for backend in ("chunked", "cuda"):
        model = translation_model(fast_weight_backend=backend, **options)
        results[backend] = train(model)
    assert {name for name, _, _ in cupy.launches} >= {"scan_forward", "scan_backward"}
    losses, parameters = results["cuda"]
    expected_losses, expected_parameters = results["chunked"]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-4, atol=1e-6)


def test_language_model_equals_the_pytorch_backend(cupy):
    losses = [train(lm_model(fast_weight_backend=backend))[0] for backend in ("chunked", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert cupy.launches


def test_checkpointed_activations(cupy):
    losses = [
        train(translation_model(fast_weight_backend="cuda", checkpoint_activations=again))[0]
        for again in (False, True)
    ]
    assert losses[0] == losses[1]


def test_autocast_to_bfloat16(cupy):
    """Under autocast both backends get the same bfloat16 projections and keep float32 sums."""
    for options in ({}, {"update_rule": "sum"}):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [
                train(translation_model(fast_weight_backend=backend, **options), updates=2)[0]
                for backend in ("chunked", "cuda")
            ]
        assert losses[1] == pytest.approx(losses[0], rel=3e-3)


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_beam_search_equals_the_pytorch_backend(cupy, options):
    hypotheses = []
    for backend in ("chunked", "cuda"):
        model = lively(translation_model(fast_weight_backend=backend, **options)).float()
        hypotheses.append(translate(model, *source_batch()))
    assert any(name == "step" for name, _, _ in cupy.launches)
    for expected, found in zip(*hypotheses):
        assert [h["tokens"].tolist() for h in found] == [h["tokens"].tolist() for h in expected]
        torch.testing.assert_close(
            torch.stack([h["score"] for h in found]),
            torch.stack([h["score"] for h in expected]),
            rtol=1e-4,
            atol=1e-4,
        )
