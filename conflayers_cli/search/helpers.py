"""Others with the same model, who do a part of a search's passes.

What they do is a function of the model alone: the model's own continuation of a prompt, and how a
plan drafts along a text. On the same kind of device it comes to the same wherever it is done. What
is timed is not given away: what passes cost, and the check by decoding, are the searching process's
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.objective import JudgedText, Trace
from conflayers_cli.skip_plan import SkipPlan


class Helpers(Protocol):
    """Those who help; what is asked for together is done at the same time."""

    def continuations(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        end_tokens: frozenset[int],
    ) -> list[list[int]]:
        """The model's greedy continuations, as token ids."""

    def traces(self, asked: Sequence[tuple[SkipPlan, Sample]], most_tokens: int) -> list[Trace]:
        """Each plan along its text, over ``most_tokens`` positions at the most."""


class Helper:
    """One of them.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._texts: dict[tuple[Sample, int], JudgedText] = {}

    def continuation(
        self, prompt: tuple[int, ...], max_new_tokens: int, end_tokens: frozenset[int]
    ) -> list[int]:
        """As `Helpers.continuations`, of one prompt."""
        generation = Generation(
            self._decoder, GenerationRequest(prompt, max_new_tokens), end_tokens=end_tokens
        )
        list(generation)
        return generation.output

    def trace(self, plan: SkipPlan, sample: Sample, most_tokens: int) -> Trace:
        """As `Helpers.traces`, of one plan; a text's prompt is read once."""
        key = sample, most_tokens
        if key not in self._texts:
            self._texts[key] = JudgedText(self._decoder, *key)
        return self._texts[key].trace(self._decoder, plan)
