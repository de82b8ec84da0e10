"""The n-gram index against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.spec_decode.ngram import NO_MATCH, Match, NgramMatcher
from conflayers_cli.spec_decode.suffix_index import MAX_MATCH_LENGTH, MAX_POSITIONS

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=MAX_POSITIONS)


def index_of(text: list[int]) -> NgramMatcher:
    index = NgramMatcher()
    index.update(text)
    return index


def searched(text: list[int], drafted: list[int], count: int) -> list[Match]:
    """Every acceptable answer: the longest match, of the places where it ends."""
    whole = text + drafted
    found: list[tuple[int, int]] = []
    for end in range(len(text) - 1):
        length = 0
        while (
            length <= end
            and length < MAX_MATCH_LENGTH
            and whole[end - length] == whole[-1 - length]
        ):
            length += 1
        if length:
            found.append((length, end))
    longest = max((length for length, _ in found), default=0)
    answers = []
    places = [end for length, end in found if length == longest]
    nexts = [text[end + 1] for end in places]
    for end in places:
        behind = list(whole)
        for at in range(count):
            behind.append(behind[end + 1 + at])
        agreed = len(set(nexts)) == 1
        if nexts.count(text[end + 1]) == max(map(nexts.count, nexts)):
            answers.append(Match(longest, tuple(behind[len(whole) :]), agreed))
    return answers or [NO_MATCH]


@given(text=TOKENS, drafted=st.lists(st.integers(0, 3), max_size=4), count=st.integers(1, 12))
def test_the_longest_match_is_found(text: list[int], drafted: list[int], count: int) -> None:
    """In a text so short that no place of an n-gram is forgotten."""
    answers = searched(text, drafted, count)
    assert index_of(text).lookup(text, drafted, count) == answers[-1]  # the latest place


@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=60), cuts=st.lists(st.integers(1, 60)))
def test_it_grows_with_the_text(text: list[int], cuts: list[int]) -> None:
    """However it came to be, token by token or at once, and with a last token taken back (another
    one has come in its place by the next time).
    """
    growing = NgramMatcher()
    for cut in sorted(cuts):
        if cut < len(text):
            growing.update([*text[:cut], 9])
    growing.update(text)
    assert growing.lookup(text, [], 5) == index_of(text).lookup(text, [], 5)


def test_a_period_goes_on() -> None:
    text = [7, 7, 1, 2, 3, 1, 2, 3, 1]
    assert index_of(text).lookup(text, [], 8) == Match(4, (2, 3, 1, 2, 3, 1, 2, 3))
    assert index_of(text).lookup(text, [2, 3], 4).tokens == (1, 2, 3, 1)
    ones = [5, 1, 1]
    assert index_of(ones).lookup(ones, [], 3) == Match(1, (1, 1, 1))


def test_of_equally_long_matches_what_followed_most_often() -> None:
    text = [1, 5, 0, 1, 5, 9, 1, 6, 8, 1]
    assert index_of(text).lookup(text, [], 2) == Match(1, (5, 9), agreed=False)
    text = [1, 5, 0, 1, 6, 8, 1]
    assert index_of(text).lookup(text, [], 2) == Match(1, (6, 8), agreed=False)
    text = [1, 5, 0, 1, 5, 8, 1]
    assert index_of(text).lookup(text, [], 2) == Match(1, (5, 8))


def test_no_match() -> None:
    assert index_of([1, 2, 3]).lookup([1, 2, 3], [], 4) == NO_MATCH
    assert index_of([1]).lookup([1], [], 4) == NO_MATCH
    assert index_of([1, 1]).lookup([1, 1], [], 0) == NO_MATCH


def test_a_long_match_is_found_among_many_short_ones() -> None:
    """Only the latest places of an n-gram are remembered, those of longer ones apart from it."""
    text = [3, 4, 5, 6, 7, 8, *([6, 0] * (2 * MAX_POSITIONS)), 3, 4, 5, 6]
    assert index_of(text).lookup(text, [], 2) == Match(4, (7, 8))
