"""Tokens drafted and accepted by their position in the draft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conflayers_cli.generation.sequence import Step


@dataclass(frozen=True)
class AcceptedPerPosition:
    """Tokens drafted and accepted by their position in the draft, counted from 0.

    Attributes:
        drafted: ``drafted[k]`` tokens were drafted at position ``k``.
        accepted: ``accepted[k]`` of them were accepted; as many entries.
    """

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __add__(self, other: AcceptedPerPosition) -> AcceptedPerPosition:
        return AcceptedPerPosition(
            _sum(self.drafted, other.drafted),
            _sum(self.accepted, other.accepted),
        )

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Acceptance rate at each position; None where nothing was drafted."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return tuple(kept / drafted if drafted else None for kept, drafted in pairs)


def count_positions(step: Step) -> dict[str, AcceptedPerPosition]:
    """One step's counts by drafter; the accepted tokens are the draft's first ones."""
    sources = step.sources or (step.drafter,) * step.drafted
    found = {}
    for name in dict.fromkeys(sources):
        own = [source == name for source in sources]
        last = len(own) - own[::-1].index(True)
        found[name] = AcceptedPerPosition(
            tuple(int(mine) for mine in own[:last]),
            tuple(int(mine and k < step.accepted) for k, mine in enumerate(own[:last])),
        )
    return found


def merge(
    one: Mapping[str, AcceptedPerPosition], other: Mapping[str, AcceptedPerPosition]
) -> dict[str, AcceptedPerPosition]:
    """Both counts together, drafter by drafter."""
    none = AcceptedPerPosition()
    names = dict.fromkeys((*one, *other))
    return {name: one.get(name, none) + other.get(name, none) for name in names}


def _sum(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))
