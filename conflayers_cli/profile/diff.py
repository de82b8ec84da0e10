"""What differs between two profiles, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conflayers_cli.profile.schema import Profile

_DRAFTING = ("model", "skip", "draft", "ranges")
_PRIOR = "measured.acceptance_rate"
"""The acceptance rate expected of drafts until some were seen."""


@dataclass(frozen=True)
class Difference:
    """One key that two profiles disagree about.

    Attributes:
        key: with dots, ranges by the context they begin at: ``ranges.1000.skip.mlp``.
        before, after: the values in the one and in the other; None: not there.
        added, removed: layers that only the other, or only the one, lists; None for other keys.
        changes_drafting: it is about what is drafted, not about how, when and where it was found.
    """

    key: str
    before: Any
    after: Any
    added: tuple[int, ...] | None
    removed: tuple[int, ...] | None
    changes_drafting: bool


def differences(one: Profile, other: Profile) -> tuple[Difference, ...]:
    """All keys with other values, in the order of the schema; lists are compared as a whole."""
    before, after = (dict(_flat(_data(profile))) for profile in (one, other))
    return tuple(
        _difference(key, before.get(key), after.get(key))
        for key in _in_order(list(before), list(after))
        if before.get(key) != after.get(key)
    )


def _data(profile: Profile) -> dict[str, Any]:
    data = profile.model_dump(mode="json")
    ranges = {str(each.pop("from_context")): each for each in data["ranges"] or ()}
    return {**data, "ranges": ranges}


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _in_order(one: list[str], other: list[str]) -> list[str]:
    """Both lists' keys, each in its own order, sections together."""
    merged = list(one)
    for position, key in enumerate(other):
        if key in merged:
            continue
        before = [known for known in other[:position] if known in merged]
        merged.insert(merged.index(before[-1]) + 1 if before else 0, key)
    return merged


def _difference(key: str, before: Any, after: Any) -> Difference:
    added = removed = None
    if key.endswith((".attention", ".mlp")) and isinstance(before or after, list):
        ones, others = set(before or ()), set(after or ())
        added, removed = tuple(sorted(others - ones)), tuple(sorted(ones - others))
    drafting = key.split(".")[0] in _DRAFTING or key == _PRIOR
    return Difference(key, before, after, added, removed, drafting)
