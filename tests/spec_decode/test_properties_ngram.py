"""The n-gram index against a search of long texts, where places are forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.spec_decode.ngram import NO_MATCH, Match, NgramMatcher
from conflayers_cli.spec_decode.suffix_index import MAX_MATCH_LENGTH, MAX_POSITIONS, SIZES

PARTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 8)),
    min_size=1,
    max_size=8,
)


def places_of(text: list[int], tail: list[int]) -> list[int]:
    """Where the first size of n-gram that was there before ended, the latest places."""
    for size in SIZES:
        if size > len(tail):
            continue
        ends = [
            end
            for end in range(size - 1, len(text) - 1)
            if text[end + 1 - size : end + 1] == tail[-size:]
        ]
        if ends:
            return ends[-MAX_POSITIONS:]
    return []


def searched(text: list[int], drafted: list[int], count: int) -> Match:
    """By the documented rule: the longest match, then what followed most often, then the latest."""
    whole = text + drafted
    tail = whole[-MAX_MATCH_LENGTH:]
    lengths = {
        end: next(
            (i for i in range(len(tail)) if i > end or text[end - i] != tail[-1 - i]), len(tail)
        )
        for end in places_of([*text], tail)
    }
    if not lengths or count < 1:
        return NO_MATCH
    longest = max(lengths.values())
    ends = [end for end in lengths if lengths[end] == longest]
    nexts = [text[end + 1] for end in ends]
    most = max(nexts.count(token) for token in nexts)
    end = [each for each, token in zip(ends, nexts, strict=True) if nexts.count(token) == most][-1]
    tokens = list[int]()
    for at in range(end + 1, end + 1 + count):
        known = [*whole, *tokens]
        tokens.append(known[at])
    return Match(longest, tuple(tokens), len(set(nexts)) == 1)


@settings(max_examples=400)
@given(
    parts=PARTS,
    drafted=st.lists(st.integers(0, 2), max_size=5),
    count=st.integers(0, 9),
    cuts=st.lists(st.integers(1, 99), max_size=4),
)
def test_a_lookup_is_a_search(
    parts: list[tuple[list[int], int]], drafted: list[int], count: int, cuts: list[int]
) -> None:
    """Of texts that repeat themselves, and that grew bit by bit."""
    text = [token for part, times in parts for token in part * times]
    index = NgramMatcher()
    for cut in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        index.update(text[:cut])
    assert index.lookup(text, drafted, count) == searched(text, drafted, count)
