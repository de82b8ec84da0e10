"""Texts the model wrote itself: what plans are judged by, and the stream searches decode along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conflayers_cli.engine.decode import Generation, Step
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.draft import Drafter
from conflayers_cli.errors import InputError

MOST_TEXTS = 8
"""Texts that plans are judged by."""
LEAST_TOKENS = 16
"""A shorter output says too little to judge by."""
FEW_TOKENS = 32
"""A window shorter than this says little: the previous prompt's end is used instead."""


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's own continuation of it, as token ids."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


class Texts:
    """The prompts' continuations by the model, decoded when needed, each once.

    Args:
        decoder: the model.
        prompts: token ids.
        max_new_tokens: tokens decoded per prompt at the most.
        end_tokens: ids that end an output.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: tuple[tuple[int, ...], ...],
        max_new_tokens: int,
        end_tokens: frozenset[int],
    ) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._end_tokens = end_tokens
        self._known: dict[tuple[int, ...], Sample] = {}

    def begin(self, prompt: tuple[int, ...], drafter: Drafter | None = None) -> Generation:
        """A greedy decoding of a prompt; with a drafter the text is the same."""
        return Generation(
            self._decoder,
            prompt,
            max_new_tokens=self._max_new_tokens,
            drafter=drafter,
            end_tokens=self._end_tokens,
        )

    def note(self, generation: Generation) -> None:
        """Keep what a decoding has come to, unless more of it is known already."""
        prompt = tuple(generation.tokens[: generation.prompt_length])
        known = self._known.get(prompt)
        if known is None or len(known.output) < len(generation.output):
            self._known[prompt] = Sample(prompt, tuple(generation.output))

    def enough(self, count: int = MOST_TEXTS) -> tuple[Sample, ...]:
        """Up to ``count`` texts, in the order of the prompts; those missing are decoded plainly.

        Which ones they are depends on the prompts alone, so that searches in any order judge by
        the same texts.
        """
        texts: list[Sample] = []
        for prompt in self._prompts:
            if len(texts) >= count:
                break
            known = self._known.get(prompt)
            if known is None or not self._whole(known):
                generation = self.begin(prompt)
                list(generation)
                self.note(generation)
            sample = self._known[prompt]
            if len(sample.output) >= LEAST_TOKENS:
                texts.append(sample)
        return tuple(texts)

    def _whole(self, sample: Sample) -> bool:
        ended = bool(sample.output) and sample.output[-1] in self._end_tokens
        return ended or len(sample.output) >= self._max_new_tokens


class Stream:
    """The prompts decoded one after the other, round and round, for searches that run meanwhile.

    Attributes:
        current: the generation at hand.
        previous: the one before it.
    """

    def __init__(self, texts: Texts, prompts: tuple[tuple[int, ...], ...]) -> None:
        self._texts = texts
        self._prompts = prompts
        self._next = 0
        self.current = self._begin()
        self.previous: Generation | None = None

    def _begin(self) -> Generation:
        prompt = self._prompts[self._next % len(self._prompts)]
        self._next += 1
        return self._texts.begin(prompt)

    def step(self, drafter: Drafter | None) -> Step:
        """One decode step; prompts are read and changed on the way.

        Raises:
            InputError: every prompt's output ends with its first token.
        """
        for _ in range(2 * len(self._prompts) + 2):
            if self.current.finish is not None:
                self.note()
                self.previous, self.current = self.current, self._begin()
            self.current.drafter = drafter
            step = self.current.step()
            if step.drafter != "prefill":
                return step
        raise InputError("every prompt's output ends with its first token")

    def steps(self, drafter: Drafter) -> Iterator[Step]:
        """Decode steps, without end."""
        while True:
            yield self.step(drafter)

    def note(self) -> None:
        """Keep the text so far."""
        self._texts.note(self.current)

    def window_source(self, window: int) -> Generation:
        """The generation whose last ``window`` tokens tell most: the current one once it has any
        length, else the longer one of it and the one before."""
        enough = len(self.current.output) >= min(window, FEW_TOKENS)
        if enough or self.previous is None:
            return self.current
        return max(self.current, self.previous, key=lambda generation: len(generation.output))
