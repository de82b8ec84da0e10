"""Which runs of layers a linear map might stand in for, and the maps themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.stand_in import StandIn
from conflayers_cli.search.ridge import Moments
from conflayers_cli.search.states import Chunk, Reader

SIMILARITY_TOKENS = 2048
"""Tokens that tell how much blocks change the residual stream."""
GROWTH = 1.3
"""Lengths of candidates grow by this factor, from 2 layers on."""

Block = tuple[int, int]
"""Layers begin … end - 1."""


class Fitter:
    """Fits maps for blocks of a model, from the texts of a reader.

    Args:
        decoder: the model.
        reader: what is fitted to.
        rank: of the maps at the most; None: full.
        memory: bytes that hidden states, or the sums of one reading, may take at the most.

    Attributes:
        kept: all hidden states are held; otherwise the texts are read anew for every set of blocks.
    """

    def __init__(self, decoder: Decoder, reader: Reader, rank: int | None, memory: int) -> None:
        self._decoder = decoder
        self._reader = reader
        self._rank = rank
        self._memory = memory
        self._known: dict[Block, StandIn] = {}
        self._size = int(decoder.config.hidden_size)
        every = reader.tokens * (decoder.depth + 1) * self._size * decoder.dtype.itemsize
        self.kept = every <= memory
        self._chunks: list[Chunk] = []

    @property
    def tokens(self) -> int:
        """Tokens fitted to."""
        return self._reader.tokens

    @property
    def most_blocks(self) -> int:
        """Blocks that are fitted at once at the most, at least one."""
        return max(1, self._memory // (2 * 8 * self._size**2))

    def similarity(self) -> torch.Tensor:
        """Mean cosine between the hidden states before layers b and e, ``[depth + 1, depth + 1]``.

        Where it is near 1 the layers between change little (SWIFT, arXiv 2410.06916 §3; ShortGPT,
        arXiv 2403.03853, calls one less it "block influence").
        """
        layers = range(self._decoder.depth + 1)
        total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
        weight = 0.0
        for chunk in self._all(SIMILARITY_TOKENS):
            directions = [F.normalize(chunk.states[i].float(), dim=-1) for i in layers]
            weights = chunk.weights_from(0).to(directions[0].device)[:, None]
            for i in layers:
                for j in range(i + 1, len(layers)):
                    total[i, j] += float((directions[i] * directions[j] * weights).sum())
            weight += float(weights.sum())
        return total / max(weight, 1e-9)

    def maps(self, blocks: Iterable[Block]) -> dict[Block, StandIn]:
        """What stands in for each block; those that are not known yet are fitted together."""
        wanted = list(dict.fromkeys(blocks))
        missing = [block for block in wanted if block not in self._known]
        for begin in range(0, len(missing), self.most_blocks):
            self._fit(missing[begin : begin + self.most_blocks])
        return {block: self._known[block] for block in wanted}

    def forget(self, keep: Iterable[Block]) -> None:
        """Drop the maps of all blocks but these: of a large model, each is large."""
        self._known = {block: self._known[block] for block in keep if block in self._known}

    def _fit(self, blocks: Sequence[Block]) -> None:
        ends: dict[int, list[int]] = {}
        for begin, end in blocks:
            ends.setdefault(begin, []).append(end)
        moments = {
            begin: Moments(self._size, own, self._decoder.device) for begin, own in ends.items()
        }
        layers = sorted({layer for block in blocks for layer in block})
        for chunk in self._all(layers=layers):
            for begin, sums in moments.items():
                sums.add(chunk.states[begin], chunk.states, chunk.weights_from(begin))
        for begin, end in blocks:
            fit = moments[begin].fit(end, self._rank)
            self._known[begin, end] = StandIn(begin, end, fit.factors, fit.bias)

    def _all(
        self, most_tokens: int | None = None, layers: Sequence[int] | None = None
    ) -> Iterable[Chunk]:
        """The states of the texts, kept where there is room."""
        every = range(self._decoder.depth + 1)
        if not self.kept:
            return self._reader.chunks(layers or every, most_tokens)
        if not self._chunks:
            self._chunks = list(self._reader.chunks(every))
        if most_tokens is None:
            return self._chunks
        count = most_tokens // max(len(chunk.weights) for chunk in self._chunks)
        return self._chunks[: max(count, 1)]


def candidates(similarity: torch.Tensor, taken: frozenset[int] = frozenset()) -> list[Block]:
    """For lengths from 2 layers on, the run of layers that changes the residual stream least.

    Args:
        similarity: of `Fitter.similarity`.
        taken: layers that must not be in a run.
    """
    depth = len(similarity) - 1
    found: list[Block] = []
    length = 2
    while length <= depth - 2:
        runs = [
            (begin, begin + length)
            for begin in range(1, depth - length)
            if not taken & set(range(begin, begin + length))
        ]
        if runs:
            found.append(max(runs, key=lambda run: float(similarity[run])))
        length = max(length + 1, round(length * GROWTH))
    return found


def neighbours(block: Block, depth: int, taken: frozenset[int] = frozenset()) -> list[Block]:
    """Runs with one end moved by one or two layers, or both by one."""
    begin, end = block
    moved = [(begin + by, end) for by in (-2, -1, 1, 2)]
    moved += [(begin, end + by) for by in (-2, -1, 1, 2)]
    moved += [(begin + by, end + by) for by in (-1, 1)]
    return [
        (first, last)
        for first, last in moved
        if 1 <= first < last - 1 <= depth - 2 and not taken & set(range(first, last))
    ]
