"""What a calibration has measured, by key, so that nothing is measured twice.

A search depends on its seed and on what it measures: tokens, confidences, agreements, times.
Everything that asks the model or the clock goes through :meth:`Memo.cached`. An interrupted run
leaves its entries in the :mod:`journal <conflayers_cli.search.journal>`; the run that resumes it
looks them up and so repeats the same search without measuring again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import broadcast_rank0


class Usage(NamedTuple):
    """What a calibration has used since it began, in all its runs.

    Attributes:
        seconds: wall time without loading the model.
        full_passes, draft_passes: passes of the whole model, and with layers skipped.
    """

    seconds: float = 0.0
    full_passes: int = 0
    draft_passes: int = 0


class Entry(NamedTuple):
    """A measured value, and the usage once it was known.

    Attributes:
        value: None, booleans, numbers, strings, arrays, and lists and dictionaries of such.
        usage: running totals.
    """

    value: Any
    usage: Usage


_NO_USAGE = Usage()


def plan_label(plan: SkipPlan) -> str:
    """A plan as part of a key."""
    attention, mlp = (" ".join(map(str, named)) for named in (plan.attention, plan.mlp))
    weights = f", {plan.weights} weights" if plan.weights else ""
    return f"attention {attention or 'whole'}, MLP {mlp or 'whole'}{weights}"


class Memo:
    """Measured values by key, of earlier runs and of this one.

    Args:
        decoder: the model, whose passes are counted.
        known: entries of earlier runs.
        keep: called with every new entry; None: entries are kept in memory alone.
        clock: in seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        known: Mapping[str, Entry] | None = None,
        keep: Callable[[str, Entry], None] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder = decoder
        self._entries = dict(known or {})
        self._keep = keep
        self._clock = clock
        self._used = Usage()
        self._counted = self._counts()

    def cached(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value under a key, computed if it is not known yet; on all ranks rank 0's.

        Args:
            key: everything that decides the value, besides the model, the prompts and the
                settings: what is measured, of which plan, on which text, for which time.
            compute: asks the model or the clock; returns what an :class:`Entry` can hold.
        """
        entry = self._entries.get(key)
        if entry is None:
            value = broadcast_rank0(compute())
            entry = self._entries[key] = Entry(value, self._use())
            if self._keep is not None:
                self._keep(key, entry)
        else:
            self._use(entry.usage)
        return entry.value

    def usage(self) -> Usage:
        """What the calibration has used so far, in all its runs; it never falls."""
        return broadcast_rank0(self._use())

    def _counts(self) -> Usage:
        return Usage(self._clock(), self._decoder.full_passes, self._decoder.draft_passes)

    def _use(self, minimum: Usage = _NO_USAGE) -> Usage:
        """Add what was used since the last call; an earlier run had used ``minimum`` by now."""
        now = self._counts()
        added = zip(self._used, now, self._counted, minimum, strict=True)
        seconds, full, draft = (max(used + n - c, other) for used, n, c, other in added)
        self._used, self._counted = Usage(seconds, int(full), int(draft)), now
        return self._used
