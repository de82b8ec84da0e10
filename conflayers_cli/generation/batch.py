"""Several texts decoded at once, each with its own length, its own drafts and its own end.

A full pass runs over all rows; each keeps what stands of its draft. A row that ends makes room for
the next text of the queue; once that is empty, passes run over fewer rows.

With layers left out for good this is Unified Layer Skipping used directly (arXiv 2404.06954): the
whole model reads the prompts, then the skipped model alone goes on, with an ordinary KV cache in
which the layers left out have no entries for decoded positions. It is lossy: nothing is verified.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError, greedy_tokens
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import NOTHING, Finish, Row, Step, check_request
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Context, Draft


@dataclass(frozen=True)
class BatchRequest:
    """One text of a batch.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most tokens produced, at least one.
        sampling: how its tokens are chosen, with a seed of its own.
        watch: called with every new token; True ends the text with it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    watch: Callable[[int], bool] | None = None


class Batch:
    """Texts being decoded together. Iterate for ``(request, step)`` pairs; stop whenever you like.

    In float32 a text is the same as if it were decoded alone; in bfloat16, too, where passes are
    arranged so that a row's bits don't depend on the others (see :mod:`conflayers_cli.kernels.attention`). Drafts are
    chains here: leaves beside them are not verified.

    Args:
        decoder: the model.
        requests: the texts, one at least, in the order in which they are begun.
        size: rows decoded at once, at the most; None: as many as there are requests.
        drafter: drafts for all rows; None decodes vanilla.
        plan: what is left out behind the prompts, lossily; the empty plan leaves out nothing.
        end_tokens: ids that end an output; kept as its last token.

    Attributes:
        cache: keys and values, one cache for all rows, as long as the longest request needs.
        steps: what each request's steps decided so far; a step's seconds are the row's share of
            what all took, so that those of all rows add up to the time spent.

    Raises:
        InputError: no requests, or one that can't be decoded; as for `Generation`.
        ValueError: a drafter where layers are left out for good, or a size under 1.
        LogitsError: while decoding, as for `Generation`; it knows the request's number.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[BatchRequest],
        *,
        size: int | None = None,
        drafter: BatchProposer | None = None,
        plan: SkipPlan = FULL,
        end_tokens: frozenset[int] = frozenset(),
    ) -> None:
        if not requests:
            raise InputError("a batch needs at least one prompt")
        if drafter is not None and plan:
            raise ValueError("what is left out for good is not verified: there is no use of drafts")
        if size is not None and size < 1:
            raise ValueError(f"{size} rows: at least 1 is needed")
        for request in requests:
            check_request(decoder, request.prompt, request.max_new_tokens)
        decoder.check_plan(plan)
        self._decoder = decoder
        self._drafter = drafter
        self._plan = plan
        self._end_tokens = end_tokens
        self._size = min(size or len(requests), len(requests))
        self._queue = deque(enumerate(requests))
        self._rows: list[tuple[int, Row]] = []  # at work, in the order of the cache's rows
        self._ended: dict[int, tuple[list[int], Finish]] = {}
        self._views: dict[int, KVCache] = {}
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        self.cache: KVCache = decoder.new_cache(longest, batch=self._size)
        self.steps: list[list[Step]] = [[] for _ in requests]

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens produced so far, by request."""
        at_work = {number: row.output for number, row in self._rows}
        ended = {number: output for number, (output, _) in self._ended.items()}
        known = at_work | ended
        return [known.get(number, []) for number in range(len(self.steps))]

    @property
    def finishes(self) -> list[Finish | None]:
        """Why each request's text ended, None while it goes on or has not begun."""
        known = {number: finish for number, (_, finish) in self._ended.items()}
        return [known.get(number) for number in range(len(self.steps))]

    @property
    def decode_seconds(self) -> float:
        """Time spent behind the prompts."""
        return sum(s.seconds for steps in self.steps for s in steps if s.drafter != "prefill")

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        while self._queue or self._rows:
            yield from self.step()

    def run(self) -> None:
        """Decode all texts to their ends."""
        while self._queue or self._rows:
            self.step()

    def step(self) -> list[tuple[int, Step]]:
        """What is decided next: by the pass over a prompt where a row is free, else by one over
        all rows; nothing where all texts have ended.
        """
        if self._queue and len(self._rows) < self._size:
            decided = [self._begin()]
        elif self._rows:
            decided = self._advance()
        else:
            return []
        for number, step in decided:
            self.steps[number].append(step)
        self._drop_ended()
        return decided

    def _begin(self) -> tuple[int, Step]:
        """Read the next prompt in the first free row: alone, so that it is read as it always is."""
        number, request = self._queue.popleft()
        row = Row(
            self._decoder,
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            end_tokens=self._end_tokens,
            watch=request.watch,
        )
        place = len(self._rows)
        self._rows.append((number, row))
        try:
            return number, row.read_prompt(self.cache.view(place, place + 1))
        except LogitsError as error:
            error.number = number
            raise

    def _advance(self) -> list[tuple[int, Step]]:
        """Draft, verify, keep: one pass over all rows."""
        rows = len(self._rows)
        begin = perf_counter()  # whatever a step decides was read from the device within it
        drafts = self._draft()
        drafted = perf_counter() if any(draft.tokens for draft in drafts) else begin
        decided = self._decide(drafts)
        kept, accepted = [], []
        for number_and_row, tokens in zip(self._rows, decided, strict=True):
            kept.append(_keep(*number_and_row, tokens))
            accepted.append(min(len(tokens) - 1, len(kept[-1])))
        draft_seconds = (drafted - begin) / rows
        verify_seconds = (perf_counter() - drafted) / rows
        return [
            (
                number,
                Step(
                    tokens=kept[i],
                    drafted=len(draft.tokens),
                    accepted=accepted[i],
                    drafter=self._drafter.name if self._drafter and draft.tokens else "none",
                    draft_seconds=draft_seconds,
                    verify_seconds=verify_seconds,
                    finish=row.finish,
                    sources=draft.sources,
                ),
            )
            for i, ((number, row), draft) in enumerate(zip(self._rows, drafts, strict=True))
        ]

    def _draft(self) -> list[Draft]:
        """A chain for every row, perhaps of no tokens."""
        limits = [row.room for _, row in self._rows]
        if self._drafter is None or not any(limits):
            return [NOTHING] * len(limits)
        cache = self._view()
        contexts = [
            Context(row.tokens, cache, row.sampler, self._end_tokens) for _, row in self._rows
        ]
        drafts = self._drafter.propose_batch(contexts, limits)
        return [replace(draft, leaves=()) for draft in drafts]

    def _decide(self, drafts: Sequence[Draft]) -> list[tuple[int, ...]]:
        """By one pass for every row: the drafts that stand, and a next token."""
        logits = self._verify(drafts)
        greedy = any(row.sampler.settings.greedy for _, row in self._rows)
        best = greedy_tokens(logits).tolist() if greedy else [None] * len(drafts)
        decided: list[tuple[int, ...]] = []
        for i, ((_, row), draft) in enumerate(zip(self._rows, drafts, strict=True)):
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
            for i, (_, row) in enumerate(self._rows):
                decided[i] = decided[i] or row.decide(NOTHING, again[i])[1:]
        return decided

    def _verify(self, drafts: Sequence[Draft]) -> torch.Tensor:
        """Logits ``[B, W, V]`` behind each row's pending token and its drafts; W is one more than
        the longest chain has tokens.

        Shorter rows repeat their last token at its own position: the same key is written to the
        same slot once more, and no slot behind the row's own is touched.
        """
        width = 1 + max(len(draft.tokens) for draft in drafts)
        tokens, positions = [], []
        for (_, row), draft in zip(self._rows, drafts, strict=True):
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
        rows = len(self._rows)
        if rows not in self._views:
            self._views[rows] = self.cache.view(0, rows)
        return self._views[rows]

    def _drop_ended(self) -> None:
        """The last row takes the place of one that has ended."""
        for place in reversed(range(len(self._rows))):
            number, row = self._rows[place]
            if row.finish is None:
                continue
            self._ended[number] = row.output, row.finish
            last = self._rows.pop()
            if place < len(self._rows):
                self.cache.copy_row(len(self._rows), place, len(last[1].tokens) - 1)
                self._rows[place] = last


def _keep(number: int, row: Row, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """`Row.keep` of the request of that number, which an error is told."""
    try:
        return row.keep(tokens)
    except LogitsError as error:
        error.number = number
        raise
