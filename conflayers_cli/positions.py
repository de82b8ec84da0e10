"""How far into a draft tokens are accepted: counts by their place in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conflayers_cli.generation.loop import Step


@dataclass(frozen=True)
class Positions:
    """What was drafted and what of it was kept, by place in the draft.

    Attributes:
        drafted: ``drafted[k]`` tokens stood at place ``k`` of a chain, counted from 0.
        accepted: so many of them were kept; as many entries.
    """

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __add__(self, other: Positions) -> Positions:
        return Positions(
            _sum(self.drafted, other.drafted),
            _sum(self.accepted, other.accepted),
        )

    @property
    def rates(self) -> tuple[float | None, ...]:
        """The share kept at each place; None where nothing was drafted."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return tuple(kept / drafted if drafted else None for kept, drafted in pairs)


def positions_of(step: Step) -> dict[str, Positions]:
    """The places in one step's draft, by who drafted; the tokens kept are the chain's first."""
    sources = step.sources or (step.drafter,) * step.drafted
    found = {}
    for name in dict.fromkeys(sources):
        own = [source == name for source in sources]
        last = len(own) - own[::-1].index(True)
        found[name] = Positions(
            tuple(int(mine) for mine in own[:last]),
            tuple(int(mine and k < step.accepted) for k, mine in enumerate(own[:last])),
        )
    return found


def added(one: Mapping[str, Positions], other: Mapping[str, Positions]) -> dict[str, Positions]:
    """Both counts as one."""
    names = dict.fromkeys((*one, *other))
    return {n: one.get(n, Positions()) + other.get(n, Positions()) for n in names}


def _sum(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))
