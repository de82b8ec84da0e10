"""Texts that go on from one another, decoded on one cache: only what is new is read.

A chat gives the model its whole conversation at every turn. Most of it has been read or written
before: keys and values of the tokens that the text shares, from its beginning on, with the one
before it are still in the cache. What differs behind them is overwritten, which costs nothing (see
`engine.cache`). Texts are compared by their tokens, for a chat template may render earlier turns
otherwise than before (models that reason drop their thoughts), and an answer's text need not give
the tokens again that it was written in.
"""

from __future__ import annotations

from collections.abc import Sequence

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import check_request
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import Proposer


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share from the beginning on."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


class PrefixCache:
    """One text after another, in the same memory.

    Every answer is what decoding its whole prompt anew would give (in half precision as far as
    `Decoder.rows` makes passes agree to the bit).

    Args:
        decoder: the model.
        limit: the longest text there will be, for the cache need not grow beyond it; None: unknown.
    """

    def __init__(self, decoder: Decoder, limit: int | None = None) -> None:
        self._decoder = decoder
        self._limit = limit
        self._latest: Generation | None = None

    @property
    def cached_tokens(self) -> list[int]:
        """The tokens whose keys and values are there."""
        latest = self._latest
        if latest is None:
            return []
        return latest.tokens[:-1] if latest.output else latest.tokens[: latest.filled]

    def begin(
        self,
        request: GenerationRequest,
        *,
        drafter: Proposer | None = None,
        end_tokens: frozenset[int] = frozenset(),
    ) -> Generation:
        """A generation that goes on from the cached tokens, as far as the prompt begins with them.

        It may be left at any step. The one begun before must not be gone on with: its memory is
        this one's now.

        Args:
            request: its prompt is the whole text so far.
            drafter, end_tokens: as for `Generation`.

        Raises:
            InputError: as `Generation`; what is cached stays as it is.
        """
        check_request(self._decoder, request)  # before memory is taken for it
        # the last token is run in any case: it decides the first new one
        shared = common_length(self.cached_tokens, request.prompt)
        filled = min(shared, len(request.prompt) - 1)
        generation = Generation(
            self._decoder,
            request,
            drafter=drafter,
            end_tokens=end_tokens,
            cache=self._memory(request.length, filled),
            filled=filled,
        )
        self._latest = generation
        return generation

    def _memory(self, length: int, filled: int) -> KVCache:
        """A cache for ``length`` positions with the first ``filled`` cached ones in it."""
        if self._latest is None:
            return self._decoder.new_cache(length)
        cache = self._latest.cache
        if cache.capacity >= length:
            return cache
        # Twice as much as before, so that a long conversation is copied a few times only.
        wanted = max(length, min(2 * cache.capacity, self._limit or 2 * cache.capacity))
        grown = self._decoder.new_cache(wanted)
        grown.copy_from(cache, filled)
        return grown
