"""Text as it is decided against the whole text decoded at once, however it is cut into tokens."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.generation.detokenizer import Detokenizer
from tests.generation.test_detokenizer import LETTERS, TEXTS, decoded, ids, parts, tokenizer

STOPS = st.lists(st.text(st.sampled_from(LETTERS), min_size=1, max_size=4), max_size=3)


def cut_anywhere(text: str, seed: int) -> list[int]:
    """Tokens of a text by no tokenizer's rule: some stretches as they are merged, others byte by
    byte, so that tokens end in the middle of words and of characters.
    """
    chance, tokens, rest = random.Random(seed), list[int](), text
    while rest:
        size = chance.randint(1, 6)
        tokens += ids(rest[:size], merges=chance.random() < 0.5)
        rest = rest[size:]
    return tokens


def expected_of(tokens: list[int], stops: list[str]) -> tuple[str, bool]:
    """(the text, whether a stop string ends it): the first token decides that completes any."""
    for count in range(1, len(tokens) + 1):
        text = decoded(tokens[:count])
        found = [text.index(stop) for stop in stops if stop in text]
        if found and not text.endswith("\ufffd"):  # else its last character is not known yet
            return text[: min(found)], True
    return decoded(tokens), False


@settings(max_examples=400)
@given(text=TEXTS, stops=STOPS, seed=st.integers(0, 999), own=st.tuples(*[st.integers(0, 40)] * 2))
def test_any_cuts_give_the_text_up_to_the_first_stop_string(
    text: str, stops: list[str], seed: int, own: tuple[int, int]
) -> None:
    """Stop strings from the text itself among them, over as many tokens as it comes."""
    if part := text[own[0] : own[0] + 1 + own[1] % 5]:
        stops = [*stops, part]
    tokens = cut_anywhere(text, seed)
    stream = Detokenizer(tokenizer(), stops)
    taken = parts(stream, tokens)
    assert ("".join(taken), stream.stopped) == expected_of(tokens, stops)
    assert stream.text == "".join(taken)
    assert not any("\ufffd" in part for part in taken)


@settings(max_examples=200)
@given(text=TEXTS, seed=st.integers(0, 999), keep=st.integers(0, 99))
def test_cut_off_anywhere_it_is_what_decoding_says(text: str, seed: int, keep: int) -> None:
    """In the middle of a character, too, as where the token budget ends it."""
    tokens = cut_anywhere(text, seed)[:keep]
    stream = Detokenizer(tokenizer())
    assert "".join(parts(stream, tokens)) == stream.text == decoded(tokens)
