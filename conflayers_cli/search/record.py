"""What a calibration has measured, in its order, so that one cut short can go on where it was.

A search is a function of what it measures: the tokens that the model wrote, confidences,
agreements, times. Whatever asks the model or the clock does it through a :class:`Record`, which
hands every outcome on to be kept. Given the outcomes of a run that was cut short, a record returns
these, in their order, instead of asking anew: any search is led by them, in no more than the time
of its bookkeeping, to the state in which that run ended. From there on the model is asked again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed

METER = "meter"
"""The key of readings of the clock and of the passes counted."""

Outcome = tuple[str, Any]


@dataclass(frozen=True)
class Meter:
    """What a calibration has taken since it began, in all its runs.

    Attributes:
        seconds: at work.
        full_passes, draft_passes: of the whole model, and with layers left out.
    """

    seconds: float
    full_passes: int
    draft_passes: int


@dataclass(frozen=True)
class Entry:
    """Outcomes kept together, all of them or none.

    Attributes:
        number: counted from 1.
        meter: as it stood then.
        outcomes: what was asked and what came of it: None, booleans, numbers, texts, arrays, and
            lists and dictionaries of such.
    """

    number: int
    meter: Meter
    outcomes: tuple[Outcome, ...]


def label_of(plan: SkipPlan) -> str:
    """A plan in the key of an outcome."""
    attention, mlp = (" ".join(map(str, named)) for named in (plan.attention, plan.mlp))
    weights = f", {plan.weights} weights" if plan.weights else ""
    return f"attention {attention or 'whole'}, MLP {mlp or 'whole'}{weights}"


class Keeper(Protocol):
    """Keeps the entries of a record."""

    def append(self, entry: Entry) -> None:
        """Keep one more."""

    def cut(self, count: int) -> None:
        """Keep the first ``count`` only: the search has taken another way than the others tell."""


class Record:
    """The outcomes of a calibration, known ones first.

    Args:
        decoder: the model, whose passes are counted.
        entries: of the run to go on with.
        keeper: told about every further entry; None: nothing is kept.
        clock: in seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        entries: Sequence[Entry] = (),
        keeper: Keeper | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder = decoder
        self._keeper = keeper
        self._clock = clock
        self._known = deque((e.number, outcome) for e in entries for outcome in e.outcomes)
        self._kept = len(entries)
        self._cut: int | None = None
        self._pending: list[Outcome] = []
        self._replayed: list[Outcome] = []
        self._replaying = 0
        self._asking = False
        self._before = entries[-1].meter if entries else Meter(0.0, 0, 0)
        self._begin = self._counted()

    def did(self, key: str, work: Callable[[], Any], *, hold: bool = False) -> Any:
        """What ``work`` gives, or what it gave in the run that this one goes on with.

        Of several processes of one torchrun all get the first's. Work within other work is part of
        that one's outcome.

        Args:
            key: says what is done, so that a search that takes another way is noticed.
            work: asks the model, or the clock; gives what an :class:`Entry` can hold.
            hold: keep it with what follows, as a part of one entry.
        """
        if self._asking:
            return work()
        if self._known:
            number, (expected, value) = self._known[0]
            if key == expected:
                self._known.popleft()
                self._replay(number, (key, value))
                return value
            self._part(number)
        self._asking = True
        try:
            value = agreed(work())
        finally:
            self._asking = False
        self._pending.append((key, value))
        if not hold:
            self.commit()
        return value

    @property
    def replaying(self) -> bool:
        """Whether outcomes of an earlier run are still to come."""
        return bool(self._known)

    def meter(self) -> Meter:
        """What the calibration has taken so far; the very same where the search is replayed."""
        reading = self.did(METER, lambda: list(self._live()), hold=True)
        return Meter(float(reading[0]), int(reading[1]), int(reading[2]))

    def commit(self) -> None:
        """Have what was held kept."""
        if not self._pending:
            return
        if self._cut is not None:
            self._kept, cut, self._cut = self._cut, self._cut, None
            if self._keeper is not None:
                self._keeper.cut(cut)
        self._kept += 1
        entry = Entry(self._kept, Meter(*self._live()), (*self._replayed, *self._pending))
        self._replayed, self._pending = [], []
        if self._keeper is not None:
            self._keeper.append(entry)

    def close(self) -> None:
        """Have kept what was held when the search was cut short.

        Not what was read off the meter last: it tells of the end that the search then came to.
        """
        while self._pending and self._pending[-1][0] == METER:
            self._pending.pop()
        self.commit()

    def _counted(self) -> tuple[float, int, int]:
        return self._clock(), self._decoder.full_passes, self._decoder.draft_passes

    def _live(self) -> tuple[float, int, int]:
        """The meter now: what was taken before, and since the last known outcome."""
        before, begin, now = self._before, self._begin, self._counted()
        return (
            before.seconds + now[0] - begin[0],
            before.full_passes + now[1] - begin[1],
            before.draft_passes + now[2] - begin[2],
        )

    def _replay(self, number: int, outcome: Outcome) -> None:
        """An outcome was known; those of its entry are remembered until the next one begins."""
        if self._replaying != number:
            self._replayed = []
        self._replayed.append(outcome)
        if not self._known:
            self._replayed = []
        self._replaying, self._begin = number, self._counted()

    def _part(self, number: int) -> None:
        """The search does something else than the run before did within this entry.

        What follows is asked anew. The entries known are given up only once there is a new one in
        their place: a user's interruption makes a search take another way, too.
        """
        self._known.clear()
        self._cut = number - 1
        if self._replaying != number:
            self._replayed = []
        self._begin = self._counted()
