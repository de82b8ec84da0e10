"""Outcomes kept and given back: what a search that goes on is led by."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.record import Entry, Meter, Outcome, Record
from tests import tiny


class Kept:
    """A keeper in memory, which may be cut off behind an entry."""

    def __init__(self, entries: tuple[Entry, ...] = ()) -> None:
        self.entries = list(entries)
        self.cuts: list[int] = []

    def append(self, entry: Entry) -> None:
        assert entry.number == len(self.entries) + 1
        self.entries.append(entry)

    def cut(self, count: int) -> None:
        self.cuts.append(count)
        del self.entries[count:]


def never() -> None:
    pytest.fail("what is known is asked anew")


def fresh(kept: Kept, clock: Callable[[], float] = lambda: 0.0) -> Record:
    return Record(tiny.decoder("llama"), tuple(kept.entries), kept, clock=clock)


def outcomes(kept: Kept) -> list[tuple[Outcome, ...]]:
    return [entry.outcomes for entry in kept.entries]


def test_what_is_known_is_not_asked_again_and_what_follows_is_kept() -> None:
    kept = Kept()
    first = fresh(kept)
    assert [first.did("a", lambda: 1), first.did("b", lambda: [2])] == [1, [2]]

    second = fresh(kept)

    assert [second.did("a", never), second.did("b", never)] == [1, [2]]
    assert second.did("c", lambda: 3) == 3
    assert outcomes(kept) == [(("a", 1),), (("b", [2]),), (("c", 3),)]


def test_what_is_held_is_kept_with_what_follows() -> None:
    kept = Kept()
    record = fresh(kept)
    record.did("step", lambda: 1, hold=True)
    record.did("step", lambda: 2, hold=True)
    assert not kept.entries
    record.did("end", lambda: 3)
    record.commit()
    assert outcomes(kept) == [(("step", 1), ("step", 2), ("end", 3))]


def test_work_within_other_work_is_part_of_its_outcome() -> None:
    kept = Kept()
    record = fresh(kept)
    assert record.did("outer", lambda: [record.did("inner", lambda: 1), 2]) == [1, 2]
    assert outcomes(kept) == [(("outer", [1, 2]),)]


def test_a_search_that_takes_another_way_goes_on_live() -> None:
    """The entry in which it parts is begun anew, with what of it still holds."""
    kept = Kept()
    record = fresh(kept)
    record.did("a", lambda: 1)
    record.did("b", lambda: 2, hold=True)
    record.did("c", lambda: 3)
    record.did("d", lambda: 4)

    other = fresh(kept)
    assert (other.did("a", never), other.did("b", never, hold=True)) == (1, 2)
    assert other.did("x", lambda: 5, hold=True) == 5
    assert len(kept.entries) == 3, "nothing is given up before there is something else"
    assert other.did("d", lambda: 6) == 6

    assert kept.cuts == [1]
    assert outcomes(kept) == [(("a", 1),), (("b", 2), ("x", 5), ("d", 6))]


def test_a_search_that_parts_between_two_entries_gives_up_only_the_second() -> None:
    kept = Kept()
    record = fresh(kept)
    record.did("a", lambda: 1)
    record.did("b", lambda: 2)
    other = fresh(kept)
    other.did("a", never)
    other.did("x", lambda: 3)
    assert outcomes(kept) == [(("a", 1),), (("x", 3),)]


def test_an_interruption_while_known_outcomes_are_given_back_loses_none() -> None:
    kept = Kept()
    record = fresh(kept)
    record.did("a", lambda: 1)
    record.did("b", lambda: 2, hold=True)
    record.did("c", lambda: 3)

    interrupted = fresh(kept)
    interrupted.did("a", never)
    interrupted.did("b", never, hold=True)
    interrupted.meter()  # the search ends, and says how long it took
    interrupted.close()

    assert not kept.cuts
    assert outcomes(kept) == [(("a", 1),), (("b", 2), ("c", 3))]


def test_what_was_held_at_an_interruption_is_kept_but_not_its_end() -> None:
    kept = Kept()
    record = fresh(kept)
    record.did("step", lambda: 1, hold=True)
    record.meter()
    record.did("step", lambda: 2, hold=True)
    record.meter()
    record.close()
    record.close()
    ((first, (key, _), second),) = outcomes(kept)
    assert (first, key, second) == (("step", 1), "meter", ("step", 2))


def test_an_outcome_that_fails_is_none() -> None:
    kept = Kept()
    record = fresh(kept)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record.did("a", interrupted)
    record.close()
    assert not kept.entries
    assert record.did("b", lambda: record.did("c", lambda: 1)) == 1


def test_seconds_add_up_over_runs_and_readings_are_repeated() -> None:
    now = 100.0
    kept = Kept()
    first = fresh(kept, lambda: now)
    now += 5
    assert first.meter().seconds == 5
    now += 1
    first.did("a", lambda: 1)
    now += 50  # lost: nothing tells of it any more

    now = 3000.0
    second = fresh(kept, lambda: now)
    now += 7  # a model is loaded
    assert second.meter().seconds == 5
    second.did("a", never)
    now += 2
    assert second.meter().seconds == 6 + 2
    assert kept.entries[0].meter == Meter(6.0, 0, 0)


def test_passes_add_up_over_runs() -> None:
    decoder, kept = tiny.decoder("llama"), Kept()

    def decode() -> int:
        return len(list(Generation(decoder, GenerationRequest(tiny.prompt(9), 3))))

    first = fresh(kept)
    first.did("a", decode)
    before = decoder.full_passes
    second = fresh(kept)
    second.did("a", never)
    decode()
    now = second.meter()
    assert now.full_passes == kept.entries[0].meter.full_passes + decoder.full_passes - before
    assert now.full_passes == 2 * kept.entries[0].meter.full_passes > 0
