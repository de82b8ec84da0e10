"""Weight sketch: a few numbers by which the weights of two models are compared.

A sample of the decoder layers' weights is projected on random signs (Johnson and Lindenstrauss; the
signs of Achlioptas, "Database-friendly random projections", PODS 2001). The distance of two
sketches is about that of the weights relative to their norm: with 32 projections within 12.5 % of
it, one standard deviation. The configuration is compared by :mod:`.config_fingerprint`.

The sample depends on the layers' shapes and names alone, so the same weights give the same sketch
from one file, from shards, or from GGUF.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from conflayers_cli.errors import InputError
from conflayers_cli.models.device import describe_spread
from conflayers_cli.models.peft_modules import Weight, layer_weights
from conflayers_cli.models.quantization import quantization_method
from conflayers_cli.models.support import find_layers

PROJECTIONS = 32
TENSORS = 16
"""Weight matrices sampled, of evenly spaced layers."""
RUN = 32
"""Consecutive values taken together: GGUF rounds 32 of them, or 16, with one scale."""
RUNS = 128
"""Runs taken of each matrix."""
SAMPLED = 16
"""Values hashed of every parameter; training changes them all."""

_DIGITS = 4
_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

# The smallest gap among 32 neighbours, over √12 and the root mean square of all, is 0.11 to 0.18 %
# for bfloat16 weights (measured on normal and heavy-tailed ones), and 0.50 % or more for those of
# eight bits; among 16 it is 0.4 to 0.6 %, and 1.9 % or more for Q6_K, which has scales for 16.
_ROUNDED = 0.003
_ROUNDED_BY_HALVES = 0.012

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightSketch:
    """Projections of a model's weights, and how coarsely these were rounded.

    Attributes:
        projections: `PROJECTIONS` numbers whose squares sum up to about 1.
        rounding: estimated relative error of rounding to few bits; 0 for bfloat16 or more.
    """

    projections: tuple[float, ...]
    rounding: float


def sketch_weights(model: Any) -> WeightSketch | None:
    """The sketch of a transformers causal language model, before any weight is rearranged.

    None where this process does not hold all of the plain weights: they are quantised, spread over
    devices or processes, without values (meta), all zero or not finite, or changed by an adapter
    otherwise than by adding to them; and for a model without a list of layers.
    """
    if quantization_method(model.config) is not None or describe_spread(model):
        return None
    try:
        weights = _sampled_weights(list(find_layers(model)))
    except InputError:  # raised again where layers are to be left out
        return None
    if not weights or not all(_holds_values(weight.plain) for weight in weights):
        return None
    sample = [_runs(weight.whole()) for weight in weights]
    # float64 on the CPU: not every device has it
    flat = torch.cat([runs.reshape(-1) for runs in sample]).cpu().double().numpy()
    norm = float(np.linalg.norm(flat))
    if not isfinite(norm) or norm == 0:
        return None
    projections = flat @ _signs(len(flat)) / (norm * sqrt(PROJECTIONS))
    lengths = np.cumsum([runs.numel() for runs in sample])[:-1]
    rounded = sum(_rounding(part.reshape(-1, RUN)) for part in np.split(flat, lengths))
    return WeightSketch(
        tuple(_short(value) for value in projections.tolist()), _short(sqrt(rounded) / norm)
    )


def hash_weight_sample(model: nn.Module) -> str:
    """A hash, in hex, of the first values of every parameter, to tell one checkpoint from another.

    Under tensor parallelism it is that of this rank's part. Weights that are not plain tensors in
    memory (packed by torchao, offloaded) count by name and shape only.
    """
    digest = hashlib.sha256()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            values = parameter.data
            if hasattr(values, "to_local"):
                values = values.to_local()
            if type(values) is not torch.Tensor or values.is_meta or not values.numel():
                continue
            while values.dim() > 1:
                values = values[0]
            digest.update(values.reshape(-1)[:SAMPLED].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled_weights(layers: Sequence[nn.Module]) -> list[Weight]:
    """One matrix each of `TENSORS` evenly spaced layers, a different one each time."""
    sampled: list[Weight] = []
    for number in range(TENSORS):
        named = layer_weights(layers[number * len(layers) // TENSORS])
        if named is None:
            return []
        names = sorted(n for n, w in named.items() if w.plain.dim() >= 2 and w.plain.numel() >= RUN)
        if names:
            sampled.append(named[names[number % len(names)]])
    return sampled


def _holds_values(weight: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor with values, not torchao's or a DTensor."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.layout == torch.strided
    return plain and weight.device.type != "meta" and weight.dtype in _PLAIN


def _runs(weight: torch.Tensor) -> torch.Tensor:
    """Up to `RUNS` evenly spaced runs of consecutive values: ``[n, RUN]``."""
    flat = weight.detach().reshape(-1)
    count = flat.numel() // RUN
    wanted = torch.arange(min(count, RUNS), device=flat.device) * count // min(count, RUNS)
    return flat[: count * RUN].reshape(count, RUN)[wanted]


def _signs(count: int) -> npt.NDArray[np.float64]:
    """Signs ``[count, PROJECTIONS]``: the lowest bits of each index's hash.

    The hash is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), which no library's
    version changes.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * golden
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    low = mixed.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : PROJECTIONS // 8]
    return 2 * np.unpackbits(low, axis=1, bitorder="little").astype(np.float64) - 1


def _rounding(runs: Samples) -> float:
    """Estimated squared error of rounding a matrix to few bits, over its runs ``[n, RUN]``.

    Values with one scale lie on a grid: of 32, two are usually neighbours on a grid of up to eight
    bits, and rounding to a grid of step d has an error of d/√12 (root mean square).
    """
    power = float(np.mean(runs**2))
    for part, bound in ((runs.reshape(-1, RUN // 2), _ROUNDED_BY_HALVES), (runs, _ROUNDED)):
        gaps = np.diff(np.sort(part, axis=1), axis=1)
        smallest = np.where(gaps > 0, gaps, np.inf).min(axis=1)
        smallest[np.isinf(smallest)] = 0  # all values are the same
        squared = float(np.mean(smallest**2)) / 12
        if squared > bound**2 * power:
            return squared * runs.size
    return 0.0


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
