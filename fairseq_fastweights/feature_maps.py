"""Feature maps phi: what turns a head's query or key into the vector that addresses the fast weights.

A new map is one class with ``output_dim`` and ``features``, and one line in ``FEATURE_MAPS``. Works without fairseq.
"""

import math
from typing import Callable, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import FastWeightError
from .ops.cuda_features import Address, cuda_address, fits
from .ops.dispatch import refusals
from .ops.numba_scan import NUMBA_MAPS, numba_address

FAVOR_EPS = 1e-4  # added to every feature, as in the authors' language model


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16's ELU+1 cancels to zero and float16 features underflow, so maps start from float32."""
    return x if x.dtype == torch.float64 else x.float()


class FeatureMap(nn.Module):
    """phi(x) for x (..., head_dim), computed in float32 (float64 for float64), shape (..., output_dim).

    Attributes:
        output_dim: features per head, the dk of the fast weights.
        signed: whether a feature can be negative. Sums of signed features can vanish, so neither sum
            normalisation nor the attention normaliser makes sense for them.
        kernel: the name of the map among the kernels of ``ops.numba_features`` and ``cuda/feature_map.cu``.
    """

    signed = False
    kernel: Optional[str] = None

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.output_dim = head_dim

    def features(self, x: Tensor) -> Tensor:
        """The map itself, on float32 or float64."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.features(at_least_float32(x))

    def kernel_options(self) -> Dict[str, object]:
        """What ``ops.cuda_features.Address`` has of this map beside its name and width."""
        return {}

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, output_dim={self.output_dim}"


class Elu(FeatureMap):
    """ELU(x) + 1: x + 1 where x > 0, exp(x) elsewhere (Katharopoulos et al. 2020)."""

    kernel = "elu"

    def features(self, x: Tensor) -> Tensor:
        # not F.elu(x) + 1, which rounds exp(x) to 0 below x = -17; and torch.where is slow on CPUs
        positive = F.relu(x)
        return positive + (x - positive).exp()


class Relu(FeatureMap):
    """max(x, 0)."""

    kernel = "relu"

    def features(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Dpfp(FeatureMap):
    """Deterministic parameter-free projection (Schlag et al. 2021, eq. 37 and listing 1).

    x' = [relu(x), relu(-x)];  phi(x) = cat over j = 1..nu of x' * roll(x', j), so 2 nu head_dim features.

    Args:
        nu: 1 to 2 head_dim - 1; more rolls repeat pairs already present.
    """

    kernel = "dpfp"

    def __init__(self, head_dim: int, nu: int = 1):
        super().__init__(head_dim)
        if not isinstance(nu, int) or not 1 <= nu <= 2 * head_dim - 1:
            raise FastWeightError(
                f"dpfp nu must be an int from 1 to {2 * head_dim - 1} (2 head_dim - 1), got {nu!r}"
            )
        self.nu = nu
        self.output_dim = 2 * head_dim * nu

    def kernel_options(self) -> Dict[str, object]:
        return {"nu": self.nu}

    def features(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(x), F.relu(-x)], dim=-1)  # (..., 2 head_dim)
        return torch.cat([both * both.roll(j, -1) for j in range(1, self.nu + 1)], dim=-1)


class Favor(FeatureMap):
    """FAVOR+ (Choromanski et al. 2021) as in the authors' language model: positive random features of softmax.

        phi(x) = (2 m)^-1/2 (exp(h) [exp(x P), exp(-x P)] + 1e-4),   h = -|x|^2 / 2,   P (head_dim, m)

    P has orthogonal rows with the norms of Gaussian ones. It is the buffer ``projection``, so it is in the
    checkpoint; training draws it anew every ``redraw_interval`` updates from the update's number and a seed
    that is fixed when the model is built (and saved too), so that all ranks and a resumed run agree. Evaluation
    never changes it.

    Args:
        features: m, the number of random directions; there are 2 m features.
        redraw_interval: updates between draws in training, 0 for never (needed where a state is carried
            from one update to the next, which would otherwise mix two bases).
        stabilizer: subtract the largest exponent of each token. A token's features are then known up to a
            factor only, which a normalisation that divides by their sum takes out again.
        scale_input: use x / head_dim^1/4, so that the kernel is exp(q.k / sqrt(head_dim)).
    """

    kernel = "favor"

    def __init__(
        self,
        head_dim: int,
        features: Optional[int] = None,
        redraw_interval: int = 1,
        stabilizer: bool = False,
        scale_input: bool = False,
    ):
        super().__init__(head_dim)
        if not isinstance(features, int) or features < 1:
            raise FastWeightError(
                "favor needs features, the number of random directions (--favor-features): "
                f"a positive int, got {features!r}"
            )
        if not isinstance(redraw_interval, int) or redraw_interval < 0:
            raise FastWeightError(
                f"favor redraw_interval must be an int of at least 0, got {redraw_interval!r}"
            )
        self.num_directions = features
        self.output_dim = 2 * features
        self.redraw_interval = redraw_interval
        self.stabilizer = stabilizer
        self.input_scale = head_dim**-0.25 if scale_input else 1.0
        self.eps = FAVOR_EPS
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("projection", torch.empty(head_dim, features))
        self.redraw(0)

    def kernel_options(self) -> Dict[str, object]:
        return {
            "directions": self.num_directions,
            "input_scale": self.input_scale,
            "eps": self.eps,
            "stabilizer": self.stabilizer,
        }

    def redraw(self, number: int) -> None:
        """Replace the projection by draw ``number`` of this map's seed."""
        generator = torch.Generator().manual_seed(int(self.seed) * 1_000_003 + number)
        drawn = orthogonal_rows(self.head_dim, self.num_directions, generator)
        self.projection.copy_(drawn)  # in place: DDP and EMA hold the buffer

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every training update; redraws when the interval has passed."""
        if self.training and self.redraw_interval > 0 and num_updates % self.redraw_interval == 0:
            self.redraw(num_updates)

    def features(self, x: Tensor) -> Tensor:
        x = x * self.input_scale
        projected = exact_matmul(x, self.projection.to(x.dtype))
        exponents = torch.cat([projected, -projected], dim=-1) - (x * x).sum(-1, keepdim=True) / 2
        if self.stabilizer:
            exponents = exponents - exponents.amax(dim=-1, keepdim=True).detach()
        return (exponents.exp() + self.eps) * (2 * self.num_directions) ** -0.5


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, also under autocast."""
    if torch.jit.is_scripting():
        return torch.matmul(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


def orthogonal_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns): blocks of mutually orthogonal rows, each row as long as a Gaussian one of that size."""
    blocks = []
    for _ in range(math.ceil(rows / columns)):
        gaussian = torch.randn(columns, columns, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    directions = torch.cat(blocks)[:rows]
    norms = torch.randn(rows, columns, generator=generator).norm(dim=1)
    return norms[:, None] * directions


class Tanh(FeatureMap):
    """tanh(x), the map of Schlag et al. (2021), ICLR."""

    signed = True
    kernel = "tanh"

    def features(self, x: Tensor) -> Tensor:
        return x.tanh()


class Identity(FeatureMap):
    """x."""

    signed = True
    kernel = "identity"

    def features(self, x: Tensor) -> Tensor:
        return x


class Softmax(FeatureMap):
    """softmax over the features of one token (not over tokens); they sum to 1."""

    kernel = "softmax"

    def features(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


FEATURE_MAPS: Dict[str, Callable[..., FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "dpfp": Dpfp,
    "favor": Favor,
    "tanh": Tanh,
    "identity": Identity,
    "softmax": Softmax,
}


def build_feature_map(name: str, head_dim: int, **options) -> FeatureMap:
    """The feature map ``name`` for heads of width ``head_dim``.

    Args:
        name: elu, relu, dpfp, favor, tanh, identity or softmax.
        options: dpfp: nu; favor: features, redraw_interval, stabilizer, scale_input.

    Returns:
        A module with ``output_dim`` and forward (..., head_dim) -> (..., output_dim).

    Raises:
        FastWeightError (a ValueError): the name, an option or its value is not allowed.
    """
    if name not in FEATURE_MAPS:
        raise FastWeightError(f"feature map must be one of {', '.join(FEATURE_MAPS)}, got {name!r}")
    try:
        return FEATURE_MAPS[name](head_dim, **options)
    except TypeError as error:
        raise FastWeightError(f"feature map {name} does not take these options: {error}") from None


def options_of(name: str, named: Dict[str, object]) -> Dict[str, object]:
    """The options of map ``name`` among those named MAP_OPTION, as the flags are: dpfp_nu is dpfp's nu."""
    prefix = f"{name}_"
    return {key[len(prefix) :]: value for key, value in named.items() if key.startswith(prefix)}


NORMALIZATIONS = ("sum", "l2", "none")
SMALLEST_ROW = 1e-19  # sqrt of the smallest float32: the gradient of x / |x| would overflow below


def normalize(x: Tensor, kind: str, scale: float = 1.0, smallest: float = SMALLEST_ROW) -> Tensor:
    """``scale`` times features (..., dk) over their sum ("sum", the paper's eq. 29), their length ("l2") or 1 ("none").

    A row that is zero (or so small that the gradient would overflow) becomes zero: as a key it writes nothing.
    """
    if kind == "none":
        return x if scale == 1.0 else x * scale
    if kind == "sum":
        size = x.sum(-1, keepdim=True)
        return x * (scale * reciprocal(size, size > smallest))
    # the length of x / max|x|, since squares of small features underflow
    largest = x.detach().abs().amax(-1, keepdim=True)
    usable = largest > smallest
    x = x * reciprocal(largest, usable)
    square = (x * x).sum(-1, keepdim=True)
    # sqrt has no gradient at 0
    return x * (scale * reciprocal((square + (~usable).to(x.dtype)).sqrt(), usable))


def reciprocal(size: Tensor, usable: Tensor) -> Tensor:
    """1 / size where usable, else 0, with finite gradients everywhere."""
    return usable.to(size.dtype) / torch.where(usable, size, torch.ones_like(size))


def address(
    feature_map: FeatureMap, x: Tensor, normalization: str, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    """scale normalize(phi(x)), in one pass where a kernel knows the map: (B, H, T, head_dim) -> (B, H, T, dk)."""
    kernel = type(feature_map).__dict__.get("kernel")  # not inherited: a subclass may be another map
    if kernel is not None and x.dim() == 4 and x.shape[-1] == feature_map.head_dim:
        found, features = refusals(x.device), feature_map.output_dim
        if backend in ("auto", "cuda") and found["cuda"] is None:
            options = Address(
                kernel, features, normalization, scale, smallest=SMALLEST_ROW, **feature_map.kernel_options()
            )
            if fits(x, options):
                return cuda_address(x, getattr(feature_map, "projection", None), options)
        if backend in ("auto", "numba") and found["numba"] is None and kernel in NUMBA_MAPS:
            return numba_address(x, kernel, features, normalization, scale, SMALLEST_ROW)
    return normalize(feature_map(x), normalization, scale)
