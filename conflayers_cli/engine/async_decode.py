"""Greedy passes over one row, each of which runs the token that the one before it chose.

The token goes from pass to pass on the device: the host may launch passes ahead and read what they
chose afterwards, so that the GPU does not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from conflayers_cli.engine.forward import ModelInput
from conflayers_cli.engine.graph_runner import ForwardSpec, GraphRunner, Read
from conflayers_cli.engine.token_choice import Choice
from conflayers_cli.kernels.kv_cache import KVCache


class AsyncDecode:
    """A row that feeds itself.

    What is read and what is written in the cache behind the last token read is the caller's matter:
    passes launched ahead write keys of tokens that may never be text.

    Args:
        runner: runs the passes.
        cache: of a single row, filled below ``position``.
        kind: of the passes.
        rows: how often each pass runs its token (see `.batch_invariance`).
        places: whether the repeated ones have places of their own, too.
        token, position: what the first pass runs, and where.
        count: told about every pass launched.

    Attributes:
        position: where the pass launched next runs its token.
    """

    def __init__(
        self,
        runner: GraphRunner,
        cache: KVCache,
        kind: ForwardSpec,
        rows: int,
        places: bool,
        token: int,
        position: int,
        count: Callable[[], None],
    ) -> None:
        self.cache = cache
        self.kind = kind
        self.position = position
        self._count = count
        self._runner = runner
        self._rows = rows
        self._places = places
        self._last = token, position  # the last token known, and where it is run
        self._under_way: deque[Read] = deque()
        self._drained: deque[Choice] = deque()
        self._newest = token  # the last token known, read by the caller or not

    @property
    def ahead(self) -> int:
        """Passes launched, but not read."""
        return len(self._drained) + len(self._under_way)

    def goes_on_from(self, token: int, position: int) -> bool:
        """Whether :meth:`read` gives what stands behind this token at this place."""
        return self._last == (token, position)

    def launch(self, count: int = 1) -> None:
        """Launch passes, as far as the cache has room for what they write."""
        with torch.inference_mode(), self._runner.passes.lock:
            for _ in range(min(count, self.cache.capacity - self.position)):
                self._under_way.append(self._runner.launch(self))
                self.position += 1
                self._count()

    def read(self) -> Choice:
        """What the oldest pass not read yet has chosen, one at least was launched. Waits for it."""
        with self._runner.passes.lock:  # or another row might have it drained meanwhile
            choice = self._drained.popleft() if self._drained else self._arrived()
        self._last = choice.token, self._last[1] + 1
        return choice

    def inputs(self) -> ModelInput:
        """What the pass launched next is given. The token is right where none is under way."""
        rows, places = (1, self._rows), (1, self._rows if self._places else 1)
        return ModelInput(torch.full(rows, self._newest), torch.full(places, self.position))

    def drain(self) -> None:
        """Read all that is under way."""
        while self._under_way:
            self._drained.append(self._arrived())

    def _arrived(self) -> Choice:
        token, confidence = self._under_way.popleft()()
        self._newest = int(token)
        return Choice(self._newest, confidence)
