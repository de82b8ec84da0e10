"""The model's own continuations of the prompts: plans are judged by them, searches decode them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import FinishReason, Step
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.search.memo import Memo, plan_label
from conflayers_cli.spec_decode.proposer import SkipProposer

MAX_CONTINUATIONS = 8  # continuations that searches judge by
BATCH_SIZE = 8  # continuations decoded at once
MIN_TOKENS = 16  # a shorter output says too little to judge by
MIN_WINDOW_TOKENS = 32  # with a shorter output, a longer one of the previous prompt is used instead


@dataclass(frozen=True)
class Continuation:
    """A prompt and the model's own greedy continuation of it, as token ids."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


class Continuations:
    """The model's continuations of the prompts, decoded when needed, each once.

    Arguments as for `SearchProblem`. The memo has what was decoded; None: a new one.
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
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def begin(self, prompt: tuple[int, ...], output: Sequence[int] = ()) -> Generation:
        """A greedy decoding of a prompt, behind ``output`` where that was decoded before."""
        generation = Generation(
            self._decoder,
            GenerationRequest(prompt, self._max_new_tokens),
            end_tokens=self._end_tokens,
        )
        if output:
            generation.sampler.mark_seen(prompt)
            self._decoder.prefill(torch.tensor([[*prompt, *output[:-1]]]), generation.cache)
            generation.keep(tuple(output))
        return generation

    def note(self, prompt: tuple[int, ...], output: Sequence[int]) -> None:
        """Keep the output of a prompt so far, unless a longer one is known."""
        if len(self._known.get(prompt, ())) < len(output):
            self._known[prompt] = tuple(output)

    def get(
        self,
        count: int = MAX_CONTINUATIONS,
        prompts: Sequence[tuple[int, ...]] | None = None,
        max_tokens: int | None = None,
    ) -> tuple[Continuation, ...]:
        """Up to ``count`` continuations of at least `MIN_TOKENS`, in the order of the prompts.

        Missing ones are decoded without drafts, several at once. Which ones they are depends on the
        prompts alone, so that searches in any order judge by the same texts.

        Args:
            count: how many.
            prompts: of which; None: all.
            max_tokens: of each, at most; None: as for all.
        """
        wanted = self._max_new_tokens if max_tokens is None else max_tokens
        left = list(self._prompts if prompts is None else prompts)
        found: list[Continuation] = []
        while left and len(found) < count:
            some = [left.pop(0) for _ in range(min(count - len(found), len(left)))]
            self._decode([p for p in some if not self._is_complete(p, wanted)], wanted)
            outputs = ((prompt, self._known.get(prompt, ())) for prompt in some)
            found += [Continuation(*each) for each in outputs if len(each[1]) >= MIN_TOKENS]
        return tuple(found)

    def _decode(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> None:
        """Decode the continuations of some prompts and keep them."""
        tokens = min(max_tokens, self._max_new_tokens)

        def outputs() -> list[list[int]]:
            requests = [GenerationRequest(prompt, tokens) for prompt in prompts]
            batch = Batch(self._decoder, requests, size=BATCH_SIZE, end_tokens=self._end_tokens)
            list(batch)
            return batch.outputs

        if prompts:
            numbers = " ".join(str(self._prompts.index(prompt)) for prompt in prompts)
            decoded = self.memo.cached(f"texts {numbers}, {tokens} tokens", outputs)
            for prompt, output in zip(prompts, decoded, strict=True):
                self.note(prompt, output)

    def _is_complete(self, prompt: tuple[int, ...], max_tokens: int) -> bool:
        output = self._known.get(prompt, ())
        ended = bool(output) and output[-1] in self._end_tokens
        return ended or len(output) >= min(max_tokens, self._max_new_tokens)


class PartialContinuation:
    """A prompt's continuation so far.

    Steps that the memo knows don't run the model: the tokens are read when the cache is needed.
    """

    def __init__(self, continuations: Continuations, prompt: tuple[int, ...]) -> None:
        self._continuations = continuations
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
        return self.generation.cache

    @property
    def generation(self) -> Generation:
        """The decoding, behind the output so far."""
        if self._generation is None or len(self._generation.output) != len(self.output):
            self._generation = self._continuations.begin(self.prompt, self.output)
        return self._generation


class PromptStream:
    """Decodes the prompts one after the other, in a circle, for searches that run meanwhile.

    ``current`` is being decoded, ``previous`` is the one before. Every step is an entry of the
    continuations' memo; ``name`` tells it from those of other searches.
    """

    def __init__(
        self,
        continuations: Continuations,
        prompts: tuple[tuple[int, ...], ...],
        name: str = "stream",
    ) -> None:
        self._continuations = continuations
        self._prompts = prompts
        self._name = name
        self._begun = 0
        self.current = self._begin()
        self.previous: PartialContinuation | None = None

    def _begin(self) -> PartialContinuation:
        prompt = self._prompts[self._begun % len(self._prompts)]
        self._begun += 1
        return PartialContinuation(self._continuations, prompt)

    def step(self, proposer: SkipProposer | None) -> Step:
        """One decode step; prompts are read and changed on the way.

        Raises:
            InputError: every prompt's output ends with its first token.
        """
        for _ in range(2 * len(self._prompts) + 2):
            if self.current.finish is not None:
                self.note()
                self.previous, self.current = self.current, self._begin()
            step = self._step(self.current, proposer)
            if step.proposer != "prefill":
                return step
        raise InputError("every prompt's output ends with its first token")

    def _step(self, current: PartialContinuation, proposer: SkipProposer | None) -> Step:
        def decode() -> dict[str, Any]:
            current.generation.proposer = proposer
            return asdict(current.generation.step())

        draft = "no draft" if proposer is None else plan_label(proposer.plan)
        found: dict[str, Any] = self._continuations.memo.cached(
            f"{self._name}: text {self._begun}, token {len(current.output)}, {draft}", decode
        )
        step = Step(**{**found, **{name: tuple(found[name]) for name in ("tokens", "sources")}})
        current.output += step.tokens
        current.finish = step.finish
        return step

    def note(self) -> None:
        """Keep the current continuation so far."""
        self._continuations.note(self.current.prompt, self.current.output)

    def window_source(self, window: int) -> PartialContinuation:
        """The continuation to take ``window`` last tokens from: the current one, or a longer
        previous one while the current one is short."""
        long = len(self.current.output) >= min(window, MIN_WINDOW_TOKENS)
        if long or self.previous is None:
            return self.current
        return max(self.current, self.previous, key=lambda each: len(each.output))
