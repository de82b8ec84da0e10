"""Several sequences decoded at once, a token each per pass, by the model or a part of it.

With layers left out this is Unified Layer Skipping used directly (arXiv 2404.06954): the whole
model reads the prompts, then the skipped model alone goes on, with an ordinary KV cache in which
the layers left out have no entries for decoded positions. It is lossy: nothing is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.errors import InputError

from .cache import KVCache
from .costs import clock
from .decode import Finish, check_request
from .decoder import FULL, PREFILL_CHUNK, Decoder
from .plan import SkipPlan
from .sampling import Sampler, Sampling


@dataclass(frozen=True)
class BatchRequest:
    """One row of a batch.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most tokens produced, at least one.
        sampling: how its tokens are chosen, with a seed of its own.
        watch: called with every new token; True ends the row's output with it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    watch: Callable[[int], bool] | None = None


class _Row:
    """A row at work."""

    def __init__(self, number: int, request: BatchRequest, decoder: Decoder) -> None:
        self.number = number
        self.request = request
        self.tokens = list(request.prompt)
        self.finish: Finish | None = None
        self.sampler = Sampler(request.sampling, decoder.vocabulary, decoder.device)
        self.sampler.saw(request.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def keep(self, token: int, end_tokens: frozenset[int]) -> None:
        """Append a token and see whether the row ends with it."""
        self.tokens.append(token)
        self.sampler.saw([token])
        watched = self.request.watch is not None and self.request.watch(token)
        if token in end_tokens or watched:
            self.finish = "stop"
        elif len(self.output) >= self.request.max_new_tokens:
            self.finish = "length"


class Batch:
    """Sequences being decoded together.

    Rows have their own lengths and ends; one that has ended runs along, and nothing of it counts
    any more. In float32 a row's output is the same as if it were decoded alone.

    Args:
        decoder: the model.
        requests: the rows, one at least.
        plan: what is left out behind the prompts; the empty plan decodes vanilla.
        end_tokens: ids that end an output; kept as its last token.

    Attributes:
        cache: keys and values, one cache for all rows.
        prefill_seconds: of the passes over the prompts, up to the first tokens.
        decode_seconds: of all passes behind them.
        steps: those passes.

    Raises:
        InputError: no rows, or a request that can't be decoded; as for `Generation`.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[BatchRequest],
        *,
        plan: SkipPlan = FULL,
        end_tokens: frozenset[int] = frozenset(),
    ) -> None:
        if not requests:
            raise InputError("a batch needs at least one prompt")
        for request in requests:
            check_request(decoder, request.prompt, request.max_new_tokens)
        decoder.check_plan(plan)
        self._decoder = decoder
        self._plan = plan
        self._end_tokens = end_tokens
        self._rows = [_Row(i, request, decoder) for i, request in enumerate(requests)]
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        self.cache: KVCache = decoder.new_cache(longest, batch=len(requests))
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens produced so far, by row."""
        return [row.output for row in self._rows]

    @property
    def finishes(self) -> list[Finish | None]:
        """Why each row ended, None while it goes on."""
        return [row.finish for row in self._rows]

    def run(self) -> None:
        """Decode all rows to their ends."""
        while any(row.finish is None for row in self._rows):
            self.step()

    def step(self) -> None:
        """One more token for every row that goes on; nothing where all have ended."""
        begin = clock(self._decoder.device)
        going_on = [row for row in self._rows if row.finish is None]
        if not going_on:
            return
        first = not going_on[0].output
        if first:
            self._prefill()
        # The last token of a prompt is the whole model's, too: it decides the first new token.
        logits = self._pass(FULL if first else self._plan)
        for row in going_on:
            row.keep(row.sampler.choose(logits[row.number]), self._end_tokens)
        seconds = clock(self._decoder.device) - begin
        if first:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
            self.steps += 1

    def _prefill(self) -> None:
        """Read all tokens of the prompts but the last ones.

        Shorter rows are filled up behind their end: what is written there is overwritten by the
        row's own tokens before any of them sees it.
        """
        device = self._decoder.device
        read = [row.tokens[:-1] for row in self._rows]
        longest = max(map(len, read))
        for begin in range(0, longest, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, longest)
            padded = [(tokens + [0] * longest)[begin:end] for tokens in read]
            positions = torch.arange(begin, end, device=device).expand(len(read), -1)
            tokens = torch.tensor(padded, device=device)
            self._decoder.forward(tokens, positions, self.cache, last_only=True)

    def _pass(self, plan: SkipPlan) -> torch.Tensor:
        """Logits ``[B, 1, V]`` behind the last token of every row."""
        device = self._decoder.device
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows], device=device)
        positions = torch.tensor([[len(row.tokens) - 1] for row in self._rows], device=device)
        return self._decoder.forward(tokens, positions, self.cache, plan, last_only=True)
