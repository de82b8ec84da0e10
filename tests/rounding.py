"""Weights rounded to few bits as GGUF files and int8 checkpoints have them, and changed ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from conflayers_cli.models.support import find_layers

Change = Callable[[torch.Tensor], torch.Tensor]


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 32, one float16 scale, −127 … 127."""
    blocks = weight.float().reshape(-1, 32)
    step = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    return ((blocks / step).round() * step).reshape(weight.shape)


def q4_1(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 32, a float16 scale and minimum, 0 … 15."""
    blocks = weight.float().reshape(-1, 32)
    low = blocks.amin(1, keepdim=True)
    step = ((blocks.amax(1, keepdim=True) - low) / 15).half().float()
    return (((blocks - low) / step).round() * step + low).reshape(weight.shape)


def q6_k(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 16, a scale, −32 … 31 (the scale itself not rounded)."""
    blocks = weight.float().reshape(-1, 16)
    step = blocks.abs().amax(1, keepdim=True) / 31
    return ((blocks / step).round() * step).reshape(weight.shape)


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    """A scale for each row."""
    rows = weight.float()
    step = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / step).round() * step


def tuned(share: float, seed: int = 5) -> Change:
    """Every weight moved by a normal step, ``share`` of the matrix's root mean square."""
    generator = torch.Generator().manual_seed(seed)

    def change(weight: torch.Tensor) -> torch.Tensor:
        size = share * weight.float().pow(2).mean().sqrt()
        return weight + torch.randn(weight.shape, generator=generator) * size

    return change


def changed(model: Any, change: Change) -> Any:
    """A copy of a model with every matrix of its layers changed."""
    other = copy.deepcopy(model)
    for matrix in _matrices(other):
        matrix.copy_(change(matrix))
    return other


def relative_distance(one: Any, other: Any) -> float:
    """Of the layers' matrices of two models."""
    pairs = list(zip(_matrices(one), _matrices(other), strict=True))
    squared = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in pairs)
    return (squared / sum(float((a.double() ** 2).sum()) for a, _ in pairs)) ** 0.5


def _matrices(model: Any) -> Iterator[torch.Tensor]:
    for layer in find_layers(model):
        yield from (p.detach() for p in layer.parameters() if p.dim() >= 2)
