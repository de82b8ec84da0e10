"""Texts the model wrote itself: what plans are judged by, and the stream searches decode along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import FinishReason, Step
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.search.memo import Memo, label_of
from conflayers_cli.spec_decode.proposer import SkipProposer

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
        memo: has what was decoded; None: one of their own.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: tuple[tuple[int, ...], ...],
        max_new_tokens: int,
        end_tokens: frozenset[int],
        memo: Memo | None = None,
    ) -> None:
        self.memo = memo or Memo(decoder)
        self._decoder = decoder
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._end_tokens = end_tokens
        self._known: dict[tuple[int, ...], Sample] = {}

    def begin(self, prompt: tuple[int, ...]) -> Generation:
        """A greedy decoding of a prompt."""
        return Generation(
            self._decoder,
            GenerationRequest(prompt, self._max_new_tokens),
            end_tokens=self._end_tokens,
        )

    def resume(self, prompt: tuple[int, ...], output: Sequence[int]) -> Generation:
        """The decoding of a prompt that came to ``output`` before; all of it is read at once."""
        generation = self.begin(prompt)
        if output:
            read = torch.tensor([[*prompt, *output[:-1]]])
            generation.sampler.saw(prompt)
            self._decoder.prefill(read, generation.cache)
            generation.keep(tuple(output))
        return generation

    def note(self, prompt: tuple[int, ...], output: Sequence[int]) -> None:
        """Keep what the decoding of a prompt has come to, unless more of it is known already."""
        known = self._known.get(prompt)
        if known is None or len(known.output) < len(output):
            self._known[prompt] = Sample(prompt, tuple(output))

    def enough(self, count: int = MOST_TEXTS) -> tuple[Sample, ...]:
        """Up to ``count`` texts, in the order of the prompts; those missing are decoded plainly.

        Which ones they are depends on the prompts alone, so that searches in any order judge by
        the same texts.
        """
        texts: list[Sample] = []
        for number, prompt in enumerate(self._prompts):
            if len(texts) >= count:
                break
            if self._missing(prompt):
                self.note(
                    prompt, self.memo.cached(f"text {number}", partial(self._whole_of, prompt))
                )
            sample = self._known[prompt]
            if len(sample.output) >= LEAST_TOKENS:
                texts.append(sample)
        return tuple(texts)

    def _whole_of(self, prompt: tuple[int, ...]) -> list[int]:
        generation = self.begin(prompt)
        list(generation)
        return generation.output

    def _missing(self, prompt: tuple[int, ...]) -> bool:
        known = self._known.get(prompt)
        return known is None or not self._whole(known)

    def _whole(self, sample: Sample) -> bool:
        ended = bool(sample.output) and sample.output[-1] in self._end_tokens
        return ended or len(sample.output) >= self._max_new_tokens


class Text:
    """A prompt's continuation as far as it has come.

    Steps that the memo knows don't ask the model: it reads their tokens when the cache is needed.

    Attributes:
        prompt: token ids.
        output: the tokens produced so far.
        finish: why it ended, None while it goes on.
    """

    def __init__(self, texts: Texts, prompt: tuple[int, ...]) -> None:
        self._texts = texts
        self._generation: Generation | None = None
        self.prompt = prompt
        self.output: list[int] = []
        self.finish: FinishReason | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and output; the last one is not in the cache yet."""
        return [*self.prompt, *self.output]

    @property
    def cache(self) -> KVCache:
        """Filled for all tokens but the last."""
        return self._at_hand.cache

    def decode(self, drafter: SkipProposer | None) -> Step:
        """What one more step gives; :meth:`take` adds it."""
        self._at_hand.drafter = drafter
        return self._at_hand.step()

    def take(self, step: Step) -> None:
        """Add what a step gave."""
        self.output += step.tokens
        self.finish = step.finish

    def note(self) -> None:
        """Keep the text so far."""
        self._texts.note(self.prompt, self.output)

    @property
    def _at_hand(self) -> Generation:
        if self._generation is None or len(self._generation.output) != len(self.output):
            self._generation = self._texts.resume(self.prompt, self.output)
        return self._generation


class Stream:
    """The prompts decoded one after the other, round and round, for searches that run meanwhile.

    Every step is an entry of the texts' memo.

    Args:
        texts: keeps what is decoded.
        prompts: token ids.
        name: tells the memo's steps from those of other searches.

    Attributes:
        current: the text at hand.
        previous: the one before it.
    """

    def __init__(
        self, texts: Texts, prompts: tuple[tuple[int, ...], ...], name: str = "stream"
    ) -> None:
        self._texts = texts
        self._prompts = prompts
        self._name = name
        self._next = 0
        self.current = self._begin()
        self.previous: Text | None = None

    def _begin(self) -> Text:
        prompt = self._prompts[self._next % len(self._prompts)]
        self._next += 1
        return Text(self._texts, prompt)

    def step(self, drafter: SkipProposer | None) -> Step:
        """One decode step; prompts are read and changed on the way.

        Raises:
            InputError: every prompt's output ends with its first token.
        """
        for _ in range(2 * len(self._prompts) + 2):
            if self.current.finish is not None:
                self.note()
                self.previous, self.current = self.current, self._begin()
            step = self._step(self.current, drafter)
            if step.drafter != "prefill":
                return step
        raise InputError("every prompt's output ends with its first token")

    def _step(self, text: Text, drafter: SkipProposer | None) -> Step:
        draft = "no draft" if drafter is None else label_of(drafter.plan)
        given: dict[str, Any] = self._texts.memo.cached(
            f"{self._name}: text {self._next}, token {len(text.output)}, {draft}",
            lambda: asdict(text.decode(drafter)),
        )
        lists = {name: tuple(given[name]) for name in ("tokens", "sources")}
        step = Step(**{**given, **lists})
        text.take(step)
        return step

    def note(self) -> None:
        """Keep the text so far."""
        self.current.note()

    def window_source(self, window: int) -> Text:
        """The text whose last ``window`` tokens tell most: the current one once it has any
        length, else the longer one of it and the one before."""
        enough = len(self.current.output) >= min(window, FEW_TOKENS)
        if enough or self.previous is None:
            return self.current
        return max(self.current, self.previous, key=lambda text: len(text.output))
