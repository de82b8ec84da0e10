"""Outcomes kept by key and given back: what a search that goes on is led by."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.memo import Entry, Memo, Usage
from tests import tiny

Kept = dict[str, Entry]


def never() -> None:
    pytest.fail("what is known is asked anew")


def fresh(kept: Kept, clock: Callable[[], float] = lambda: 0.0) -> Memo:
    """A memo of a further run, which knows what others have kept."""
    return Memo(tiny.decoder("llama"), kept, kept.__setitem__, clock=clock)


def values(kept: Kept) -> dict[str, object]:
    return {key: entry.value for key, entry in kept.items()}


def test_what_is_known_is_not_asked_again_and_what_follows_is_kept() -> None:
    kept: Kept = {}
    first = fresh(kept)
    assert [first.cached("a", lambda: 1), first.cached("b", lambda: [2])] == [1, [2]]

    second = fresh(kept)

    assert [second.cached("a", never), second.cached("b", never)] == [1, [2]]
    assert second.cached("c", lambda: 3) == 3
    assert values(kept) == {"a": 1, "b": [2], "c": 3}


def test_an_outcome_may_be_none() -> None:
    kept: Kept = {}
    fresh(kept).cached("a", lambda: None)
    assert fresh(kept).cached("a", never) is None


def test_within_one_run_nothing_is_asked_twice_either() -> None:
    memo = Memo(tiny.decoder("llama"))
    assert [memo.cached("a", lambda: 1), memo.cached("a", never)] == [1, 1]


def test_in_whatever_order_it_is_asked_what_is_known_is_known() -> None:
    kept: Kept = {}
    first = fresh(kept)
    for key in "abc":
        first.cached(key, lambda: 1)

    other = fresh(kept)
    assert other.cached("c", never) == 1
    assert other.cached("x", lambda: 2) == 2
    assert other.cached("a", never) == 1
    assert list(kept) == ["a", "b", "c", "x"]


def test_work_within_other_work_is_kept_too() -> None:
    kept: Kept = {}
    memo = fresh(kept)
    assert memo.cached("outer", lambda: [memo.cached("inner", lambda: 1), 2]) == [1, 2]
    assert values(kept) == {"inner": 1, "outer": [1, 2]}


def test_an_outcome_that_fails_is_none() -> None:
    kept: Kept = {}
    memo = fresh(kept)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memo.cached("a", interrupted)
    assert not kept
    assert memo.cached("a", lambda: 1) == 1


def test_seconds_add_up_over_runs() -> None:
    now = 100.0
    kept: Kept = {}
    first = fresh(kept, lambda: now)
    now += 5
    assert first.usage().seconds == 5
    now += 1
    first.cached("a", lambda: 1)
    now += 50  # lost: nothing tells of it any more

    now = 3000.0
    second = fresh(kept, lambda: now)
    now += 2  # less than the first run took to come here
    second.cached("a", never)
    assert second.usage().seconds == 6
    now += 2
    assert second.usage().seconds == 6 + 2
    second.cached("a", never)
    assert second.usage().seconds == 6 + 2, "it never falls"
    assert kept["a"].usage == Usage(6.0, 0, 0)


def test_passes_add_up_over_runs() -> None:
    decoder = tiny.decoder("llama")
    kept: Kept = {}

    def decode() -> int:
        return len(list(Generation(decoder, GenerationRequest(tiny.prompt(9), 3))))

    first = fresh(kept)
    first.cached("a", decode)
    before = decoder.full_passes
    second = fresh(kept)
    second.cached("a", never)
    decode()
    now = second.usage()
    assert now.full_passes == kept["a"].usage.full_passes + decoder.full_passes - before
    assert now.full_passes == 2 * kept["a"].usage.full_passes > 0
