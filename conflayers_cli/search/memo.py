"""What a calibration has measured, by key, so that nothing is measured twice.

A search is a function of its seed and of what it measures: tokens, confidences, agreements, times.
Whatever asks the model or the clock does it through :meth:`Memo.cached`. A run that was cut short
leaves its entries in the :mod:`journal <conflayers_cli.search.journal>`; the run that resumes it
finds them, and so comes, in no more than the time of its bookkeeping, to where that one ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed


class Usage(NamedTuple):
    """What a calibration has used since it began, in all its runs.

    Attributes:
        seconds: at work, without loading the model.
        full_passes, draft_passes: of the whole model, and with layers left out.
    """

    seconds: float = 0.0
    full_passes: int = 0
    draft_passes: int = 0


class Entry(NamedTuple):
    """An outcome, and what the calibration had used once it was known.

    Attributes:
        value: None, booleans, numbers, texts, arrays, and lists and dictionaries of such.
        usage: running totals.
    """

    value: Any
    usage: Usage


_NOTHING = Usage()


def label_of(plan: SkipPlan) -> str:
    """A plan in a key."""
    attention, mlp = (" ".join(map(str, named)) for named in (plan.attention, plan.mlp))
    weights = f", {plan.weights} weights" if plan.weights else ""
    return f"attention {attention or 'whole'}, MLP {mlp or 'whole'}{weights}"


class Memo:
    """Outcomes by key: those of earlier runs and of this one.

    Args:
        decoder: the model, whose passes are counted.
        known: entries of earlier runs.
        keep: called with every new entry; None: they are kept in memory alone.
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
        """The value under a key, computed if it is not known yet.

        Of several processes of one torchrun all get the first's.

        Args:
            key: all that decides the outcome, beside the model, the prompts and the settings: what
                is measured, of which plan, on which text, and where it is to be measured several
                times, for which time.
            compute: asks the model or the clock; gives what an :class:`Entry` can hold.
        """
        entry = self._entries.get(key)
        if entry is None:
            value = agreed(compute())
            entry = self._entries[key] = Entry(value, self._use())
            if self._keep is not None:
                self._keep(key, entry)
        else:
            self._use(entry.usage)
        return entry.value

    def usage(self) -> Usage:
        """What the calibration has used up to here, in all its runs; it never falls."""
        return agreed(self._use())

    def _counts(self) -> Usage:
        return Usage(self._clock(), self._decoder.full_passes, self._decoder.draft_passes)

    def _use(self, least: Usage = _NOTHING) -> Usage:
        """Add what was used since the last call; ``least`` was used by the run that came here."""
        now = self._counts()
        added = zip(self._used, now, self._counted, least, strict=True)
        seconds, full, draft = (max(used + n - c, other) for used, n, c, other in added)
        self._used, self._counted = Usage(seconds, int(full), int(draft)), now
        return self._used
