"""Tokens drafted and accepted by their position in the draft."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conflayers_cli.generation.sequence import Step


@dataclass(frozen=True)
class AcceptedPerPosition:
    """At position ``k`` ``drafted[k]`` tokens were drafted and ``accepted[k]`` of them accepted."""

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __add__(self, other: AcceptedPerPosition) -> AcceptedPerPosition:
        pairs = ((self.drafted, other.drafted), (self.accepted, other.accepted))
        drafted, accepted = (tuple(map(sum, zip_longest(*pair, fillvalue=0))) for pair in pairs)
        return AcceptedPerPosition(drafted, accepted)

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Acceptance rate at each position; None where nothing was drafted."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return tuple(kept / drafted if drafted else None for kept, drafted in pairs)


def count_positions(step: Step) -> dict[str, AcceptedPerPosition]:
    """One step's counts by proposer; the accepted tokens are the draft's first ones."""
    sources = step.sources or (step.proposer,) * step.drafted
    found = {}
    for name in dict.fromkeys(sources):
        own = [source == name for source in sources]
        last = len(own) - own[::-1].index(True)
        found[name] = AcceptedPerPosition(
            tuple(int(mine) for mine in own[:last]),
            tuple(int(mine and k < step.accepted) for k, mine in enumerate(own[:last])),
        )
    return found
