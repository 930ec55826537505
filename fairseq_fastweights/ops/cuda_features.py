"""Feature map and key normalisation on the GPU, in one pass over the projections."""

import functools
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..errors import FastWeightError
from . import cuda
from .cuda import ceil_div
from .cuda_step import power_of_two

MAPS = ("elu", "relu", "dpfp", "favor", "tanh", "identity", "softmax")  # the macro MAP
NORMALIZATIONS = ("sum", "l2", "none")
FAVOR_ROWS = 4  # of a warp, which reads the projection once for all of them
MOST_ROWS = 2**31 - 1


class Address(NamedTuple):
    """scale normalize(phi(x)), as ``feature_map.cu`` takes it."""

    map_name: str
    features: int
    normalization: str
    scale: float
    smallest: float  # sums or lengths that are not divided by
    nu: int = 0  # dpfp
    directions: int = 0  # favor, with the rest
    input_scale: float = 1.0
    eps: float = 0.0
    stabilizer: bool = False


@functools.lru_cache(1024)
def address_cut(
    name: str, width: int, nu: int, directions: int, is_aligned: int
) -> Tuple[int, int, int, int]:
    """(threads, lanes, rows a block, bytes of shared memory a block); ``lanes`` threads share a row, or FAVOR_ROWS."""
    at_once = 4 if is_aligned else 1
    lanes, rows, shared = min(32, power_of_two(ceil_div(width, 2 * at_once))), 1, 0
    if name == "favor":
        floats = 4 * ceil_div(width, 4) + 2 * 4 * ceil_div(directions, 4)
        lanes, rows, shared = 32, FAVOR_ROWS, 4 * FAVOR_ROWS * floats
    elif name == "dpfp":
        lanes = min(32, power_of_two(ceil_div(2 * width, at_once)))
        shared = 4 * 2 * width * (1 + min(nu, 4))
    threads = 128
    while threads > 32 and threads // lanes * shared > cuda.SHARED_WITHOUT_ASKING:
        threads //= 2
    groups = threads // lanes
    return threads, lanes, groups * rows, groups * shared


def fits(x: Tensor, address: Address) -> bool:
    """Whether the kernels take this map of x (B, H, T, width) at all: the widest need too much shared memory."""
    if x.dtype not in cuda.NUMBERS or address.map_name not in MAPS or not 0 < x.numel() <= MOST_ROWS:
        return False
    shared = address_cut(address.map_name, x.shape[-1], address.nu, address.directions, 1)[-1]
    return shared <= cuda.limits(x.device).shared


def address_defines(
    address: Address, dtype: torch.dtype, out_dtype: torch.dtype, width: int, is_aligned: int
) -> Dict[str, int]:
    """The macros of ``feature_map.cu``."""
    threads, lanes, _, _ = address_cut(address.map_name, width, address.nu, address.directions, is_aligned)
    return {
        "NUMBER": cuda.NUMBERS[dtype],
        "ALIGNED": is_aligned,
        "THREADS": threads,
        "OUT_FLOAT": int(out_dtype == torch.float32),
        "MAP": MAPS.index(address.map_name),
        "NORMALIZATION": NORMALIZATIONS.index(address.normalization),
        "D": width,
        "NU": address.nu,
        "M": address.directions,
        "LANES": lanes,
    }


def launch(name: str, address: Address, x: Tensor, tensors: Tuple[Tensor, ...], matrices: list) -> None:
    """Run a kernel on x, ``tensors`` (the result or its gradient, then dx) and FAVOR+'s matrices."""
    batch, heads, tokens, width = x.shape
    is_aligned = cuda.aligned(x, *tensors)
    defines = address_defines(address, x.dtype, tensors[0].dtype, width, is_aligned)
    block_rows, shared = address_cut(address.map_name, width, address.nu, address.directions, is_aligned)[2:]
    arguments = [
        *cuda.operands(x, *tensors),
        *map(cuda.address, matrices),
        np.float32(address.input_scale),
        np.float32(address.eps),
        np.int32(address.stabilizer),
        np.float32(address.scale),
        np.float32(address.smallest),
        np.int32(heads),
        np.int32(tokens),
        np.int64(batch * heads * tokens),
    ]
    grid = (ceil_div(batch * heads * tokens, block_rows),)
    cuda.launch("feature_map", name, defines, grid, shared, arguments, x.device)


class CudaAddress(torch.autograd.Function):
    """Saves its input alone. The features are float32."""

    @staticmethod
    def forward(ctx, x, projection, address):
        ctx.address = address
        # a model in half precision has a projection in half precision too
        projection = None if projection is None else projection.float().contiguous()
        ctx.save_for_backward(x, projection)
        x = cuda.rows(x, x.dtype)
        if address.features == x.shape[-1]:
            out = torch.empty_like(x, dtype=torch.float32)
        else:
            out = x.new_empty(*x.shape[:-1], address.features, dtype=torch.float32)
        launch("address_forward", address, x, (out,), [projection])
        return out

    @staticmethod
    def backward(ctx, d_out):
        if torch.is_grad_enabled():
            raise FastWeightError(
                "the CUDA kernels have no second derivative (create_graph=True reached their backward): "
                "use backend='reference'"
            )
        given, projection = ctx.saved_tensors
        x = cuda.rows(given, given.dtype)
        dx = torch.empty_like(x)
        transposed = None if projection is None else projection.t().contiguous()
        gradient = cuda.rows(d_out, torch.float32)
        launch("address_backward", ctx.address, x, (gradient, dx), [projection, transposed])
        return dx, None, None


def cuda_address(x: Tensor, projection: Optional[Tensor], address: Address) -> Tensor:
    """The features of x (B, H, T, width): (B, H, T, address.features), float32."""
    return CudaAddress.apply(x, projection, address)
