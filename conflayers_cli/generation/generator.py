"""Requests in, text out: behind every command, the Python API and a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.detokenizer import Detokenizer
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.generation.sequence import Step
from conflayers_cli.generation.serial import BeginGeneration, SerialQueue
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer


@dataclass
class _Active:
    """A request that has not ended: its text, and what each token of the last step made certain."""

    request: GenerationRequest
    text: Detokenizer | None
    pieces: list[str] = field(default_factory=list)


class TextGenerator:
    """Decodes requests one after the other, or several at once (see `Batch`).

    `generate` and `stream` decode a list of requests to its end. A server calls `add`, `cancel` and
    `step` instead: requests come and go while others are decoded. The KV cache is held while there
    are requests.

    Args:
        decoder: the model.
        tokenizer: a transformers tokenizer; None: results have tokens, but no text.
        end_tokens: ids that end a text.
        proposer: drafts, losslessly; None decodes vanilla. A `BatchProposer` if ``batch_size`` > 1.
        batch_size: requests decoded at once.
        skip_plan: what is left out behind the prompts for good, which is lossy; None: nothing.
        begin: begins to decode a request if ``batch_size`` is 1; None: a `Generation`.
        keep_special: whether special tokens are part of texts, but for one that ends the output.
        store: of the requests that have none of their own.
        new_batch: makes the batch, for a server with rules of its own; None: `Batch`, and one
            request after the other if ``batch_size`` is 1.

    Raises:
        ValueError: the proposer does not draft for several sequences, as for `Batch`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any = None,
        *,
        end_tokens: frozenset[int] = frozenset(),
        proposer: Proposer | BatchProposer | None = None,
        batch_size: int = 1,
        skip_plan: SkipPlan | None = None,
        begin: BeginGeneration | None = None,
        keep_special: bool = False,
        store: DraftStore | None = None,
        new_batch: Callable[..., Batch] | None = None,
    ) -> None:
        self._keep_special = keep_special
        self._store = store
        self._new_batch = new_batch
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.proposer = proposer
        self.batch_size = batch_size
        self.skip_plan = skip_plan
        self._begin = begin
        self._queue: Batch | SerialQueue = self._new_queue()
        self._active: dict[int, _Active] = {}

    def generate(self, requests: Iterable[GenerationRequest]) -> list[GenerationResult]:
        """Decode requests to their ends; results are in their order, errors as of `stream`."""
        responses = self.stream(requests)
        results = {each.number: each.result for each in responses if each.result is not None}
        return [results[number] for number in sorted(results)]

    def stream(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResponse]:
        """Decode requests while the responses are iterated.

        Yields:
            A response for every step of every request; its number is the request's index. In a
            batch a step's seconds are the request's share.

        Raises:
            InputError: the model can't decode one of them; nothing is decoded then.
            LogitsError: one can't go on; it has the request's number.
            RuntimeError: other requests are being decoded.
        """
        if self._active:
            raise RuntimeError("requests are being decoded already: add others to them")
        self._queue = self._new_queue()  # numbers from 0
        try:
            for request in requests:
                self.add(request)
            while self._active:
                for number, step in self._queue.step():
                    if number in self._active:  # it may have been cancelled meanwhile
                        yield self._response(number, step)
        finally:
            self._active.clear()
            self._queue = self._new_queue()

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, also while others are decoded; returns its number.

        Raises:
            InputError: the model can't decode it; the others go on.
            ValueError: it has stop strings, and there is no tokenizer.
        """
        if request.store is None and self._store is not None:
            request = replace(request, store=self._store)
        active, watched = _Active(request, None), request
        if self.tokenizer is not None:
            active.text = text = Detokenizer(
                self.tokenizer,
                request.stop,
                keep_special=self._keep_special,
                prompt=request.prompt if request.continues else (),
            )
            unseen = self.end_tokens if self._keep_special else frozenset()
            watched = replace(request, on_token=partial(_on_token, text, active, unseen))
        elif request.stop:
            raise ValueError("stop strings need a tokenizer")
        number = self._queue.add(watched)
        self._active[number] = active
        return number

    def step(self) -> list[GenerationResponse]:
        """One step: a response for each request that it decided tokens of.

        Raises:
            LogitsError: a request can't go on; it has the number.
        """
        steps = self._queue.step()
        # One may have been cancelled meanwhile.
        return [self._response(number, step) for number, step in steps if number in self._active]

    def cancel(self, number: int) -> GenerationResponse | None:
        """Decode a request no further; returns its last response, None where it has ended."""
        if number not in self._active:
            return None
        self._queue.cancel(number)
        return self._response(number, None)

    def _new_queue(self) -> Batch | SerialQueue:
        if self.batch_size == 1 and self.skip_plan is None and self._new_batch is None:
            return SerialQueue(
                self.decoder,
                begin=self._begin or partial(Generation, self.decoder),
                proposer=cast("Proposer | None", self.proposer),
                end_tokens=self.end_tokens,
            )
        if self.proposer is not None and not isinstance(self.proposer, BatchProposer):
            raise ValueError(f"{self.proposer.name} drafts for one sequence at a time")
        return (self._new_batch or Batch)(
            self.decoder,
            size=self.batch_size,
            proposer=self.proposer,
            plan=self.skip_plan or FULL,
            end_tokens=self.end_tokens,
        )

    def _response(self, number: int, step: Step | None) -> GenerationResponse:
        """A request's response to a step; None: it was cancelled."""
        active = self._active[number]
        last = step is None or step.finish is not None
        pieces, active.pieces = active.pieces, []
        if active.text is not None and last:
            rest = active.text.take() + active.text.finish()
            pieces = [*pieces[:-1], "".join(pieces[-1:]) + rest]
        result = self._end(number) if last else None
        return GenerationResponse(number, "".join(pieces), step, result, tuple(pieces))

    def _end(self, number: int) -> GenerationResult:
        """The result of a request, which is removed; the last one frees the cache."""
        active = self._active.pop(number)
        request, text = active.request, active.text
        sequence = self._queue.pop(number)
        if sequence is not None and request.store is not None:
            request.store.add(sequence.tokens)
        result = GenerationResult(
            text="" if text is None else text.text,
            token_ids=tuple(sequence.output) if sequence else (),
            finish_reason=(sequence and sequence.finish) or "interrupted",
            prompt_tokens=len(request.prompt),
            stats=GenerationStats.from_steps(sequence.steps if sequence else ()),
            cached_prompt_tokens=sequence.num_cached if sequence else 0,
            cache_bytes=self._queue.cache_bytes,
            seed=None if request.sampling.greedy else request.sampling.seed,
        )
        if not self._active:
            self._queue.release()
        return result


def _on_token(text: Detokenizer, active: _Active, unseen: frozenset[int], token: int) -> bool:
    request = active.request
    stopped = token not in unseen and text.feed(token)
    active.pieces.append(text.take())
    return (request.on_token is not None and request.on_token(token)) or stopped


@contextmanager
def name_failed_prompt(requests: Sequence[GenerationRequest], begin: int = 0) -> Iterator[None]:
    """Within: a LogitsError of a stream of ``requests[begin:]`` names the prompt, if several."""
    try:
        yield
    except LogitsError as error:
        if len(requests) == 1:
            raise
        raise error.for_prompt(f"prompt {requests[begin + (error.number or 0)].id}") from error
