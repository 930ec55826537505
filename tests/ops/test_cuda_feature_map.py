"""The kernels of feature map and normalisation, launched by ops/cuda_features.py and run on the CPU, against the maps
in float64 and their autograd."""

import contextlib
from unittest import mock

import cuda_executor
import numpy as np
import pytest
import torch
from cuda_stand_in import LIMITS, instead_of_gpu

from fairseq_fastweights.feature_maps import SMALLEST_ROW, address, build_feature_map, normalize
from fairseq_fastweights.ops import cuda, cuda_features
from fairseq_fastweights.ops.cuda_features import FAVOR_ROWS, Address, address_cut

ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of 1: the largest relative distance of neighbours

# ---- launching ----


def address_of(feature_map, normalization, scale):
    """What ``feature_maps.address`` hands to the kernels."""
    kernel, features = type(feature_map).kernel, feature_map.output_dim
    return Address(kernel, features, normalization, scale, SMALLEST_ROW, **feature_map.kernel_options())


def run(feature_map, normalization, scale, x, out, d_x=None, lanes=None, check=True, order=0, seed=0):
    """Launch forward into out, or backward of the gradient ``out`` into d_x; returns the traffic if checked."""
    name, tensors = ("address_forward", (out,)) if d_x is None else ("address_backward", (out, d_x))
    matrices = [getattr(feature_map, "projection", None)]
    if d_x is not None:
        matrices.append(None if matrices[0] is None else matrices[0].t().contiguous())

    def cut(*sizes):
        threads, _, _, shared = address_cut(*sizes)
        chosen = threads // lanes
        return threads, lanes, chosen, chosen * shared // (threads // address_cut(*sizes)[1])

    with contextlib.ExitStack() as stack:
        stack.enter_context(instead_of_gpu())
        launches = stack.enter_context(cuda_executor.running(check=check, order=order, seed=seed))
        if lanes is not None:
            stack.enter_context(mock.patch.object(cuda_features, "address_cut", cut))
        cuda_features.launch(name, address_of(feature_map, normalization, scale), x, tensors, matrices)
    return launches[0].traffic


# ---- inputs and the reference ----

OPTIONS = {"dpfp": {"nu": 3}, "favor": {"features": 6, "redraw_interval": 0}}


def the_map(name, width, **options):
    torch.manual_seed(5)
    return build_feature_map(name, width, **{**OPTIONS.get(name, {}), **options})


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nan_like(x, dtype=None):
    return torch.full(x.shape, float("nan"), dtype=dtype or x.dtype)


def expected_address(feature_map, normalization, scale, x, g):
    """out and dx in float64, of inputs that are taken as they are."""
    wide = x.double().requires_grad_()
    eps = getattr(feature_map, "eps", None)
    if eps is not None:  # the constants are float32 in the kernel
        feature_map.eps = float(np.float32(eps))
    out = normalize(feature_map(wide), normalization, scale)
    if eps is not None:
        feature_map.eps = eps
    (dx,) = torch.autograd.grad(out, wide, g.double())
    return out.detach(), dx


def assert_close(x, expected):
    """float32: 1e-5 of the largest magnitude. A half type: rounded once, after sums as good as that."""
    assert torch.isfinite(x).all()
    error, largest = (x.double() - expected).abs(), expected.abs().max()
    if x.dtype == torch.float32:
        assert error.max() <= 1e-5 * max(largest, 1e-30)
    else:
        smallest = {torch.float16: 2.0**-24, torch.bfloat16: 0.0}[x.dtype]
        assert (error <= 0.5 * ULP[x.dtype] * expected.abs() + 1e-5 * largest + 0.5 * smallest).all()


def check_address(feature_map, normalization, x, scale=1.5, out_dtype=None, **options):
    """Run and compare both directions; returns their traffics."""
    out_dtype = out_dtype or x.dtype
    g = random(*x.shape[:3], feature_map.output_dim, seed=1).to(out_dtype)
    expected, expected_dx = expected_address(feature_map, normalization, scale, x, g)
    out, d_x = nan_like(g), nan_like(x)
    traffics = (
        run(feature_map, normalization, scale, x, out, **options),
        run(feature_map, normalization, scale, x, g, d_x, **options),
    )
    assert_close(out, expected)
    assert_close(d_x, expected_dx)
    return traffics


# ---- tests ----

# Building a kernel takes a second, so most tests share these, with rows of 8.
COMBINED = [
    ("elu", "sum"),
    ("elu", "none"),
    ("relu", "sum"),
    ("relu", "l2"),
    ("dpfp", "sum"),
    ("dpfp", "l2"),
    ("favor", "sum"),
    ("favor", "l2"),
    ("favor", "none"),
    ("tanh", "l2"),
    ("identity", "l2"),
    ("softmax", "sum"),
]


@pytest.mark.parametrize("name, normalization", COMBINED)
def test_every_map_and_normalization(name, normalization):
    check_address(the_map(name, 8), normalization, random(2, 3, 5, 8))


@pytest.mark.parametrize(
    "name, width, normalization",
    [
        ("relu", 1, "none"),
        ("elu", 80, "sum"),
        ("softmax", 36, "none"),  # with any other the mean of dy is 0
        ("dpfp", 2, "none"),
        ("dpfp", 36, "none"),
        ("favor", 80, "sum"),
    ],
)
def test_widths(name, width, normalization):
    check_address(the_map(name, width), normalization, random(1, 2, 3, width))


@pytest.mark.parametrize(
    "width, nu, normalization", [(8, 1, "sum"), (8, 9, "l2"), (4, 7, "sum"), (64, 3, "sum"), (3, 5, "l2")]
)
def test_rolls_of_dpfp(width, nu, normalization):
    check_address(the_map("dpfp", width, nu=nu), normalization, random(1, 1, 5, width))


@pytest.mark.parametrize("directions", [1, 35, 72])
def test_directions_of_favor(directions):
    check_address(the_map("favor", 10, features=directions), "sum", 0.5 * random(1, 2, 3, 10))


@pytest.mark.parametrize("normalization", ["sum", "l2", "none"])
@pytest.mark.parametrize("stabilizer, scale_input", [(True, False), (False, True), (True, True)])
def test_options_of_favor(stabilizer, scale_input, normalization):
    feature_map = the_map("favor", 8, stabilizer=stabilizer, scale_input=scale_input)
    check_address(feature_map, normalization, random(1, 2, 5, 8))


def test_stabilizer_keeps_large_exponents_finite():
    feature_map = the_map("favor", 8, stabilizer=True)
    x = 40 * random(1, 1, 4, 8)
    out = nan_like(x[..., :1].expand(*x.shape[:3], feature_map.output_dim))
    run(feature_map, "sum", 1.0, x, out)
    # exponents of hundreds keep an absolute error, so that the features have a relative one
    torch.testing.assert_close(out.double(), normalize(feature_map(x.double()), "sum"), rtol=2e-3, atol=1e-6)


HALF = [
    ("elu", torch.float16, torch.float16),
    ("dpfp", torch.bfloat16, torch.bfloat16),
    ("dpfp", torch.float16, torch.float32),
    ("favor", torch.float16, torch.float32),
    ("softmax", torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("name, dtype, out_dtype", HALF)
def test_half_precision_rounds_only_the_output(name, dtype, out_dtype):
    check_address(the_map(name, 8), "sum", random(1, 2, 5, 8, dtype=dtype), out_dtype=out_dtype)


@pytest.mark.parametrize(
    "name, dtype", [("relu", torch.bfloat16), ("dpfp", torch.float16), ("favor", torch.bfloat16)]
)
def test_half_precision_of_odd_width(name, dtype):
    check_address(the_map(name, 7), "l2", random(1, 2, 3, 7, dtype=dtype))


@pytest.mark.parametrize("order, seed", [(0, 0), (1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", ["elu", "dpfp", "favor", "softmax"])
def test_order_of_threads_does_not_matter(name, order, seed):
    feature_map, x = the_map(name, 8), random(2, 3, 5, 8)
    g = random(2, 3, 5, feature_map.output_dim, seed=1)
    results = []
    for options in ({}, {"order": order, "seed": seed}):
        out, d_x = nan_like(g), nan_like(x)
        run(feature_map, "sum", 1.0, x, out, **options)
        run(feature_map, "sum", 1.0, x, g, d_x, **options)
        results.append((out, d_x))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name, lanes", [("elu", 32), ("elu", 2), ("dpfp", 1), ("dpfp", 32)])
def test_any_number_of_threads_a_row(name, lanes):
    check_address(the_map(name, 8), "sum", random(1, 2, 3, 8), lanes=lanes)


@pytest.mark.parametrize("name", ["elu", "dpfp", "favor"])
@pytest.mark.parametrize("width", [8, 7])
def test_strides(name, width):
    """Rows inside of longer ones, heads inside of tokens, as projections leave them; results too."""
    feature_map, x = the_map(name, width), random(2, 3, 5, width)
    g = random(2, 3, 5, feature_map.output_dim, seed=1)

    def inside_of_longer(y):
        wide = torch.full((y.shape[2], y.shape[0], y.shape[1], y.shape[3] + 4), float("nan"))
        return wide[..., :-4].permute(1, 2, 0, 3)

    strided_x = inside_of_longer(x).copy_(x)
    out, d_x = inside_of_longer(g), inside_of_longer(x)
    run(feature_map, "sum", 1.0, strided_x, out)
    run(feature_map, "sum", 1.0, strided_x, inside_of_longer(g).copy_(g), d_x)
    expected, expected_dx = expected_address(feature_map, "sum", 1.0, x, g)
    assert_close(out, expected)
    assert_close(d_x, expected_dx)


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 1, 1), (1, 1, 131), (3, 5, 3)])
@pytest.mark.parametrize("name", ["relu", "dpfp", "favor"])
def test_numbers_of_rows(name, shape):
    """Whole blocks and parts of them; decoding has one token."""
    check_address(the_map(name, 8), "l2", random(*shape, 8))


SMALL_ROWS = (0.0, 1e-25, 1e-12, 1e-6)


@pytest.mark.parametrize(
    "name, normalization",
    [("relu", "sum"), ("relu", "l2"), ("dpfp", "sum"), ("dpfp", "l2"), ("identity", "l2")],
)
def test_rows_too_small_become_zero(name, normalization):
    """Zero, or so small that the gradient would overflow; rows that are merely small are normalised exactly."""
    x = torch.tensor(SMALL_ROWS)[:, None] * random(8).abs()
    if name == "dpfp":
        x = x.double().sqrt().float()  # products as small as the others
    x = x[None, None].contiguous()
    feature_map = the_map(name, 8)
    g = random(1, 1, len(SMALL_ROWS), feature_map.output_dim, seed=1)
    out, d_x = nan_like(g), nan_like(x)
    run(feature_map, normalization, 1.0, x, out)
    run(feature_map, normalization, 1.0, x, g, d_x)
    expected, expected_dx = expected_address(feature_map, normalization, 1.0, x, g)
    for row in range(len(SMALL_ROWS)):
        assert_close(out[:, :, row], expected[:, :, row])
        assert_close(d_x[:, :, row], expected_dx[:, :, row])
    assert (out[0, 0, :2] == 0).all() and (d_x[0, 0, :2] == 0).all() and (out[0, 0, 2:] != 0).any(-1).all()


def test_negative_rows_of_relu_become_zero():
    x = -random(1, 2, 3, 8).abs()
    out, d_x = nan_like(x), nan_like(x)
    run(the_map("relu", 8), "sum", 1.0, x, out)
    run(the_map("relu", 8), "sum", 1.0, x, torch.ones_like(x), d_x)
    assert (out == 0).all() and (d_x == 0).all()


@pytest.mark.parametrize("name, normalization", COMBINED)
def test_nan_stays_in_its_row(name, normalization):
    x = random(1, 2, 3, 8)
    x[0, 1, 1, 2] = float("nan")
    feature_map = the_map(name, 8)
    out = nan_like(random(1, 2, 3, feature_map.output_dim)).zero_()
    run(feature_map, normalization, 1.0, x, out)
    nan = torch.isnan(out).any(-1)
    assert nan[0, 1, 1] and nan.sum() == 1


def test_elu_of_very_negative_numbers_keeps_their_exponential():
    x = torch.tensor([-20.0, -50.0, -80.0, 20.0, 0.0, -0.0, -1e-9, 1e-9]).view(1, 1, 1, 8)
    out = nan_like(x)
    run(the_map("elu", 8), "none", 1.0, x, out)
    torch.testing.assert_close(out.double(), the_map("elu", 8)(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name, normalization, dtype, out_dtype",
    [
        ("elu", "sum", torch.float32, torch.float32),
        ("elu", "sum", torch.float16, torch.float16),
        ("relu", "l2", torch.float32, torch.float32),
        ("dpfp", "sum", torch.float16, torch.float32),
        ("dpfp", "l2", torch.float32, torch.float32),
        ("favor", "sum", torch.float16, torch.float32),
        ("favor", "l2", torch.float32, torch.float32),
    ],
)
def test_traffic(name, normalization, dtype, out_dtype):
    """x and the gradient of out are read once, by one thread, and results are written once, where no row is spare."""
    feature_map, x = the_map(name, 8), random(2, 2, 32, 8, dtype=dtype)
    forward, backward = check_address(feature_map, normalization, x, out_dtype=out_dtype)
    rows = x[..., 0].numel()
    narrow, wide = 8 * rows * dtype.itemsize, feature_map.output_dim * rows * out_dtype.itemsize
    matrix = 4 * feature_map.projection.numel() if name == "favor" else 0
    warps = rows // FAVOR_ROWS  # of favor: each reads the matrix, and each block of four brings it in
    assert forward.read_bytes + forward.written_bytes == narrow + wide + warps * matrix
    assert forward.read_per_block + forward.written_per_block == narrow + wide + warps // 4 * matrix
    assert backward.read_bytes + backward.written_bytes == 2 * (narrow + warps * matrix) + wide
    assert backward.read_per_block + backward.written_per_block == 2 * (narrow + warps // 4 * matrix) + wide
    assert forward.barriers == backward.barriers == 0


@pytest.mark.parametrize("name", ["elu", "dpfp", "favor", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modules_take_the_kernels(cupy, name, dtype):
    """``feature_maps.address`` and its gradient, on projections as the attention module has them."""
    feature_map = the_map(name, 8).to(dtype)  # FAVOR+'s projection too, in a model of half precision
    x = random(5, 2, 24, dtype=dtype).view(5, 2, 3, 8).permute(1, 2, 0, 3).requires_grad_()
    normalization = "l2" if feature_map.signed else "sum"
    out = address(feature_map, x, normalization, 1.5)
    g = random(*out.shape, seed=1)
    (dx,) = torch.autograd.grad(out, x, g)
    expected, expected_dx = expected_address(feature_map, normalization, 1.5, x.detach(), g)
    assert out.dtype == torch.float32 and dx.dtype == dtype
    assert_close(out.detach(), expected)
    assert_close(dx, expected_dx)
    assert [name for name, _, _ in cupy.launches] == ["address_forward", "address_backward"]


def test_maps_too_wide_for_a_block_run_in_pytorch(cupy, monkeypatch):
    monkeypatch.setattr(cuda, "limits", lambda device: LIMITS._replace(shared=48 * 1024))
    feature_map = the_map("favor", 8, features=2000)
    address(feature_map, random(1, 1, 2, 8), "sum")
    assert not cupy.launches
