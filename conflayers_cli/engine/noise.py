"""The random numbers that tokens are sampled with: a function of key, position and token alone.

Nothing is drawn in turn, so no number depends on what was drafted, on other texts, or on the
device. The numbers are hashes of a counter (SplitMix64's finalizer, Steele, Lea and Flood 2014).

A race among 100,000 tokens is won by one of a few hundred, so numbers are made block by block: a
block has its least exponential, at a random member, and the others are that plus exponentials of
their own. By the memorylessness of the exponential distribution they are independent standard
exponentials, and the least one bounds a whole block from two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 64
"""Tokens of a block."""
_POSITIONS = 64
"""Positions whose block minima are made at once."""
_STEP = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def stream_key(seed: int, prompt: tuple[int, ...], answer: int = 0) -> int:
    """The 64-bit key of a text's random numbers: of its seed, its prompt's token ids, and which of
    several answers to that prompt it is."""
    digest = blake2b(f"{seed} {answer} ".encode(), digest_size=8)
    digest.update(np.asarray(prompt, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class BlockMinima:
    """The least exponential of each block at one position.

    Attributes:
        key: of the position.
        log_min: float64 ``[blocks]``, the logarithm of the least one.
        holder: int64 ``[blocks]``, the member that has it.
    """

    key: np.uint64
    log_min: Floats
    holder: Ints


class ExponentialNoise:
    """Independent standard exponentials E(position, token) of one text.

    Args:
        key: from `stream_key`.
        vocabulary: the number of tokens; the numbers don't depend on it.
    """

    def __init__(self, key: int, vocabulary: int) -> None:
        self._key = np.uint64(key)
        self._blocks = -(-vocabulary // BLOCK)
        self._begin = 0  # of the positions held
        self._held: tuple[npt.NDArray[np.uint64], Floats, Ints] | None = None

    def minima(self, position: int) -> BlockMinima:
        """Of all blocks at a position ≥ 0."""
        at = position - self._begin
        if self._held is None or not 0 <= at < _POSITIONS:
            self._begin = max(position - _POSITIONS // 2, 0)  # a draft is checked from its start
            at = position - self._begin
            self._held = self._make(self._begin)
        keys, log_min, holder = self._held
        return BlockMinima(keys[at], log_min[at], holder[at])

    def _make(self, begin: int) -> tuple[npt.NDArray[np.uint64], Floats, Ints]:
        positions = np.arange(begin + 1, begin + 1 + _POSITIONS, dtype=np.uint64)
        keys = _mix(self._key + np.uint64(_STEP) * positions)
        blocks = np.arange(1, self._blocks + 1, dtype=np.uint64)
        numbers = _mix(keys[:, None] + np.uint64(_STEP) * blocks)
        holder = (_mix(numbers) % np.uint64(BLOCK)).astype(np.int64)
        return keys, np.log(_exponentials(numbers) / BLOCK), holder

    @staticmethod
    def log_exponentials(minima: BlockMinima, blocks: Ints) -> Floats:
        """log E of all members of some blocks ``[n]``: float64 ``[n, BLOCK]``."""
        counters = ~(blocks[:, None] * BLOCK + np.arange(BLOCK)).astype(np.uint64)
        more = _exponentials(_mix(minima.key + np.uint64(_STEP) * counters))
        more[np.arange(len(blocks)), minima.holder[blocks]] = 0.0
        logs: Floats = np.log(more + np.exp(minima.log_min[blocks])[:, None])
        return logs

    def dense(self, positions: Sequence[int], device: torch.device) -> torch.Tensor:
        """log E of all tokens, float64 ``[len(positions), blocks * BLOCK]``, made on a device."""
        at = torch.tensor(list(positions), device=device)
        keys = _mix_tensor(_signed(int(self._key)) + _signed(_STEP) * (at + 1))
        blocks = torch.arange(1, self._blocks + 1, device=device)
        numbers = _mix_tensor(keys[:, None] + _signed(_STEP) * blocks)
        holder = _mix_tensor(numbers) & (BLOCK - 1)
        least = _exponential_tensor(numbers) / BLOCK
        counters = ~torch.arange(self._blocks * BLOCK, device=device)
        more = _exponential_tensor(_mix_tensor(keys[:, None] + _signed(_STEP) * counters))
        more = more.view(*holder.shape, BLOCK).scatter_(-1, holder[..., None], 0.0)
        return (more + least[..., None]).flatten(1).log_()


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer of uint64 numbers."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(_SHIFTS[-1]))


def _exponentials(numbers: npt.NDArray[np.uint64]) -> Floats:
    """Standard exponentials from uniform 64-bit numbers, of which 52 bits are used."""
    uniform = ((numbers >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(uniform, out=uniform)


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64 tensors, whose products wrap as those of uint64 do."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, _SHIFTS[-1])


def _exponential_tensor(numbers: torch.Tensor) -> torch.Tensor:
    return (_shift(numbers, 12).double() + 0.5).mul_(2.0**-52).log_().neg_()


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - (1 << 64) if number >> 63 else number
