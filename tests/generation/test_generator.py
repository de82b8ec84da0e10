from __future__ import annotations

import pytest

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResult
from conflayers_cli.generation.sequence import Step
from conflayers_cli.generation.stats import DraftCount, GenerationStats
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny
from tests.cli.conftest import byte_tokenizer


class Bytes:
    """A tokenizer by which token i is the byte i; 99 is a special token."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool, **other: object) -> str:
        data = bytes(token for token in tokens if not (skip_special_tokens and token == 99))
        return data.decode("utf-8", "replace")


def ask(
    decoder: Decoder, *, stops: tuple[str, ...] = (), ends: frozenset[int] = frozenset()
) -> tuple[GenerationResult, list[str]]:
    generator = TextGenerator(
        decoder,
        Bytes(),
        end_tokens=ends,
        proposer=SkipProposer(decoder, SkipPlan.of_layers([2]), 4, 0.0),
    )
    responses = list(generator.stream([GenerationRequest(tiny.prompt(9), 20, stop=stops)]))
    (given,) = (each.result for each in responses if each.result is not None)
    pieces = [each.text for each in responses if each.text]
    return given, pieces


def test_pieces_add_up_to_the_text() -> None:
    given, pieces = ask(tiny.decoder("llama"))
    assert len(pieces) > 1
    assert "".join(pieces) == given.text
    assert given.text == bytes(given.token_ids).replace(b"c", b"").decode()  # c is special
    assert (len(given.token_ids), given.finish_reason) == (20, "length")
    assert given.prompt_tokens == 9


def test_counts_add_up() -> None:
    given, _ = ask(tiny.decoder("llama"))
    stats = given.stats
    assert (stats.tokens, stats.decode_tokens) == (20, 19)
    assert stats.decode_tokens <= stats.steps + stats.accepted
    assert stats.by_drafter["skip"].drafted == stats.drafted > 0
    assert stats.tokens_per_step == 19 / stats.steps
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    assert stats.tokens_per_second == 19 / stats.decode_seconds


def test_an_end_token_is_counted_but_not_read() -> None:
    whole, _ = ask(tiny.decoder("llama"))
    end = whole.token_ids[4]
    given, _ = ask(tiny.decoder("llama"), ends=frozenset({end}))
    assert given.finish_reason == "stop"
    assert given.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]


def test_a_stop_text_is_cut_off() -> None:
    whole, _ = ask(tiny.decoder("llama"))
    stop = whole.text[4:7]
    given, pieces = ask(tiny.decoder("llama"), stops=(stop,))
    assert given.finish_reason == "stop"
    assert given.text == whole.text[: whole.text.index(stop)] == "".join(pieces)


def test_nothing_decoded_has_no_rates() -> None:
    stats = GenerationStats.from_steps([Step((1,), 0, 0, "prefill", 0.0, 0.5, "length")])
    assert (stats.tokens, stats.decode_tokens, stats.prefill_seconds) == (1, 0, 0.5)
    assert stats.tokens_per_second is stats.tokens_per_step is stats.acceptance_rate is None


def test_a_step_with_several_sources_counts_for_each() -> None:
    """The tokens kept are the chain's first."""
    sources = ("ngram", "ngram", "skip", "skip")
    mixed = Step((1, 2, 3, 4), 4, 3, "mixed", 0.0, 0.5, None, sources=sources)
    plain = Step((5, 6), 2, 1, "mixed", 0.0, 0.5, "length", sources=("ngram", "ngram"))
    stats = GenerationStats.from_steps([mixed, plain])
    assert stats.by_drafter == {"ngram": DraftCount(2, 4, 3), "skip": DraftCount(1, 2, 1)}
    assert (stats.drafted, stats.accepted, stats.steps) == (6, 4, 2)


def test_total() -> None:
    one = GenerationStats(1.0, 2.0, 11, 10, 5, {"skip": DraftCount(5, 10, 6)})
    two = GenerationStats(
        1.0, 2.0, 11, 10, 10, {"ngram": DraftCount(1, 2, 1), "skip": DraftCount(1, 2, 0)}
    )
    total = GenerationStats.total([one, two])
    assert total == GenerationStats(
        2.0, 4.0, 22, 20, 15, {"skip": DraftCount(6, 12, 6), "ngram": DraftCount(1, 2, 1)}
    )
    assert (total.drafted, total.accepted, total.tokens_per_second) == (14, 7, 5.0)
    assert GenerationStats.total([]) == GenerationStats()


def test_json_of_an_answer() -> None:
    given = GenerationResult(
        "a", (1,), "stop", 3, GenerationStats(0.1, 0.2, 3, 2, 1, {"skip": DraftCount(1, 2, 1)})
    )
    document = given.as_json()
    assert document["token_ids"] == [1]
    assert document["stats"]["acceptance_rate"] == 0.5
    assert document["stats"]["by_drafter"] == {"skip": {"steps": 1, "drafted": 2, "accepted": 1}}


@pytest.mark.parametrize("text", ["grüße 🙂", "a  b\n"])
def test_the_byte_tokenizer_of_these_tests_reads_back(text: str) -> None:
    tokenizer = byte_tokenizer(None)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
