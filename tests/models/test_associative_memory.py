"""The memories of the synthetic experiments against loops in float64 that follow the formulas."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_fastweights.models.associative_memory import EPS, MEMORIES, AssociativeMemory

B, L, DK, DV = 3, 9, 5, 4


def operands():
    q, k = torch.rand(B, DK), torch.rand(B, L, DK)
    v, beta = torch.randn(B, L, DV), torch.rand(B, L)
    return tuple(x.double() for x in (q, k, v, beta))


def softmax(q, k, v, beta):
    weights = torch.tensor([float(torch.dot(key, q)) / DK**0.5 for key in k], dtype=torch.float64).exp()
    return sum(weight * value for weight, value in zip(weights, v)) / weights.sum()


def total(q, k, v, beta):
    w = sum(torch.outer(value, key) for key, value in zip(k, v))
    return w @ q / (k.sum(0) @ q + EPS)


def delta(q, k, v, beta):
    w = torch.zeros(DV, DK, dtype=torch.float64)
    for key, value, strength in zip(k, v, beta):
        key = key / key.sum()
        old = w @ key
        w = w - torch.outer(old, key) + torch.outer(strength * value + (1 - strength) * old, key)
    return w @ q / (q.sum() + EPS)


def fwm(q, k, v, beta):
    w = torch.zeros(DV, DK, dtype=torch.float64)
    for t, (key, value, strength) in enumerate(zip(k, v, beta)):
        old = w @ key
        w = w - torch.outer(old, key) + torch.outer(strength * value + (1 - strength) * old, key)
        if t > 0:  # the authors' first write is not scaled
            w = w / max(1.0, float(w.norm()))
    read = w @ q
    return (read - read.mean()) / (read.var(unbiased=False) + 1e-5).sqrt()


LOOPS = {"softmax": softmax, "sum": total, "delta": delta, "fwm": fwm}


@pytest.mark.parametrize("rule", MEMORIES)
def test_memory_is_its_formula(rule):
    rows = operands()
    expected = torch.stack([LOOPS[rule](*row) for row in zip(*rows)])
    torch.testing.assert_close(MEMORIES[rule](*rows), expected, rtol=1e-9, atol=1e-12)


def memory(rule, feature_map="elu", favor_features=None):
    args = SimpleNamespace(
        update_rule=rule, feature_map=feature_map, dpfp_nu=1, favor_features=favor_features, key_dim=8
    )
    return AssociativeMemory(6, args)


def sample():
    """Keys and values (2, 7), queries (2,)."""
    return torch.randint(6, (2, 7)), torch.randint(6, (2, 7)), torch.randint(6, (2,))


@pytest.mark.parametrize("rule", MEMORIES)
def test_parameters_have_gradients_where_the_rule_uses_them(rule):
    model = memory(rule)
    model(*sample()).square().sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == ({"beta_proj.weight", "beta_proj.bias"} if rule == "sum" else set())


@pytest.mark.parametrize("rule", MEMORIES)
def test_memory_is_given_projections_of_each_key_beside_its_one_hot_value(rule):
    model = memory(rule).double()
    keys, values, query = sample()
    x = torch.cat([torch.eye(6, dtype=torch.float64)[values], model.embed_keys(keys)], dim=-1)
    phi = model.phi or torch.nn.Identity()
    beta = None if rule == "softmax" else model.beta_proj(x).squeeze(-1).sigmoid()
    given = phi(model.q_proj(model.embed_keys(query))), phi(model.k_proj(x)), x[..., :6], beta
    torch.testing.assert_close(model(keys, values, query), MEMORIES[rule](*given), rtol=1e-12, atol=1e-12)


def test_directions_are_new_for_every_batch_and_repeatable():
    model = memory("sum", "favor", favor_features=4)
    given = sample()

    def outputs(training, updates):
        model.train(training).set_num_updates(updates)
        return [model(*given) for _ in range(2)]

    first, second = outputs(False, 3)
    assert not torch.equal(first, second)
    assert torch.equal(first, outputs(False, 3)[0]) and torch.equal(second, outputs(False, 3)[1])
    assert not torch.equal(first, outputs(False, 4)[0])
    trained = outputs(True, 3)[0]
    assert not torch.equal(trained, outputs(True, 4)[0])
    assert torch.equal(trained, outputs(True, 3)[0])


def test_nothing_is_added_to_random_features():
    """Unlike in the language model: far from 0 they vanish."""
    features = memory("sum", "favor", favor_features=4).phi(torch.full((1, 8), 9.0))
    assert 0 <= features.max() < 1e-9
