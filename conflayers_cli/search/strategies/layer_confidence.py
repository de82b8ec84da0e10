"""ConfLayers' confidence of a layer and the adaptive threshold that selects layers by it.

Source: ConfLayers, arXiv 2604.14612 §3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.layer_skipping import SubLayer
from conflayers_cli.kernels.kv_cache import KVCache

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Confidence:
    """Confidence of every layer that may be skipped, 1 … L−2, by sub-layer: ``[L−2]`` each."""

    attention: Values
    mlp: Values

    @property
    def total(self) -> Values:
        return self.attention + self.mlp


@dataclass(frozen=True)
class Selection:
    """The layers selected by the adaptive threshold; all arrays ``[L−2]``.

    Attributes:
        z: standardised confidence.
        gradient: its second-order gradient, rescaled to [0, 1] about a mean of 0.5.
        window: neighbourhood size of each value.
        threshold: a layer is skipped where z is under it.
        layers: the layers skipped.
    """

    z: Values
    gradient: Values
    window: npt.NDArray[np.int64]
    threshold: Values
    layers: tuple[int, ...]


def certainty(output: torch.Tensor) -> float:
    """``1 − mean_t H(softmax(x_t)) / ln d`` of a sub-layer's output ``[B, T, d]``, in float32."""
    logs = torch.log_softmax(output.float(), dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1).mean()
    return 1.0 - float(entropy) / math.log(output.shape[-1])


def measure_confidence(
    decoder: Decoder, cache: KVCache, tokens: list[int], window: int
) -> Confidence:
    """Feed the last ``window`` tokens through the full model on the cache of what precedes them.

    They go to their own positions; the cache is left as it was. (The authors' release feeds them
    behind the prompt, at shifted positions.)

    Args:
        decoder: the model.
        cache: filled for at least all of ``tokens`` that precede the window.
        tokens: prompt and output.
        window: how many of them to feed; at least 1.
    """
    start = max(0, len(tokens) - window)
    values = {kind: np.zeros(decoder.depth) for kind in ("attention", "mlp")}

    def observe(kind: SubLayer, layer: int, output: torch.Tensor) -> None:
        values[kind][layer] = certainty(output)

    input_ids = torch.tensor([tokens[start:]], device=decoder.device)
    positions = torch.arange(start, len(tokens), device=decoder.device)[None]
    with (
        torch.inference_mode(),
        cache.unchanged(start, len(tokens)),
        decoder.observing(observe),
    ):
        decoder.forward(input_ids, positions, cache, last_only=True)
    return Confidence(values["attention"][1:-1], values["mlp"][1:-1])


def select_layers(confidence: Values, lam: float, depth: int, *, qwen: bool = False) -> Selection:
    """The adaptive threshold from local statistics and second-order gradient.

    Args:
        confidence: of layers 1 … L−2, ``[L−2]``, at least two.
        lam: λ; the larger, the fewer layers.
        depth: L.
        qwen: cap the window's amplitude at L//3, as the paper does for Qwen.

    Raises:
        ValueError: fewer than two layers may be skipped.
    """
    if len(confidence) < 2:
        raise ValueError("a model needs at least four layers for a threshold among its neighbours")
    z = (confidence - confidence.mean()) / (confidence.std() + 1e-6)
    raw: Values = np.gradient(np.gradient(z))
    differs = np.flatnonzero(raw != raw[0])
    amplitude = 5 * (int(differs[0]) if len(differs) else len(raw))
    if qwen:
        amplitude = min(depth // 3, amplitude)
    gradient = _rescale(raw)
    k = np.arange(len(z))
    window = (2 + np.floor(amplitude * gradient * (k + 1) / depth)).astype(np.int64)
    threshold = np.array([_threshold(z, i, w, lam) for i, w in enumerate(window.tolist())])
    layers = tuple((np.flatnonzero(z < threshold) + 1).tolist())
    return Selection(z, gradient, window, threshold, layers)


def _rescale(gradient: Values) -> Values:
    low, high = gradient.min(), gradient.max()
    unit = (gradient - low) / (high - low + 1e-8)
    mean = unit.mean()
    above, below = unit.max() - mean, mean - unit.min()
    if above <= 0 or below <= 0:
        return np.full_like(unit, 0.5)
    scale = min(0.5 / above, 0.5 / below)
    rescaled: Values = np.clip(scale * unit + 0.5 - scale * mean, 0.0, 1.0)
    return rescaled


def _threshold(z: Values, k: int, window: int, lam: float) -> float:
    """``mean − λ·std`` of the neighbours of the k-th value, itself left out."""
    half = window // 2
    neighbours = np.concatenate([z[max(0, k - half) : k], z[k + 1 : k + half + 1]])
    return float(neighbours.mean() - lam * neighbours.std())
