from __future__ import annotations

from conflayers_cli.generation.positions import AcceptedPerPosition, count_positions
from conflayers_cli.generation.sequence import Step
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.utils.bars import horizontal_bar, vertical_bars


def step(accepted: int, drafted: int, sources: tuple[str, ...] = ()) -> Step:
    return Step((1,) * (accepted + 1), drafted, accepted, "skip", 0.1, 0.2, None, sources=sources)


def test_places_are_counted_from_the_draft_s_first() -> None:
    stats = GenerationStats.from_steps([step(2, 3), step(0, 2), step(0, 0)])
    assert stats.by_position == {"skip": AcceptedPerPosition((2, 2, 1), (1, 1, 0))}
    assert stats.by_position["skip"].rates == (0.5, 0.5, 0.0)
    assert sum(stats.by_position["skip"].accepted) == stats.accepted
    assert sum(stats.by_position["skip"].drafted) == stats.drafted
    assert stats.draft_seconds == 0.1 + 0.1 + 0.1


def test_who_drafts_behind_another_keeps_the_chain_s_places() -> None:
    found = count_positions(step(3, 4, ("ngram", "ngram", "skip", "skip")))
    assert found == {
        "ngram": AcceptedPerPosition((1, 1), (1, 1)),
        "skip": AcceptedPerPosition((0, 0, 1, 1), (0, 0, 1, 0)),
    }
    assert found["skip"].rates == (None, None, 1.0, 0.0)


def test_bars() -> None:
    assert [horizontal_bar(share, 2) for share in (-1, 0, 0.5, 0.75, 1, 9)] == [
        *("", "", "█", "█▌", "██", "██")
    ]
    assert vertical_bars([0.0, None, 0.5, 0.99, 1.0]) == "▁ ▅██"
