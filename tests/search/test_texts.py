"""Which texts plans are judged by."""

from conflayers_cli.search.forced_text import MAX_POSITIONS
from conflayers_cli.search.texts import (
    ANSWER_TOKENS,
    MIN_TEXTS,
    SECONDS_PER_TEXT,
    balanced,
    num_texts,
    num_tokens,
)
from tests import tiny

PROMPTS: list[tuple[int, ...]] = [(i,) * 9 for i in range(7)]


def test_categories_take_turns() -> None:
    names: list[str | None] = ["a", "a", "a", "b", None, "b", "a"]
    kinds = dict(zip(PROMPTS, names, strict=True))
    order = [prompt[0] for prompt in balanced(PROMPTS, kinds)]
    assert order == [0, 3, 4, 1, 5, 2, 6]
    assert balanced(PROMPTS, {}) == PROMPTS
    assert balanced([], {}) == []


def test_memory_and_time_bound_their_number() -> None:
    decoder = tiny.decoder("llama")
    each = decoder.kv_bytes_per_slot * 512
    assert 9 + 2 * MAX_POSITIONS <= 512
    assert num_texts(decoder, PROMPTS, 6, 1 << 30) == 6
    assert num_texts(decoder, PROMPTS, 20, 1 << 30) == 7
    assert num_texts(decoder, PROMPTS, 6, 2 * 4 * each) == 4
    assert num_texts(decoder, PROMPTS, 6, 1) == MIN_TEXTS
    assert num_texts(decoder, PROMPTS, 6, 1 << 30, budget=3 * SECONDS_PER_TEXT) == 3
    assert num_texts(decoder, PROMPTS, 6, 1 << 30, budget=1.0) == MIN_TEXTS
    assert num_texts(decoder, PROMPTS, 6, 2 * 4 * each, tokens=ANSWER_TOKENS) == 2
    assert num_texts(decoder, PROMPTS[:1], 6, 1) == 1
    assert num_texts(decoder, [], 6, 1) == 0


def test_of_long_answers_as_much_is_decoded_as_time_allows() -> None:
    assert num_tokens(128) == num_tokens(128, budget=90.0) == 128
    assert num_tokens(4096) == ANSWER_TOKENS
    assert num_tokens(4096, budget=20.0) == num_tokens(128, budget=20.0) == MAX_POSITIONS + 1
    assert num_tokens(16, budget=20.0) == 16
