"""Feature maps against their published formulas, and the normalisations at their edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_fastweights import feature_maps
from fairseq_fastweights.feature_maps import (
    FEATURE_MAPS,
    NORMALIZATIONS,
    Elu,
    FeatureMap,
    address,
    build_feature_map,
    normalize,
)
from fairseq_fastweights.ops import numba_scan

OPTIONS = {"dpfp": {"nu": 2}, "favor": {"features": 6}}


def build(name, head_dim=8):
    return build_feature_map(name, head_dim, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_output_dim_sign_and_dtype(name):
    phi = build(name)
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        y = phi(torch.randn(3, 5, 8).to(dtype))
        assert y.shape == (3, 5, phi.output_dim) and y.dtype == expected
        assert phi.signed or (y >= 0).all()
    assert not phi.signed or (phi(torch.randn(100, 8)) < 0).any()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradcheck(name):
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(build(name).double(), x)


def test_elu_plus_one():
    x = torch.tensor([-100.0, -20.0, -1.0, 0.0, 2.0])
    expected = torch.tensor([math.exp(-100), math.exp(-20), math.exp(-1), 1.0, 3.0])
    torch.testing.assert_close(build("elu")(x), expected, rtol=1e-6, atol=0)


def test_elu_keeps_small_features_in_bfloat16():
    """ELU(x) + 1 in bfloat16 cancels to exactly 0 below x = -5."""
    x = torch.tensor([-6.0, -8.0], dtype=torch.bfloat16)
    torch.testing.assert_close(build("elu")(x), x.float().exp())


@pytest.mark.parametrize("head_dim, nu", [(2, 1), (3, 2), (4, 3), (5, 9)])
def test_dpfp_is_equation_37_in_the_order_of_the_listing(head_dim, nu):
    """Feature (j - 1) 2d + i is x'_i x'_{i-j}, indices around the ring of x' = [relu(x), relu(-x)]."""
    x = torch.randn(head_dim)
    both = [max(v, 0.0) for v in x.tolist()] + [max(-v, 0.0) for v in x.tolist()]
    ring = len(both)
    expected = [both[i] * both[(i - j) % ring] for j in range(1, nu + 1) for i in range(ring)]
    y = build_feature_map("dpfp", head_dim, nu=nu)(x)
    torch.testing.assert_close(y, torch.tensor(expected))
    assert y.numel() == 2 * head_dim * nu


def test_dpfp_of_negative_inputs_is_not_zero():
    """cat([relu(x), -relu(x)]), seen elsewhere, maps every all-negative vector to zero."""
    assert build("dpfp")(-torch.rand(8) - 0.1).sum() > 0


def test_favor_follows_the_authors_language_model():
    phi = build("favor").double()
    x = torch.randn(5, 8, dtype=torch.float64)
    projected = x @ phi.projection
    half_square = (x**2).sum(-1, keepdim=True) / 2
    expected = torch.cat([(projected - half_square).exp(), (-projected - half_square).exp()], dim=-1)
    torch.testing.assert_close(phi(x), (expected + 1e-4) * 12**-0.5)


def test_favor_estimates_the_softmax_kernel():
    """phi(q) . phi(k) -> exp(q . k); with scale_input exp(q . k / sqrt(d))."""
    q, k = 0.3 * torch.randn(2, 200, 8, dtype=torch.float64)
    for scaled in (False, True):
        phi = build_feature_map("favor", 8, features=4096, scale_input=scaled).double()
        estimate = (phi(q) * phi(k)).sum(-1)
        dot = (q * k).sum(-1)
        exact = (dot / 8**0.5 if scaled else dot).exp()
        assert ((estimate - exact).abs() / exact).mean() < 0.02


def test_favor_stabilizer_changes_each_row_by_a_factor():
    phi = build_feature_map("favor", 8, features=6, stabilizer=True)
    plain = build_feature_map("favor", 8, features=6)
    plain.load_state_dict(phi.state_dict())
    phi.eps = plain.eps = 0.0
    x = torch.randn(4, 8)
    torch.testing.assert_close(normalize(phi(x), "sum"), normalize(plain(x), "sum"))
    huge = 30 * torch.randn(4, 8)
    assert (plain(huge).sum(-1) == 0).any()
    assert (phi(huge).sum(-1) > 0).all()


@pytest.mark.parametrize("head_dim, m", [(16, 8), (16, 16), (8, 16), (7, 5)])
def test_favor_rows_are_orthogonal_within_blocks(head_dim, m):
    p = build_feature_map("favor", head_dim, features=m).projection
    for start in range(0, head_dim, m):
        block = p[start : start + m].double()
        gram = block @ block.T
        off = gram - torch.diag(gram.diagonal())
        assert off.abs().max() < 1e-4 * gram.abs().max()
    assert p.norm(dim=1).std() > 0  # Gaussian lengths, not sqrt(m)


def test_favor_redraws_by_update_number_and_never_in_evaluation():
    phi = build("favor")
    first = phi.projection.clone()
    phi.set_num_updates(7)
    seventh = phi.projection.clone()
    assert not torch.equal(first, seventh)
    phi.set_num_updates(8)
    phi.eval()
    eighth = phi.projection.clone()
    phi.set_num_updates(9)
    assert torch.equal(phi.projection, eighth)
    phi.train().set_num_updates(7)
    assert torch.equal(phi.projection, seventh), "the draw must depend on the number alone"


def test_favor_is_the_same_on_every_rank_and_after_a_reload():
    """Built from one seed: the same; loaded into a model of another seed: the same draws afterwards."""
    torch.manual_seed(3)
    one = build("favor")
    torch.manual_seed(3)
    two = build("favor")
    other = build("favor")
    assert not torch.equal(one.projection, other.projection)
    other.load_state_dict(one.state_dict())
    for phi in (one, two, other):
        phi.set_num_updates(100)
    assert torch.equal(one.projection, two.projection)
    assert torch.equal(one.projection, other.projection)


@pytest.mark.parametrize("interval, changes", [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_favor_redraw_interval(interval, changes):
    phi = build_feature_map("favor", 8, features=6, redraw_interval=interval)
    phi.set_num_updates(0)
    changed = []
    for update in range(1, 7):
        before = phi.projection.clone()
        phi.set_num_updates(update)
        if not torch.equal(before, phi.projection):
            changed.append(update)
    assert changed == changes


def test_favor_does_not_touch_the_global_random_state_when_it_redraws():
    phi = build("favor")
    before = torch.get_rng_state()
    phi.set_num_updates(5)
    assert torch.equal(before, torch.get_rng_state())


def test_favor_in_half_precision_is_computed_in_float32():
    phi = build("favor").half()
    x = torch.randn(4, 8).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = phi(x)
    exact = build("favor").double()
    exact.load_state_dict(
        {n: b.double() if b.is_floating_point() else b for n, b in phi.state_dict().items()}
    )
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "cosine",
            {},
            "feature map must be one of elu, relu, dpfp, favor, tanh, identity, softmax, got 'cosine'",
        ),
        ("dpfp", {"nu": 16}, r"dpfp nu must be an int from 1 to 15 \(2 head_dim - 1\), got 16"),
        ("dpfp", {"nu": 0}, "dpfp nu must be an int from 1 to 15"),
        ("dpfp", {"nu": 1.5}, "dpfp nu must be an int"),
        ("favor", {}, "favor needs features, .*--favor-features.*got None"),
        ("favor", {"features": 0}, "favor needs features"),
        (
            "favor",
            {"features": 4, "redraw_interval": -1},
            "favor redraw_interval must be an int of at least 0",
        ),
        ("elu", {"nu": 2}, "feature map elu does not take these options: .*nu"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_feature_map(name, 8, **options)


@pytest.mark.parametrize("kind", ["sum", "l2", "none"])
def test_normalize(kind):
    x = torch.rand(5, 8, dtype=torch.float64)
    expected = {
        "sum": x / x.sum(-1, keepdim=True),
        "l2": x / x.norm(dim=-1, keepdim=True),
        "none": x,
    }[kind]
    torch.testing.assert_close(normalize(x, kind), expected)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalize(x, kind), x)


@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-45, 38), kind=st.sampled_from(["sum", "l2"]), zeros=st.booleans())
def test_normalized_rows_and_their_gradients_are_finite_at_any_scale(exponent, kind, zeros):
    """From denormal to the largest float; a row of zeros becomes zero, never NaN."""
    x = torch.rand(4, 8) * 10.0**exponent
    x[0] = 0.0
    if zeros:
        x[:, 1:] = 0.0
    x = x.clamp(max=torch.finfo(torch.float32).max / 16).requires_grad_()
    y = normalize(x, kind)
    (grad,) = torch.autograd.grad(y.sum() + y.square().sum(), x)
    assert y.isfinite().all() and grad.isfinite().all()
    assert (y[0] == 0).all() and (grad[0] == 0).all()
    assert (y.sum(-1) <= 8**0.5 + 1e-3).all()


@pytest.mark.parametrize("name", ["relu", "dpfp"])
def test_a_vanishing_key_is_an_identity_write(name):
    """Odd head_dim: some sign patterns give DPFP features that are all zero; relu needs only negative inputs."""
    x = torch.tensor([[-1.0, -1.0, -1.0]])
    if name == "dpfp":  # nu = 1, alternating signs: no neighbour pair on the ring is positive together
        x = torch.tensor([[1.0, -1.0, 1.0]])
    phi = build_feature_map(name, 3)(x.requires_grad_())
    assert (phi == 0).all()
    y = normalize(phi, "sum")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all() and grad.isfinite().all()


# address: a feature map and its normalisation in one pass

needs_numba = pytest.mark.skipif(numba_scan.refusal() is not None, reason=str(numba_scan.refusal()))
WITH_KERNEL = {
    "elu": ("elu", {}),
    "relu": ("relu", {}),
    "dpfp 1": ("dpfp", {"nu": 1}),
    "dpfp 3": ("dpfp", {"nu": 3}),
    "dpfp 13": ("dpfp", {"nu": 13}),
}


def with_kernel(case, head_dim=7):
    name, options = WITH_KERNEL[case]
    return build_feature_map(name, head_dim, **options)


def address_and_gradient(phi, x, normalization, backend, d_out, scale=1.0):
    x = x.detach().requires_grad_()
    y = address(phi, x, normalization, scale, backend)
    return y, torch.autograd.grad(y, x, d_out.to(y.dtype))[0]


def assert_like_the_plain_path(phi, x, normalization, tolerance, d_out=None, scale=1.0):
    """Forward and gradient are those of the plain path in float64, of the dtypes that it has."""
    if d_out is None:
        d_out = torch.randn(*x.shape[:-1], phi.output_dim, dtype=torch.float64)
    y, dx = address_and_gradient(phi, x, normalization, "numba", d_out, scale)
    expected, expected_dx = address_and_gradient(phi, x.double(), normalization, "reference", d_out, scale)
    assert y.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and dx.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=tolerance, atol=tolerance, equal_nan=True)
    return y, dx


@needs_numba
@pytest.mark.parametrize("case", WITH_KERNEL)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_address(case, normalization, dtype, tolerance):
    """The gradient of a half-precision input is rounded to its dtype."""
    for head_dim, tokens in ((7, 5), (8, 1), (33, 3)):
        x = torch.randn(2, 3, tokens, head_dim, dtype=torch.float64).to(dtype)
        assert_like_the_plain_path(with_kernel(case, head_dim), x, normalization, tolerance)
        assert_like_the_plain_path(with_kernel(case, head_dim), x, normalization, tolerance, scale=0.3)


@needs_numba
@pytest.mark.parametrize("case", ["elu", "dpfp 3"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_address_of_any_layout(case, normalization):
    """Of the input and of the gradient, which autograd gives expanded or transposed too."""
    phi, wide = with_kernel(case), with_kernel(case).output_dim
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for axes in ((2, 0, 1, 3), (3, 1, 2, 0), (0, 1, 3, 2)):
        back = [axes.index(a) for a in range(4)]
        moved = x.permute(axes).contiguous().permute(back)
        y, dx = assert_like_the_plain_path(phi, moved, normalization, 1e-12)
        if axes[-1] == 3 and wide == 7:
            assert y.stride() == dx.stride() == moved.stride()
        d_out = torch.randn(2, 3, 5, wide, dtype=torch.float64).permute(axes).contiguous().permute(back)
        assert_like_the_plain_path(phi, x, normalization, 1e-12, d_out=d_out)
    for of_one in (x[:1], x[:, :1], x[:, :, :1], x[..., :1], x[:1, :1, :1, :1]):
        assert_like_the_plain_path(phi, of_one.expand_as(x), normalization, 1e-12)
    for shape in ((1, 1, 1, 1), (1, 1, 1, wide), (2, 1, 5, 1)):
        d_out = torch.randn(shape, dtype=torch.float64).expand(2, 3, 5, wide)
        assert_like_the_plain_path(phi, x, normalization, 1e-12, d_out=d_out)
    assert_like_the_plain_path(phi, torch.randn(2, 3, 5, 14).double()[..., ::2], normalization, 1e-12)


@needs_numba
@pytest.mark.parametrize("case", WITH_KERNEL)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_address_of_rows_at_the_edge(case, normalization, dtype, tolerance):
    """Zeros, very negative numbers, and rows too small to be divided by: finite, with the plain path's zeros."""
    x = torch.randn(1, 1, 9, 7, dtype=dtype)
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = -1.0
    x[0, 0, 2] = -60.0
    x[0, 0, 3] = -1000.0
    x[0, 0, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    x[0, 0, 5] *= 1e-20
    x[0, 0, 6] = -torch.arange(80.0, 101.0, 3.0)
    x[0, 0, 7] *= 1e4
    x[0, 0, 8, :6] = 0.0
    d_out = torch.rand(1, 1, 9, with_kernel(case).output_dim).double()
    y, dx = address_and_gradient(with_kernel(case), x, normalization, "numba", d_out)
    expected, expected_dx = address_and_gradient(
        with_kernel(case), x.double(), normalization, "reference", d_out
    )
    assert y.isfinite().all() and dx.isfinite().all()
    assert relative_error_of_rows(y, expected) <= tolerance
    assert relative_error_of_rows(dx, expected_dx) <= 10 * tolerance


def relative_error_of_rows(x, expected):
    """The largest difference over the largest magnitude in its row, or over 1e-19 where that is smaller."""
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1e-19)
    return ((x.double() - expected).abs() / size).max().item()


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_address_exp_to_the_last_digit_but_one(dtype):
    """ELU below zero, at many points: as accurate as a float of that size can be."""
    x = -torch.cat([torch.linspace(0, 87, 20001), torch.rand(4000) * 1e-3]).to(dtype).view(1, 1, 1, -1)
    y = address(Elu(x.shape[-1]), x, "none", backend="numba")
    torch.testing.assert_close(y.double(), x.double().exp(), rtol=4 * torch.finfo(dtype).eps, atol=0)


@needs_numba
@pytest.mark.parametrize("case", WITH_KERNEL)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_address_passes_nan_and_inf_on(case, normalization, dtype, value, place):
    """What the plain path lets through is let through: neither swallowed, nor spread to other tokens."""
    x = torch.rand(1, 1, 3, 7, dtype=dtype) + 0.5
    x[0, 0, 1, place] = value
    phi = with_kernel(case)
    d_out = torch.rand(1, 1, 3, phi.output_dim, dtype=dtype)
    y, dx = address_and_gradient(phi, x, normalization, "numba", d_out)
    expected, expected_dx = address_and_gradient(phi, x.double(), normalization, "reference", d_out)
    assert not y[~expected.isfinite()].isfinite().any()
    assert y[:, :, ::2].isfinite().all() and dx[:, :, ::2].isfinite().all()
    if normalization != "none":
        assert dx[:, :, 1].isfinite().all() == expected_dx[:, :, 1].isfinite().all()
    if math.isnan(value):
        assert y[0, 0, 1].isnan().any()
    if normalization == "none":
        finite = expected.isfinite()
        torch.testing.assert_close(y[finite].double(), expected[finite], rtol=1e-5, atol=1e-30)


@needs_numba
@pytest.mark.parametrize("case", WITH_KERNEL)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_address_gradcheck(case, normalization):
    phi = with_kernel(case)
    x = torch.randn(2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: address(phi, x, normalization, 0.3, "numba"), x)


@needs_numba
@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7)])
def test_address_of_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = address(with_kernel("dpfp 1"), x, "sum", backend="numba")
    assert y.shape == (*shape[:3], 14)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@needs_numba
@pytest.mark.parametrize("case", WITH_KERNEL)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 2, 3, 5, 7)])
def test_address_of_other_shapes_takes_the_plain_path(case, shape):
    x = torch.randn(shape, dtype=torch.float64)
    y = address(with_kernel(case), x, "sum", backend="numba")
    torch.testing.assert_close(y, address(with_kernel(case), x, "sum", backend="reference"))


@needs_numba
def test_address_in_several_threads(monkeypatch):
    monkeypatch.setattr(numba_scan, "WORTH_A_THREAD", 0)
    x = torch.randn(2, 3, 50, 7)
    d_out = torch.randn(2, 3, 50, 14)
    expected = address_and_gradient(with_kernel("dpfp 1"), x, "l2", "numba", d_out)
    torch.set_num_threads(2)
    got = address_and_gradient(with_kernel("dpfp 1"), x, "l2", "numba", d_out)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@needs_numba
def test_address_is_not_read_before_it_is_written(poisoned_memory):
    for case in WITH_KERNEL:
        phi = with_kernel(case)
        nan, d_out = torch.full((1, 2, 5, 7), torch.nan), torch.randn(1, 2, 5, phi.output_dim).double()
        address_and_gradient(phi, nan.double(), "sum", "numba", d_out)
        assert_like_the_plain_path(phi, torch.randn(1, 2, 5, 7).double(), "sum", 1e-12, d_out=d_out)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The names of the maps that were taken by a kernel."""
    calls = []
    monkeypatch.setattr(feature_maps, "numba_address", lambda x, name, *_: calls.append(name) or x)
    monkeypatch.setattr(numba_scan, "refusal", lambda: None)
    return calls


@pytest.mark.parametrize("backend, taken", [("auto", 1), ("numba", 1), ("reference", 0), ("chunked", 0)])
def test_address_takes_the_kernel_by_backend(kernel_calls, backend, taken):
    address(Elu(7), torch.randn(1, 1, 3, 7), "sum", backend=backend)
    assert kernel_calls == ["elu"] * taken


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_address_of_every_map(kernel_calls, name):
    address(build(name), torch.rand(1, 1, 3, 8), "sum")
    assert kernel_calls == [name] * (name in ("elu", "relu", "dpfp"))


def test_address_without_numba(kernel_calls, monkeypatch):
    monkeypatch.setattr(numba_scan, "refusal", lambda: "not there")
    x = torch.rand(1, 1, 3, 7)
    torch.testing.assert_close(address(Elu(7), x, "sum", 0.5), normalize(x + 1, "sum", 0.5))
    assert kernel_calls == []


def test_address_of_a_subclass_is_not_that_of_its_base(kernel_calls):
    class Twice(Elu):
        def features(self, x):
            return 2 * super().features(x)

    class Own(FeatureMap):
        def features(self, x):
            return x.exp()

    x = torch.randn(1, 1, 3, 7)
    torch.testing.assert_close(address(Twice(7), x, "none"), 2 * Elu(7)(x))
    torch.testing.assert_close(address(Own(7), x, "none"), x.exp())
    assert kernel_calls == []


@needs_numba
def test_address_has_no_second_derivative():
    x = torch.randn(1, 1, 3, 7, requires_grad=True)
    y = address(Elu(7), x, "sum", backend="numba")
    with pytest.raises(ValueError, match="no second derivative.*backend='reference'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = address(Elu(7), x, "sum", backend="reference")
    assert torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].requires_grad
