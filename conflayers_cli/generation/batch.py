"""Continuous batching: sequences decoded at once, each with its own length, drafts and end.

A full pass runs over all sequences; each keeps what is accepted of its draft. One that ends frees
its row for the next request. Requests may be added and cancelled between any two steps.

With layers left out for good this is Unified Layer Skipping (arXiv 2404.06954): the whole model
reads the prompts, then the skipped model alone goes on; its KV cache has no entries of the layers
left out for decoded positions. It is lossy: nothing is verified.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prefix_store import PrefixStore
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import FinishReason, Sequence, Step, check_request
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import NO_DRAFT, BatchProposer, Context, Draft


@dataclass
class _Reading:
    """A request whose prompt is being read: in which row, how much of it, for how long."""

    number: int
    sequence: Sequence
    row: int
    done: int
    seconds: float = 0.0


class Batch:
    """Sequences decoded together. Iterate for ``(number, step)`` pairs; stop whenever you like.

    Each text is as if decoded alone; in half precision where passes are arranged so that a row's
    bits don't depend on the others (see `engine.batch_invariance`). Drafts are chains: leaves are
    not verified.

    Args:
        decoder: the model.
        requests: the first ones, in the order in which they are begun.
        size: the most sequences decoded at once; None: no limit.
        proposer: drafts for all sequences; None decodes vanilla.
        plan: what is left out behind the prompts, lossily; the empty plan leaves out nothing.
        end_tokens: ids that end an output; kept as its last token.
        chunk: prompt tokens read at most between two steps of the others; None: whole prompts.
        reserve: positions that each of ``size`` rows gets at once, and keeps; 0: as requests come.
        prefixes: texts read before, for prompts that begin as they do; then prompts also share
            what sequences beside them have read. None: every prompt is read whole.

    Raises:
        InputError: an empty list of requests, or one that can't be decoded.
        ValueError: a proposer where layers are left out for good, or a size under 1.
        LogitsError: while decoding, as for `Generation`, with the request's number.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Iterable[GenerationRequest] | None = None,
        *,
        size: int | None = None,
        proposer: BatchProposer | None = None,
        plan: SkipPlan = FULL,
        end_tokens: frozenset[int] = frozenset(),
        chunk: int | None = None,
        reserve: int = 0,
        prefixes: PrefixStore | None = None,
    ) -> None:
        if proposer is not None and plan:
            raise ValueError("what is left out for good is not verified: there is no use of drafts")
        if prefixes is not None and plan:
            raise ValueError("what is left out for good has no keys and values to share")
        if reserve and size is None:
            raise ValueError("memory is reserved for so many rows: a size is needed")
        if size is not None and size < 1:
            raise ValueError(f"batch size {size}: at least 1 is needed")
        decoder.check_plan(plan)
        self._decoder = decoder
        self._proposer = proposer
        self._plan = plan
        self._end_tokens = end_tokens
        self._size = sys.maxsize if size is None else size
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._running: list[tuple[int, Sequence]] = []  # in the order of the cache's rows
        self._sequences: dict[int, Sequence] = {}  # running or ended
        self.added = 0
        self._longest = 0
        self._cache: KVCache | None = None
        self._views: dict[int, KVCache] = {}
        self._delayed: list[tuple[int, Step]] = []  # decided beside a request that failed
        self._failed: deque[LogitsError] = deque()  # beside the one that was raised
        self._reading: _Reading | None = None  # in a row behind those that run
        self._reads_next = True
        self._chunk, self._prefixes, self._reserved = chunk, prefixes, reserve
        if reserve:
            self._cache = decoder.new_cache(reserve, batch=self._size)
        for request in requests or ():
            self.add(request)
        if requests is not None and not self.added:
            raise InputError("a batch needs at least one prompt")

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number, counted from 0; InputError: it can't be decoded."""
        check_request(self._decoder, request)
        self._waiting.append((self.added, request))
        self._longest = max(self._longest, request.length)
        self.added += 1
        return self.added - 1

    def cancel(self, number: int) -> None:
        """Decode a request no further; no-op where it has ended already."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        if self._reading is not None and self._reading.number == number:
            row = self._reading.row
            self.cache.view(row, row + 1).clear(0, self.cache.capacity)  # NaN would stay
            self._reading = None
        self._drop_ended(number)

    def pop(self, number: int) -> Sequence | None:
        """Remove a request and return its sequence; None: it was never begun."""
        return self._sequences.pop(number, None)

    def release(self) -> None:
        """Free the cache, unless it is reserved; only while no request waits or runs."""
        if not self._reserved:
            self._cache, self._views, self._longest = None, {}, 0

    @property
    def cache(self) -> KVCache:
        """One cache for all rows, as long as the longest request."""
        return self._reserve() if self._cache is None else self._cache

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes if self._cache is not None else 0

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens generated so far, by request."""
        return [each.output if each else [] for each in self._by_number()]

    @property
    def finishes(self) -> list[FinishReason | None]:
        """Why each request ended; None: it has not."""
        return [each.finish if each else None for each in self._by_number()]

    @property
    def steps(self) -> list[list[Step]]:
        """Each request's steps; their seconds are the sequence's share of the batch's."""
        return [each.steps if each else [] for each in self._by_number()]

    def _by_number(self) -> list[Sequence | None]:
        return [self._sequences.get(number) for number in range(self.added)]

    @property
    def decode_seconds(self) -> float:
        """Time spent behind the prompts."""
        return sum(s.seconds for steps in self.steps for s in steps if s.proposer != "prefill")

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        while self._waiting or self._reading or self._running or self._delayed or self._failed:
            yield from self.step()

    def run(self) -> None:
        """Decode all texts to their ends."""
        deque(self, maxlen=0)

    def step(self) -> list[tuple[int, Step]]:
        """One pass: over a waiting prompt where a row is free, else over all rows; by turns where
        prompts are read in chunks.

        Raises:
            LogitsError: a request can't go on. The others' steps are returned by a later call.
        """
        if self._failed:
            raise self._failed.popleft()
        if self._delayed:
            delayed, self._delayed = self._delayed, []
            return delayed
        if self._reading is None and self._waiting and len(self._running) < self._size:
            self._begin()
        if self._reading is not None and (self._reads_next or not self._running):
            self._reads_next = self._chunk is None
            return self._record(self._read(self._reading))
        self._reads_next = True
        return self._record(self._advance()) if self._running else []

    def _record(self, steps: list[tuple[int, Step]]) -> list[tuple[int, Step]]:
        """Add the steps to their sequences; free the rows of those that have ended."""
        for number, step in steps:
            self._sequences[number].steps.append(step)
        self._drop_ended()
        return steps

    def _begin(self) -> None:
        """Begin with the next prompt in the first free row, where what is known of it is put."""
        cache = self._reserve()
        number, request = self._waiting.popleft()
        sequence = Sequence(self._decoder, request, end_tokens=self._end_tokens)
        row = len(self._running)
        if self._prefixes is not None:
            known = [
                each.tokens[:-1] if each.request.owner == request.owner else []
                for _, each in self._running
            ]
            sequence.num_cached = self._prefixes.fill(cache, row, request, known)
        self._sequences[number] = sequence
        self._reading = _Reading(number, sequence, row, sequence.num_cached)

    def _read(self, reading: _Reading) -> list[tuple[int, Step]]:
        """Read on in a prompt, alone, as without a batch; behind its end the sequence runs."""
        begin, sequence = perf_counter(), reading.sequence
        view = self.cache.view(reading.row, reading.row + 1)
        if self._chunk is not None and sequence.prompt_length - reading.done > self._chunk:
            sequence.read_part(view, reading.done, reading.done + self._chunk)
            reading.done += self._chunk
            reading.seconds += perf_counter() - begin
            return []
        self._reading = None
        try:
            step = sequence.read_prompt(view, reading.done)
        except LogitsError as error:
            view.clear(0, view.capacity)
            error.number = reading.number
            raise
        row = len(self._running)  # sequences may have ended meanwhile
        if row != reading.row:
            self.cache.copy_sequence(reading.row, row, sequence.prompt_length)
        self._running.append((reading.number, sequence))
        return [(reading.number, replace(step, verify_seconds=step.seconds + reading.seconds))]

    def _advance(self) -> list[tuple[int, Step]]:
        """Draft, verify, keep: one pass over all sequences."""
        begin = perf_counter()  # what a step decides was read from the device within it
        drafts = self._draft()
        drafted = perf_counter() if any(draft.tokens for draft in drafts) else begin
        decided = self._decide(drafts)
        kept: list[tuple[int, ...]] = []
        failed: dict[int, LogitsError] = {}
        for (number, sequence), tokens in zip(self._running, decided, strict=True):
            try:
                kept.append(sequence.keep(tokens))
            except LogitsError as error:
                kept.append(())
                error.number = number
                failed[number] = error
        draft_seconds = (drafted - begin) / len(kept)
        verify_seconds = (perf_counter() - drafted) / len(kept)
        steps = [
            (
                number,
                Step(
                    tokens=own,
                    drafted=len(draft.tokens),
                    accepted=min(len(tokens) - 1, len(own)),
                    proposer=self._proposer.name if self._proposer and draft.tokens else "none",
                    draft_seconds=draft_seconds,
                    verify_seconds=verify_seconds,
                    finish=sequence.finish,
                    sources=draft.sources,
                    logprobs=sequence.take_logprobs(len(own)),
                ),
            )
            for (number, sequence), draft, tokens, own in zip(
                self._running, drafts, decided, kept, strict=True
            )
            if own
        ]
        if failed:
            self._delayed = self._record(steps)
            self._drop_ended(failed=frozenset(failed))
            self._failed.extend(failed.values())
            raise self._failed.popleft()
        return steps

    def _draft(self) -> list[Draft]:
        """A chain for every sequence, perhaps of no tokens."""
        limits = [sequence.remaining for _, sequence in self._running]
        if self._proposer is None or not any(limits):
            return [NO_DRAFT] * len(limits)
        cache = self._view()
        contexts = [
            Context(
                each.tokens,
                cache,
                each.sampler,
                self._end_tokens,
                each.request.prediction,
                each.request.store,
            )
            for _, each in self._running
        ]
        drafts = self._proposer.propose_batch(contexts, limits)
        return [replace(draft, leaves=()) for draft in drafts]

    def _decide(self, drafts: list[Draft]) -> list[tuple[int, ...]]:
        """The accepted tokens of every sequence and a next one, by one pass."""
        width = 1 + max(len(draft.tokens) for draft in drafts)
        decided: list[tuple[int, ...]] = []
        followed = self._verify(drafts)
        for i, ((_, sequence), draft, (count, token)) in enumerate(
            zip(self._running, drafts, followed, strict=True)
        ):
            accepted = draft.tokens[:count]
            if token == INVALID_TOKEN and draft.tokens:  # decided again without drafts, as alone
                kv_len = len(sequence.tokens) - 1
                self.cache.view(i, i + 1).clear(kv_len + count, kv_len + width)
                decided.append(accepted)
            else:
                decided.append((*accepted, token))
        if not all(decided):
            missing = [not own for own in decided]
            again = self._verify([NO_DRAFT] * len(drafts), missing)
            decided = [own or row[1:] for own, row in zip(decided, again, strict=True)]
        return decided

    def _verify(
        self, drafts: list[Draft], asked: Iterable[bool] | None = None
    ) -> list[tuple[int, int]]:
        """How far each sequence follows its draft, and its next token (see `Sequence.decide`).

        Shorter rows repeat their last token at its own position, which writes the same key again.
        Of sequences that are not ``asked`` (None: all are) none is decided: `INVALID_TOKEN`.
        """
        width = 1 + max(len(draft.tokens) for draft in drafts)
        tokens, positions = [], []
        for (_, sequence), draft in zip(self._running, drafts, strict=True):
            own = (sequence.tokens[-1], *draft.tokens)
            begin, last = len(sequence.tokens) - 1, len(own) - 1
            columns = [min(column, last) for column in range(width)]
            tokens.append([own[column] for column in columns])
            positions.append([begin + column for column in columns])
        inputs = torch.tensor(tokens), torch.tensor(positions), self._view(), self._plan
        pairs = list(zip((each for _, each in self._running), drafts, strict=True))
        if all(sequence.takes_best for sequence, _ in pairs):
            best = self._decoder.greedy(*inputs)
            return [draft.follow(own) for (_, draft), own in zip(pairs, best, strict=True)]
        logits = self._decoder.forward(*inputs)
        return [
            sequence.decide(draft, own[: 1 + len(draft.tokens)]) if wanted else (0, INVALID_TOKEN)
            for (sequence, draft), own, wanted in zip(
                pairs, logits, [True] * len(pairs) if asked is None else asked, strict=True
            )
        ]

    def _view(self) -> KVCache:
        """The rows of the running sequences."""
        rows = len(self._running)
        if rows not in self._views:
            self._views[rows] = self.cache.view(0, rows)
        return self._views[rows]

    def _reserve(self) -> KVCache:
        """The cache, as long as the longest request, with a row for each that can be begun.

        It grows by being copied, to at least twice its rows but no more than ``size``.
        """
        rows = max(1, min(len(self._running) + len(self._waiting), self._size))
        old = self._cache
        if old is not None:
            if old.batch >= rows and old.capacity >= self._longest:
                return old
            grown = min(2 * old.batch, self._size) if old.batch < rows else old.batch
            rows = max(rows, grown)
        cache: KVCache = self._decoder.new_cache(self._longest, batch=rows)
        if old is not None and self._running:
            cache.copy_from(old, max(len(sequence.tokens) for _, sequence in self._running))
        self._cache, self._views = cache, {}
        return cache

    def _drop_ended(self, *gone: int, failed: frozenset[int] = frozenset()) -> None:
        """Move the last row into that of each sequence that has ended, is ``gone`` or ``failed``.

        What failed has left NaN behind, which no mask would hide from who gets the row next.
        """
        for row in reversed(range(len(self._running))):
            number, sequence = self._running[row]
            if number in failed:
                self.cache.view(row, row + 1).clear(0, self.cache.capacity)
            elif sequence.finish is None and number not in gone:
                continue
            elif self._prefixes is not None:
                view = self.cache.view(row, row + 1)
                self._prefixes.add(sequence.request.owner, sequence.tokens[:-1], view)
            last = self._running.pop()
            if row < len(self._running):
                self.cache.copy_sequence(len(self._running), row, len(last[1].tokens) - 1)
                self._running[row] = last
