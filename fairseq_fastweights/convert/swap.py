"""Putting fast weights in the place of softmax attention, so that they start near what it computed.

Softmax reads sum_j a_j v_j with weights a_j = exp(q . k_j / sqrt d) / (the sum of these), d the width of a head. Fast
weights read phi(q)^T S over its normaliser, with another kernel, phi(q) . phi(k), in place of exp(q . k / sqrt d), and
with d^-1/2 in front. Three choices bring the two together; factors go into the projections, weights and biases:

*   queries and keys times c, so that the map's kernel agrees with exp(q . k / sqrt d) as far as it can.
    favor (without its own --favor-scale-input): c = d^-1/4, with which its kernel is that of softmax in expectation,
    so that with the sum rule it converges to softmax attention as its features grow in number.
    elu: phi(c x) = 1 + c x + ..., so phi(c q) . phi(c k) / d = 1 + (c / d) sum(q + k) + (c^2 / d) q . k + ...; and
    softmax: phi(c x) = (1 + c (x - mean) + ...) / d. Against exp(y) = 1 + y + ... both ask for c = d^1/4.
    relu, dpfp and identity are homogeneous: c falls out again in every normalisation. tanh keeps c = 1; it is, as
    identity, signed, and nothing like a weight of softmax: expect no likeness at the start.
*   values times sqrt d, against the d^-1/2 of the read.
*   beta = 1/2 everywhere (its projection is 0): the delta rules get no bias, and 1/2 is where the sigmoid learns
    fastest. Where keys are normalised to the sum 1, or reads by z, one write does little (|k|^2 is about 1 / features)
    and all that is read is proportional to beta: the values are multiplied by 1 / beta = 2 too. With keys of length 1
    what a repeated key reads goes to v itself whatever beta is, so there they are not.

Decays and the serial rules' own parameters are those of a fresh model; a serial rule's q, k and v are kept as they are.

Measured right after conversion, on the validation set of WikiText-2 (4 layers of width 128, 4 heads, 4096 tokens):
softmax has a loss of 3.965 nats and no attention at all 4.438. sum with elu 4.257 (c = 1: 4.273, values as they were:
4.401), with dpfp 1 4.197 (3: 4.188), with the softmax map 4.185 (c = 1: 4.240), with favor of 256 directions 4.138
(c = 1: 4.421; 16 directions: 4.220). delta with elu 4.245, with --key-normalization l2 4.203; with values not doubled
4.291, with beta = 0.9 4.242, with beta = 0.1 4.349. gated-sum with elu and its own decays, which forget within 10 to
1000 tokens, 4.203, without decay 4.257. gated-sum-peng would want a small beta, 0.1 (4.143), and its beta has no bias:
with 1/2 it remembers two tokens (4.332).
On 200 sentences of Multi30k's En-De validation set (2 + 2 layers of width 64, 400 updates) softmax has 2.396, and with
one site converted: decoder, 3.935 without that attention: sum with elu 2.853, dpfp 1 2.641, softmax map 2.620, favor of
64 directions 2.541; delta with elu 3.516, with l2 keys 2.887, attention-normalised 2.728. Encoder (without 2.481): all
2.411 to 2.456. Cross (without 4.032): sum with dpfp 1 2.758, favor 2.777, softmax map 2.845, elu 3.102; delta with
dpfp 1 3.128, attention-normalised 2.904. Values times 1/2 or 2 of what is chosen were worse for every sum rule but
dpfp's in the encoder. The plain delta rule, whose state does not fill up within a short sentence, would have liked
twice as much here (decoder 3.291), but not in the language model (elu with c = 1: 5.057 against 4.265).
"""

import argparse
import math
import re
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..errors import FastWeightError
from ..models.options import SITES, SOFTMAX, build_site, check_args, transformer_config
from ..modules import FastWeightAttention
from ..update_rules import DeltaRule
from .checkpoint import Softmax

PLACES = {
    "update_rule": re.compile(r"decoder\.layers\.\d+\.self_attn(?=\.)"),
    "update_rule_encoder": re.compile(r"encoder\.layers\.\d+\.self_attn(?=\.)"),
    "update_rule_cross": re.compile(r"decoder\.layers\.\d+\.encoder_attn(?=\.)"),
}


class Converted(NamedTuple):
    """The parameters of the new model, and where they come from.

    model: all of them. factors: what kept ones were multiplied with, where not 1. made: names of the new ones.
    dropped: those of the old model that the new one has not.
    """

    model: Dict[str, Tensor]
    factors: Dict[str, float]
    made: List[str]
    dropped: Dict[str, Tensor]

    @property
    def kept(self) -> Dict[str, Tensor]:
        """What was in the old model, by name."""
        return {name: x for name, x in self.model.items() if name not in set(self.made)}


def convert(source: Softmax, args: argparse.Namespace) -> Converted:
    """``source`` with the rules, map and normalisations of ``args``: its options with those of fast weights set.

    Raises:
        FastWeightError (a ValueError): an option or a combination that makes no sense, or a site without attention.
    """
    sites = SITES if source.translates else SITES[:1]
    for site in SITES[len(sites) :]:
        if getattr(args, site) != SOFTMAX:
            raise FastWeightError(
                f"--{site.replace('_', '-')} {getattr(args, site)}: this is a language model, which has decoder "
                "self-attention only"
            )
    check_args(args, sites)
    cfg = transformer_config(args)
    result = Converted(dict(source.parameters), {}, [], dict(source.dropped))
    for site in sites:
        if getattr(args, site) == SOFTMAX:
            continue
        found = {match[0]: None for name in source.parameters if (match := PLACES[site].match(name))}
        if not found:
            raise FastWeightError(f"--{site.replace('_', '-')}: this checkpoint has no such attention")
        for place in found:
            swap(result, place, build_site(cfg, site))
    return result


def swap(result: Converted, place: str, attention: FastWeightAttention) -> None:
    """Replace the attention ``place`` in ``result`` by ``attention``, with the projections that are there."""
    old = {name: result.model.pop(name) for name in list(result.model) if name.startswith(f"{place}.")}
    factors = start_near_softmax(attention)
    for leaf, fresh in attention.state_dict().items():
        name = f"{place}.{leaf}"
        kept = old.pop(name, None)
        if kept is None:
            result.made.append(name)
            kept = fresh
        elif kept.shape != fresh.shape:
            raise FastWeightError(
                f"{name} is {tuple(kept.shape)} in the checkpoint, but its options ask for {tuple(fresh.shape)}"
            )
        factor = factors.get(leaf.split(".")[0], 1.0)
        if factor != 1.0:
            result.factors[name] = factor
            kept = (kept.double() * factor).to(kept.dtype)
        result.model[name] = kept
    result.dropped.update(old)


@torch.no_grad()
def start_near_softmax(attention: FastWeightAttention) -> Dict[str, float]:
    """Set beta, and return the factors of the projections, as derived at the top of this file."""
    if attention.serial:
        return {}
    beta: Optional[nn.Module] = getattr(attention.rule, "beta_proj", None)
    if beta is not None:
        beta.weight.zero_()
    values = math.sqrt(attention.head_dim)
    if isinstance(attention.rule, DeltaRule) and (
        attention.normalized or attention.key_normalization == "sum"
    ):
        values *= 2  # 1 / beta
    return {"q_proj": kernel_scale(attention), "k_proj": kernel_scale(attention), "v_proj": values}


def kernel_scale(attention: FastWeightAttention) -> float:
    """c above."""
    name = type(attention.feature_map).__name__.lower()
    if name in ("elu", "softmax"):
        return attention.head_dim**0.25
    if name == "favor":
        return attention.head_dim**-0.25 / attention.feature_map.input_scale
    return 1.0
