"""Several texts decoded at once, each with its own length, its own drafts and its own end.

A full pass runs over all sequences; each keeps what is accepted of its draft. One that ends makes
room for the next request; while none waits, passes run over fewer rows. Requests may be added and
cancelled between any two steps.

With layers left out for good this is Unified Layer Skipping used directly (arXiv 2404.06954): the
whole model reads the prompts, then the skipped model alone goes on, with an ordinary KV cache in
which the layers left out have no entries for decoded positions. It is lossy: nothing is verified.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from time import perf_counter

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError, greedy_tokens
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import NOTHING
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import FinishReason, Sequence, Step, check_request
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Context, Draft


class Batch:
    """Texts being decoded together. Iterate for ``(number, step)`` pairs; stop whenever you like.

    In float32 a text is the same as if it were decoded alone; in bfloat16, too, where passes are
    arranged so that a row's bits don't depend on the others (see `engine.attention`). Drafts are
    chains here: leaves beside them are not verified.

    Args:
        decoder: the model.
        requests: the first ones, in the order in which they are begun; None: they are added later.
        size: sequences decoded at once, at the most; None: as many as there are.
        drafter: drafts for all sequences; None decodes vanilla.
        plan: what is left out behind the prompts, lossily; the empty plan leaves out nothing.
        end_tokens: ids that end an output; kept as its last token.

    Raises:
        InputError: an empty list of requests, or one that can't be decoded, as for `Sequence`.
        ValueError: a drafter where layers are left out for good, or a size under 1.
        LogitsError: while decoding, as for `Generation`; it knows the request's number.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Iterable[GenerationRequest] | None = None,
        *,
        size: int | None = None,
        drafter: BatchProposer | None = None,
        plan: SkipPlan = FULL,
        end_tokens: frozenset[int] = frozenset(),
    ) -> None:
        if drafter is not None and plan:
            raise ValueError("what is left out for good is not verified: there is no use of drafts")
        if size is not None and size < 1:
            raise ValueError(f"{size} rows: at least 1 is needed")
        decoder.check_plan(plan)
        self._decoder = decoder
        self._drafter = drafter
        self._plan = plan
        self._end_tokens = end_tokens
        self._size = size
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._running: list[tuple[int, Sequence]] = []  # in the order of the cache's rows
        self._sequences: dict[int, Sequence] = {}  # begun: running or ended
        self.added = 0
        self._longest = 0
        self._cache: KVCache | None = None
        self._views: dict[int, KVCache] = {}
        self._delayed: list[tuple[int, Step]] = []  # decided beside a request that failed
        if requests is not None:
            for request in requests:
                self.add(request)
            if not self.added:
                raise InputError("a batch needs at least one prompt")

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number, counted from 0.

        It is begun as soon as a row is free. The cache grows where the request is longer than all
        before it.

        Raises:
            InputError: this model can't decode it.
        """
        check_request(self._decoder, request)
        self._waiting.append((self.added, request))
        self._longest = max(self._longest, request.length)
        self.added += 1
        return self.added - 1

    def cancel(self, number: int) -> None:
        """Decode a request no further: its row is free. Nothing where it has ended already."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        self._drop_ended(number)

    def pop(self, number: int) -> Sequence | None:
        """What came of a request, which is forgotten here; None: it was never begun."""
        return self._sequences.pop(number, None)

    @property
    def cache(self) -> KVCache:
        """Keys and values: one cache for all rows, as long as the longest request needs."""
        return self._reserve() if self._cache is None else self._cache

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values, in bytes; all rows share it."""
        return self._cache.bytes if self._cache is not None else 0

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens produced so far, by request."""
        return [each.output if each else [] for each in self._by_number()]

    @property
    def finishes(self) -> list[FinishReason | None]:
        """Why each request's text ended, None while it goes on or has not begun."""
        return [each.finish if each else None for each in self._by_number()]

    @property
    def steps(self) -> list[list[Step]]:
        """What each request's steps decided so far; a step's seconds are the sequence's share of
        what all took, so that those of all sequences add up to the time spent.
        """
        return [each.steps if each else [] for each in self._by_number()]

    def _by_number(self) -> list[Sequence | None]:
        return [self._sequences.get(number) for number in range(self.added)]

    @property
    def decode_seconds(self) -> float:
        """Time spent behind the prompts."""
        return sum(s.seconds for steps in self.steps for s in steps if s.drafter != "prefill")

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        while self._waiting or self._running or self._delayed:
            yield from self.step()

    def run(self) -> None:
        """Decode all texts to their ends."""
        while self._waiting or self._running or self._delayed:
            self.step()

    def step(self) -> list[tuple[int, Step]]:
        """What is decided next: by the pass over a prompt where a row is free, else by one over
        all rows; nothing where all texts have ended.

        Raises:
            LogitsError: a request can't go on. The others can: what was decided of them comes with
                the next step.
        """
        if self._delayed:
            delayed, self._delayed = self._delayed, []
            return delayed
        if self._waiting and (self._size is None or len(self._running) < self._size):
            return self._noted([self._begin()])
        return self._noted(self._advance()) if self._running else []

    def _noted(self, steps: list[tuple[int, Step]]) -> list[tuple[int, Step]]:
        """The steps, kept with their sequences; rows of those that have ended are free then."""
        for number, step in steps:
            self._sequences[number].steps.append(step)
        self._drop_ended()
        return steps

    def _begin(self) -> tuple[int, Step]:
        """Read the next prompt in the first free row: alone, so that it is read as it always is."""
        cache = self._reserve()
        number, request = self._waiting.popleft()
        sequence = Sequence(self._decoder, request, end_tokens=self._end_tokens)
        row = len(self._running)
        try:
            step = sequence.read_prompt(cache.view(row, row + 1))
        except LogitsError as error:
            error.number = number
            raise
        self._running.append((number, sequence))
        self._sequences[number] = sequence
        return number, step

    def _advance(self) -> list[tuple[int, Step]]:
        """Draft, verify, keep: one pass over all rows."""
        rows = len(self._running)
        begin = perf_counter()  # whatever a step decides was read from the device within it
        drafts = self._draft()
        drafted = perf_counter() if any(draft.tokens for draft in drafts) else begin
        decided = self._decide(drafts)
        kept: list[tuple[int, ...]] = []
        failed: LogitsError | None = None
        for (number, row), tokens in zip(self._running, decided, strict=True):
            try:
                kept.append(row.keep(tokens))
            except LogitsError as error:
                kept.append(())
                error.number = number
                failed = failed or error
        draft_seconds = (drafted - begin) / rows
        verify_seconds = (perf_counter() - drafted) / rows
        steps = [
            (
                number,
                Step(
                    tokens=own,
                    drafted=len(draft.tokens),
                    accepted=min(len(tokens) - 1, len(own)),
                    drafter=self._drafter.name if self._drafter and draft.tokens else "none",
                    draft_seconds=draft_seconds,
                    verify_seconds=verify_seconds,
                    finish=row.finish,
                    sources=draft.sources,
                ),
            )
            for (number, row), draft, tokens, own in zip(
                self._running, drafts, decided, kept, strict=True
            )
            if own
        ]
        if failed is not None:
            lost = [number for (number, _), own in zip(self._running, kept, strict=True) if not own]
            self._delayed = self._noted(steps)
            self._drop_ended(*lost)
            raise failed
        return steps

    def _draft(self) -> list[Draft]:
        """A chain for every row, perhaps of no tokens."""
        limits = [row.room for _, row in self._running]
        if self._drafter is None or not any(limits):
            return [NOTHING] * len(limits)
        cache = self._view()
        contexts = [
            Context(row.tokens, cache, row.sampler, self._end_tokens) for _, row in self._running
        ]
        drafts = self._drafter.propose_batch(contexts, limits)
        return [replace(draft, leaves=()) for draft in drafts]

    def _decide(self, drafts: list[Draft]) -> list[tuple[int, ...]]:
        """By one pass for every row: the drafts that stand, and a next token."""
        logits = self._verify(drafts)
        greedy = any(row.sampler.settings.greedy for _, row in self._running)
        best = greedy_tokens(logits).tolist() if greedy else [None] * len(drafts)
        decided: list[tuple[int, ...]] = []
        for i, ((_, row), draft) in enumerate(zip(self._running, drafts, strict=True)):
            stands, token = row.decide(draft, logits[i, : 1 + len(draft.tokens)], best[i])
            if token == INVALID_TOKEN and draft.tokens:
                # As for a single text: what comes next is decided without drafts.
                filled = len(row.tokens) - 1
                self.cache.view(i, i + 1).clear(filled + stands, filled + logits.shape[1])
                decided.append(draft.tokens[:stands])
            else:
                decided.append((*draft.tokens[:stands], token))
        if not all(decided):
            again = self._verify([NOTHING] * len(drafts))
            for i, (_, row) in enumerate(self._running):
                decided[i] = decided[i] or row.decide(NOTHING, again[i])[1:]
        return decided

    def _verify(self, drafts: list[Draft]) -> torch.Tensor:
        """Logits ``[B, W, V]`` behind each row's pending token and its drafts; W is one more than
        the longest chain has tokens.

        Shorter rows repeat their last token at its own position: the same key is written to the
        same slot once more, and no slot behind the row's own is touched.
        """
        width = 1 + max(len(draft.tokens) for draft in drafts)
        tokens, positions = [], []
        for (_, row), draft in zip(self._running, drafts, strict=True):
            own = (row.tokens[-1], *draft.tokens)
            begin, last = len(row.tokens) - 1, len(own) - 1
            columns = [min(column, last) for column in range(width)]
            tokens.append([own[column] for column in columns])
            positions.append([begin + column for column in columns])
        return self._decoder.forward(
            torch.tensor(tokens),
            torch.tensor(positions),
            self._view(),
            self._plan,
        )

    def _view(self) -> KVCache:
        """The rows at work."""
        rows = len(self._running)
        if rows not in self._views:
            self._views[rows] = self.cache.view(0, rows)
        return self._views[rows]

    def _reserve(self) -> KVCache:
        """The cache, with room for the longest request and a row for each that can be begun.

        It grows by being copied, to twice its rows at the least; with ``size`` rows at the most.
        """
        rows = len(self._running) + len(self._waiting)
        rows = max(1, rows if self._size is None else min(rows, self._size))
        old = self._cache
        if old is not None:
            if old.batch >= rows and old.capacity >= self._longest:
                return old
            if old.batch < rows:
                twice = 2 * old.batch
                rows = max(rows, twice if self._size is None else min(twice, self._size))
            rows = max(rows, old.batch)
        cache: KVCache = self._decoder.new_cache(self._longest, batch=rows)
        if old is not None and self._running:
            cache.copy_from(old, max(len(sequence.tokens) for _, sequence in self._running))
        self._cache, self._views = cache, {}
        return cache

    def _drop_ended(self, *gone: int) -> None:
        """The last row takes the place of one that has ended, or whose number is named."""
        for place in reversed(range(len(self._running))):
            number, sequence = self._running[place]
            if sequence.finish is None and number not in gone:
                continue
            last = self._running.pop()
            if place < len(self._running):
                self.cache.copy_row(len(self._running), place, len(last[1].tokens) - 1)
                self._running[place] = last
