"""A few numbers that tell how far apart two models' weights are, without either at hand.

A sample of the decoder layers' weights is projected on random signs (Johnson and Lindenstrauss; the
signs of Achlioptas, "Database-friendly random projections", PODS 2001). The distance of two such
sketches is about that of the samples, and so of the weights, relative to their norm: with 32
projections within 12.5 % of itself, one standard deviation.

What is sampled depends on the layers' shapes and names alone, never on how a model was stored: the
same weights give the same sketch from one file, from shards, or from GGUF.
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
from conflayers_cli.models.device import spread_of
from conflayers_cli.models.peft_modules import Weight, weights_of
from conflayers_cli.models.quantization import method_of
from conflayers_cli.models.structure import find_layers

PROJECTIONS = 32
TENSORS = 16
"""Weights sampled; one for each of so many layers, evenly spaced."""
RUN = 32
"""Neighbours taken together: GGUF rounds 32 neighbours, or 16, to one scale."""
RUNS = 128
"""Runs taken of each tensor."""
SAMPLED = 16
"""Values taken of every parameter; training changes them all."""

_DIGITS = 4
_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

# The least distance of two among 32 neighbours, over √12 and the root mean square of all, is
# 0.11–0.18 % for weights that were not rounded to fewer bits than bfloat16's (measured on normal
# and heavy-tailed ones), and 0.50 % or more for those of eight bits; among 16 it is 0.4–0.6 % for
# the former and 1.9 % or more for Q6_K, which has a scale for each 16.
_ROUNDED = 0.003
_ROUNDED_BY_HALVES = 0.012

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightFingerprint:
    """Projections of a model's weights, and how coarsely these were rounded.

    Attributes:
        projections: `PROJECTIONS` numbers; their squares sum up to about 1.
        rounding: root mean square of what rounding to few bits changed in the weights, relative to
            theirs, as far as it shows in them; 0 for plain weights (bfloat16 counts as plain).
    """

    projections: tuple[float, ...]
    rounding: float


def sketch_of(model: Any) -> WeightFingerprint | None:
    """The sketch of a model as it was loaded, before any of its weights are rearranged.

    Args:
        model: a transformers causal language model.

    Returns:
        None where this process does not hold all of the plain weights: quantised ones, those of a
        model spread over several devices or processes, those without values (meta), weights that
        are all zero or not finite, those that an adapter does more to than add to them, and a model
        without a list of layers.
    """
    if method_of(model.config) is not None or spread_of(model):
        return None
    try:
        weights = _sampled_weights(list(find_layers(model)))
    except InputError:  # no layers that could be left out: whoever wants to is told then
        return None
    if not weights or not all(_holds_values(weight.plain) for weight in weights):
        return None
    taken = [_runs(weight.whole()) for weight in weights]
    # to the host in one copy, and there to float64, which not every device has
    flat = torch.cat([runs.reshape(-1) for runs in taken]).cpu().double().numpy()
    norm = float(np.linalg.norm(flat))
    if not isfinite(norm) or norm == 0:
        return None
    projections = flat @ _signs(len(flat)) / (norm * sqrt(PROJECTIONS))
    lengths = np.cumsum([runs.numel() for runs in taken])[:-1]
    rounded = sum(_rounding(part.reshape(-1, RUN)) for part in np.split(flat, lengths))
    return WeightFingerprint(
        tuple(_short(value) for value in projections.tolist()), _short(sqrt(rounded) / norm)
    )


def sample_of(model: nn.Module) -> str:
    """A hash, in hex, of the first values of every parameter.

    Of a model that is shared among processes it is that of the first one's part. Weights that are
    not plain tensors, or not in any memory (packed by torchao, offloaded), play no part in it.
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
    """One matrix each of `TENSORS` layers: the layers evenly spaced, going round their matrices."""
    found: list[Weight] = []
    for number in range(TENSORS):
        layer = layers[number * len(layers) // TENSORS]
        named = weights_of(layer)
        if named is None:
            return []
        matrices = {name: w.plain for name, w in named.items() if w.plain.dim() >= 2}
        names = [name for name in sorted(matrices) if matrices[name].numel() >= RUN]
        if names:
            found.append(named[names[number % len(names)]])
    return found


def _holds_values(weight: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor, of no kind that only looks like one (torchao, DTensor)."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.layout == torch.strided
    return plain and weight.device.type != "meta" and weight.dtype in _PLAIN


def _runs(weight: torch.Tensor) -> torch.Tensor:
    """`RUNS` runs of neighbours, evenly spaced, or all there are: ``[n, RUN]``."""
    flat = weight.detach().reshape(-1)
    count = flat.numel() // RUN
    wanted = torch.arange(min(count, RUNS), device=flat.device) * count // min(count, RUNS)
    return flat[: count * RUN].reshape(count, RUN)[wanted]


def _signs(count: int) -> npt.NDArray[np.float64]:
    """Signs ``[count, PROJECTIONS]``: the lowest bits of each index's hash.

    The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so that they are
    the same for ever, whatever a library's random numbers become.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * golden
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    low = mixed.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : PROJECTIONS // 8]
    return 2 * np.unpackbits(low, axis=1, bitorder="little").astype(np.float64) - 1


def _rounding(runs: Samples) -> float:
    """Squared norm of what rounding to few bits changed in a tensor's runs ``[n, RUN]``.

    Values of one scale lie on a grid: among 32 of them some two lie side by side on one of up to
    eight bits, and rounding to a grid of step d is off by d/√12 (root mean square).
    """
    power = float(np.mean(runs**2))
    for part, least in ((runs.reshape(-1, RUN // 2), _ROUNDED_BY_HALVES), (runs, _ROUNDED)):
        squared = float(np.mean(_least_gaps(part) ** 2)) / 12
        if squared > least**2 * power:
            return squared * runs.size
    return 0.0


def _least_gaps(runs: Samples) -> npt.NDArray[np.float64]:
    """The least distance between different values of each run; 0 where all are the same."""
    gaps = np.diff(np.sort(runs, axis=1), axis=1)
    least = np.where(gaps > 0, gaps, np.inf).min(axis=1)
    return np.where(np.isfinite(least), least, 0.0)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
