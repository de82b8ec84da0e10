"""Prefix cache of a conversation: only what is new of each prompt is read.

The tokens that a prompt shares, from its beginning on, with the text before it are still in the KV
cache; what differs behind them is overwritten. Texts are compared by their tokens: a chat template
may render earlier turns differently (reasoning models drop their thoughts), and an answer's text
need not give the same tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import check_request
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import Proposer


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share from the beginning on."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class PrefixCache:
    """One text after another on one cache, each as if decoded anew.

    (In half precision as far as passes are batch invariant, see `engine.batch_invariance`.)

    Args:
        decoder: the model.
        limit: length of the longest text, beyond which the cache never grows; None: unknown.
    """

    def __init__(self, decoder: Decoder, limit: int | None = None) -> None:
        self._decoder = decoder
        self._limit = limit
        self._latest: Generation | None = None

    @property
    def cached_tokens(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        latest = self._latest
        if latest is None:
            return []
        return latest.tokens[:-1] if latest.output else latest.tokens[: latest.num_cached]

    def begin(
        self,
        request: GenerationRequest,
        *,
        proposer: Proposer | None = None,
        end_tokens: frozenset[int] = frozenset(),
    ) -> Generation:
        """A generation that reuses the cached tokens with which the prompt begins.

        It may be left at any step. The one before must not be continued: they share their cache.
        Arguments and errors as of `Generation`; the prompt is the whole text so far.
        """
        check_request(self._decoder, request)  # before its cache is allocated
        # The last token is run in any case: it decides the first new one.
        shared = common_length(self.cached_tokens, request.prompt)
        num_cached = min(shared, len(request.prompt) - 1)
        self._latest = Generation(
            self._decoder,
            request,
            proposer=proposer,
            end_tokens=end_tokens,
            cache=self._reserve(request.length, num_cached),
            num_cached=num_cached,
        )
        return self._latest

    def _reserve(self, length: int, num_cached: int) -> KVCache:
        """A cache for ``length`` positions that holds the first ``num_cached`` tokens."""
        if self._latest is None:
            return self._decoder.new_cache(length)
        cache = self._latest.cache
        if cache.capacity >= length:
            return cache
        # Twice as much as before, so that a long conversation is copied a few times only.
        wanted = max(length, min(2 * cache.capacity, self._limit or 2 * cache.capacity))
        grown = self._decoder.new_cache(wanted)
        grown.copy_from(cache, num_cached)
        return grown
