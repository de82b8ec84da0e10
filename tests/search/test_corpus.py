"""The texts that searches judge by, and the stream they decode along."""

from collections.abc import Callable
from typing import Any

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import MIN_TOKENS, Continuations, PromptStream
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny

PROMPTS = tuple(tuple(tiny.prompt(9, seed)) for seed in range(3))


def continuations(ends: frozenset[int] = frozenset(), tokens: int = 24) -> Continuations:
    return Continuations(tiny.decoder("llama"), PROMPTS, tokens, ends)


def test_texts_are_what_the_model_writes_in_the_order_of_the_prompts() -> None:
    found = continuations().get(2)
    assert [sample.prompt for sample in found] == list(PROMPTS[:2])
    for sample in found:
        expected = tiny.generated(tiny.decoder("llama"), sample.prompt, 24)
        assert list(sample.output) == expected


def test_what_a_stream_decoded_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = continuations()
    stream = PromptStream(known, PROMPTS)
    proposer = SkipProposer(tiny.decoder("llama"), SkipPlan.of_layers([2]), 4, 0.0)
    while stream.previous is None:
        stream.step(proposer)

    decoded: list[str] = []
    cached = known.memo.cached

    def counted(key: str, compute: Callable[[], Any]) -> Any:
        decoded.append(key)
        return cached(key, compute)

    monkeypatch.setattr(known.memo, "cached", counted)
    first, second = known.get(2)
    assert decoded == ["texts 1, 24 tokens"]
    assert list(first.output) == tiny.generated(tiny.decoder("llama"), PROMPTS[0], 24)
    assert list(second.output) == tiny.generated(tiny.decoder("llama"), PROMPTS[1], 24)


def test_a_text_cut_off_by_the_end_of_a_search_is_decoded_to_its_end() -> None:
    known = continuations()
    stream = PromptStream(known, PROMPTS)
    for _ in range(3):
        stream.step(None)
    stream.note()
    assert len(known.get(1)[0].output) == 24


def test_short_texts_are_passed_over() -> None:
    first = tiny.generated(tiny.decoder("llama"), PROMPTS[0], 24)
    end = first[2]
    found = continuations(frozenset({end})).get(3)
    assert all(len(sample.output) >= MIN_TOKENS for sample in found)
    assert PROMPTS[0] not in [sample.prompt for sample in found]


def test_a_stream_goes_round_and_round() -> None:
    stream = PromptStream(continuations(tokens=4), PROMPTS)
    seen = []
    for _ in range(4 * len(PROMPTS)):
        stream.step(None)
        seen.append(tuple(stream.current.tokens[:9]))
    assert list(dict.fromkeys(seen)) == list(PROMPTS)
    assert seen[-1] == seen[2]


def test_prompts_that_end_at_once_are_an_error() -> None:
    every = frozenset(range(tiny.VOCABULARY))
    with pytest.raises(InputError, match="ends with its first token"):
        PromptStream(continuations(every), PROMPTS).step(None)


def test_the_window_comes_from_the_longer_text() -> None:
    stream = PromptStream(continuations(tokens=40), PROMPTS)
    while stream.previous is None:
        stream.step(None)
    assert len(stream.current.output) < 32
    assert stream.window_source(100) is stream.previous
    for _ in range(32):
        stream.step(None)
    assert stream.window_source(100) is stream.current
