"""Requests in, text out: what stands behind every command, the Python API and a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.detokenizer import TextStream
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.generation.sequence import Step
from conflayers_cli.generation.serial import Begin, SerialQueue
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer


class TextGenerator:
    """Decodes requests one after the other, or several at once (see `Batch`).

    `generate` and `stream` decode a list of requests to its end. A server calls `add`, `cancel` and
    `step` instead: requests come and go while others are decoded. Memory for keys and values is
    held while there are requests.

    Args:
        decoder: the model.
        tokenizer: a transformers tokenizer; None: results have tokens, but no text.
        end_tokens: ids that end a text.
        drafter: drafts for the texts, losslessly; None decodes vanilla. Where requests are decoded
            together it must draft for several sequences.
        batch_size: requests decoded at once.
        skip_plan: what is left out behind the prompts for good, which is lossy; None: nothing.
        begin: begins to decode a request where they are decoded one after the other, as
            `PrefixCache.begin`; None: each is read from its beginning.

    Raises:
        ValueError: the drafter does not draft for several sequences, as for `Batch`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any = None,
        *,
        end_tokens: frozenset[int] = frozenset(),
        drafter: Proposer | BatchProposer | None = None,
        batch_size: int = 1,
        skip_plan: SkipPlan | None = None,
        begin: Begin | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.drafter = drafter
        self.batch_size = batch_size
        self.skip_plan = skip_plan
        self._begin = begin
        self._queue: Batch | SerialQueue = self._new_queue()
        self._first = 0  # the number of the queue's first request
        self._active: dict[int, tuple[GenerationRequest, TextStream | None]] = {}

    def generate(self, requests: Iterable[GenerationRequest]) -> list[GenerationResult]:
        """Decode requests to their ends; the results are in their order.

        Raises:
            InputError, LogitsError: as `stream`.
        """
        responses = self.stream(requests)
        results = {each.number: each.result for each in responses if each.result is not None}
        return [results[number] for number in sorted(results)]

    def stream(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResponse]:
        """Decode requests as far as somebody goes on asking.

        Yields:
            A response for every step of every request, as soon as it is decided; its number is the
            request's index. Where they are decoded together, a step's seconds are the request's
            share of what all took.

        Raises:
            InputError: the model can't decode one of them; nothing is decoded then.
            LogitsError: one can't go on; it knows the request's number.
            RuntimeError: other requests are being decoded.
        """
        if self._active:
            raise RuntimeError("requests are being decoded already: add others to them")
        self._first = 0
        try:
            for request in requests:
                self.add(request)
            while self._active:
                for number, step in self._queue.step():
                    if number in self._active:  # it may have been cancelled meanwhile
                        yield self._response(number, step)
        finally:
            self._active.clear()
            self._release()

    def add(self, request: GenerationRequest) -> int:
        """Take up a request, also while others are decoded; returns its number.

        Raises:
            InputError: the model can't decode it; the others are as they were.
            ValueError: it has stop strings, and there is no tokenizer.
        """
        text = None
        wanted = request
        if self.tokenizer is not None:
            text = TextStream(self.tokenizer, request.stop)
            wanted = replace(request, on_token=_watching(text, request))
        elif request.stop:
            raise ValueError("stop strings need a tokenizer")
        number = self._queue.add(wanted)
        self._active[number] = request, text
        return self._first + number

    def step(self) -> list[GenerationResponse]:
        """Decode on by a step: a response for each request that it decided something of.

        Nothing where there are no requests.

        Raises:
            LogitsError: a request can't go on; it knows the number.
        """
        try:
            decided = self._queue.step()
        except LogitsError as error:
            error.number = self._first + (error.number or 0)
            raise
        return [self._response(number, step) for number, step in decided]

    def cancel(self, number: int) -> GenerationResponse | None:
        """Decode a request no further.

        Returns:
            Its last response, with the text that was still held back and the result so far; None
            where it has ended already.
        """
        if (own := number - self._first) not in self._active:
            return None
        self._queue.cancel(own)
        return self._response(own, None)

    def _new_queue(self) -> Batch | SerialQueue:
        if self.batch_size == 1 and self.skip_plan is None:
            return SerialQueue(
                self.decoder,
                begin=self._begin or partial(Generation, self.decoder),
                drafter=cast("Proposer | None", self.drafter),
                end_tokens=self.end_tokens,
            )
        if self.drafter is not None and not isinstance(self.drafter, BatchProposer):
            raise ValueError(f"{self.drafter.name} drafts for one sequence at a time")
        return Batch(
            self.decoder,
            size=self.batch_size,
            drafter=self.drafter,
            plan=self.skip_plan or FULL,
            end_tokens=self.end_tokens,
        )

    def _response(self, number: int, step: Step | None) -> GenerationResponse:
        """What a step gave for the queue's request of a number; None: it was cancelled."""
        first = self._first  # the last request that ends begins a new queue
        _, text = self._active[number]
        last = step is None or step.finish is not None
        piece = ""
        if text is not None:
            piece = text.take() + (text.finish() if last else "")
        result = self._end(number) if last else None
        return GenerationResponse(first + number, piece, step, result)

    def _end(self, number: int) -> GenerationResult:
        """What came of a request, which is done; the last one gives the memory back."""
        request, text = self._active.pop(number)
        sequence = self._queue.pop(number)
        result = GenerationResult(
            text="" if text is None else text.text,
            token_ids=tuple(sequence.output) if sequence else (),
            finish_reason=(sequence and sequence.finish) or "interrupted",
            prompt_tokens=len(request.prompt),
            stats=GenerationStats.of(sequence.steps if sequence else ()),
            cached_prompt_tokens=sequence.filled if sequence else 0,
            cache_bytes=self._queue.cache_bytes,
        )
        if not self._active:
            self._release()
        return result

    def _release(self) -> None:
        """Forget the queue and its memory; numbers go on."""
        self._first += self._queue.added
        self._queue = self._new_queue()


def _watching(text: TextStream, request: GenerationRequest) -> Callable[[int], bool]:
    """Feeds new tokens to the text, and to whom the request names."""
    also = request.on_token
    if also is None:
        return text.feed

    def watch(token: int) -> bool:
        stopped = text.feed(token)
        return also(token) or stopped

    return watch


@contextmanager
def naming_prompts(requests: Sequence[GenerationRequest], begin: int = 0) -> Iterator[None]:
    """Within: a LogitsError of a stream of ``requests[begin:]`` names the prompt, if there are
    several.
    """
    try:
        yield
    except LogitsError as error:
        if len(requests) == 1:
            raise
        raise error.of(f"prompt {requests[begin + (error.number or 0)].id}") from error
