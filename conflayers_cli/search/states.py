"""Hidden states between layers, of texts that the model reads again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.ridge import sinks

CHUNK = 256
"""Tokens per forward: bounds the states that are held at once."""
PROMPT_WEIGHT = 0.25
"""What a prompt's token counts for, where one of the model's own counts 1: drafts are about those.
(On SmolLM2 23,000 tokens of output alone gave better maps than these and 58,000 of prompts.)"""


@dataclass(frozen=True)
class Chunk:
    """Hidden states of some tokens.

    Attributes:
        states: before each layer asked for (the model's depth: behind the last), ``[n, d]``.
        weights: ``[n]``.
        sink_until: the last layer before which a token is a sink, int64 ``[n]``; -1: it never is.
    """

    states: dict[int, torch.Tensor]
    weights: torch.Tensor
    sink_until: torch.Tensor

    def weights_from(self, layer: int) -> torch.Tensor:
        """The weights for blocks that begin at a layer, ``[n]``; 0 for sinks.

        Tokens become sinks only some layers into the model: one that does so within or behind the
        block counts for as little as one that enters it as a sink.
        """
        return self.weights.where(self.sink_until < layer, 0.0)


class Reader:
    """Reads texts with the whole model and shows the hidden states between its layers.

    Args:
        decoder: the model.
        samples: texts.
        most_tokens: read of all together at the most; texts are read in their order.
    """

    def __init__(self, decoder: Decoder, samples: Sequence[Sample], most_tokens: int) -> None:
        self._decoder = decoder
        self._texts: list[tuple[Sample, int]] = []
        self.tokens = 0
        for sample in samples:
            count = min(len(sample.prompt) + len(sample.output) - 1, most_tokens - self.tokens)
            if count > 0:
                self._texts.append((sample, count))
                self.tokens += count

    def chunks(self, layers: Sequence[int], most_tokens: int | None = None) -> Iterator[Chunk]:
        """The states of all texts, piece by piece, or of the first with ``most_tokens`` together.

        Args:
            layers: 0 … depth.
        """
        seen = 0
        for sample, count in self._texts:
            if most_tokens is not None and seen >= most_tokens:
                return
            yield from self._of_text(sample, count, layers)
            seen += count

    def _of_text(self, sample: Sample, count: int, layers: Sequence[int]) -> Iterator[Chunk]:
        decoder = self._decoder
        text = torch.tensor([[*sample.prompt, *sample.output]])[:, :count]
        cache = decoder.new_cache(count)
        for begin in range(0, count, CHUNK):
            tokens = text[:, begin : begin + CHUNK]
            positions = torch.arange(begin, begin + tokens.shape[1])[None]
            weights = torch.ones(tokens.shape[1])
            weights[: max(0, len(sample.prompt) - begin)] = PROMPT_WEIGHT
            chunk = Chunk({}, weights, torch.full(weights.shape, -1))
            # every layer is looked at, so that who is a sink does not depend on what is asked for
            show = partial(_take, chunk, frozenset(layers), decoder.depth)
            with torch.inference_mode(), decoder.showing_states(range(decoder.depth + 1), show):
                decoder.forward(tokens, positions, cache, last_only=True)
            yield chunk


def _take(
    chunk: Chunk, layers: frozenset[int], depth: int, layer: int, states: torch.Tensor
) -> None:
    """Note what is shown of one layer, ``[1, T, d]``; layers are shown in their order."""
    own = states[0, : len(chunk.weights)]  # a pass may repeat its last token
    if layer < depth:
        chunk.sink_until[sinks(own).to(chunk.sink_until.device)] = layer
    if layer in layers:
        chunk.states[layer] = own.clone()
