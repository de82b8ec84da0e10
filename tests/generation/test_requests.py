"""Requests that come and go while others are decoded: each text is the one it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.generator import TextGenerator, name_failed_prompt
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prefix_cache import PrefixCache
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny
from tests.engine.rows import SkipRows
from tests.engine.test_bfloat16 import VOCABULARY
from tests.engine.test_bfloat16 import decoder as half
from tests.generation.test_generator import Bytes

PLAN = SkipPlan.of_layers([1, 3])


def request(seed: int, count: int = 12, length: int = 6, **more: Any) -> GenerationRequest:
    return GenerationRequest([seed % 90, *tiny.prompt(length, seed)], count, **more)


def alone(decoder: Decoder, one: GenerationRequest) -> GenerationResult:
    (result,) = TextGenerator(decoder, Bytes()).generate([one])
    return result


def drained(generator: TextGenerator) -> list[GenerationResponse]:
    """All responses to the end."""
    responses: list[GenerationResponse] = []
    while more := generator.step():
        responses += more
    return responses


def results(responses: Sequence[GenerationResponse]) -> dict[int, GenerationResult]:
    return {each.number: each.result for each in responses if each.result is not None}


def same(one: GenerationResult, other: GenerationResult) -> bool:
    parts = [(r.text, r.token_ids, r.finish_reason, r.prompt_tokens) for r in (one, other)]
    return parts[0] == parts[1]


def generators(decoder: Decoder) -> dict[str, TextGenerator]:
    return {
        "one by one": TextGenerator(decoder, Bytes(), proposer=SkipProposer(decoder, PLAN, 3, 0.0)),
        "together": TextGenerator(
            decoder, Bytes(), proposer=SkipRows(decoder, PLAN, 3), batch_size=3
        ),
        "together, vanilla": TextGenerator(decoder, Bytes(), batch_size=2),
    }


@pytest.mark.parametrize("kind", ["one by one", "together", "together, vanilla"])
def test_requests_of_every_kind_added_while_others_are_decoded(kind: str) -> None:
    decoder = tiny.decoder("llama")
    generator = generators(decoder)[kind]
    text = alone(decoder, request(3)).text
    requests = [
        request(1, 20),
        request(2, 9, sampling=SamplingParams(repetition_penalty=1.4)),
        request(3, 12, stop=(text[3:5],)),
        request(4, 1),
        request(5, 15, 30),
    ]
    if kind != "together":  # drafts of sampled texts decide what is drawn
        requests[1] = request(2, 9, sampling=SamplingParams(0.9, seed=7))
    if kind == "one by one":
        requests[1] = request(2, 9)
    numbers, responses = [], list[GenerationResponse]()
    for each in requests:
        numbers.append(generator.add(each))
        responses += generator.step()
        responses += generator.step()
    responses += drained(generator)
    done = results(responses)
    assert numbers == list(range(5))
    for number, each in zip(numbers, requests, strict=True):
        assert same(done[number], alone(decoder, each))
        pieces = [r.text for r in responses if r.number == number]
        assert "".join(pieces) == done[number].text
    assert done[2].finish_reason == "stop"
    assert generator.step() == []


@settings(max_examples=12)
@given(
    script=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 14), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    size=st.integers(1, 4),
)
def test_any_order_of_adding_stepping_and_cancelling(
    script: list[tuple[int, int, int, bool]], size: int
) -> None:
    """In bfloat16, to the bit: whatever was added, cancelled or moved to another row."""
    decoder = half()
    requests = [
        GenerationRequest([n, *tiny.prompt(length, n, VOCABULARY)], count)
        for n, (length, count, _, _) in enumerate(script)
    ]
    batch = Batch(decoder, size=size, proposer=SkipRows(decoder, PLAN, 2))
    cancelled = set()
    for number, (each, (_, _, steps, cancel)) in enumerate(zip(requests, script, strict=True)):
        assert batch.add(each) == number
        for _ in range(steps):
            batch.step()
        if cancel and batch.finishes[number // 2] is None:
            batch.cancel(number // 2)
            cancelled.add(number // 2)
    batch.run()
    for number, each in enumerate(requests):
        one = Generation(decoder, each)
        tiny.steps_of(one)
        output = batch.outputs[number]
        assert output == one.output[: len(output)]
        assert len(output) == each.max_new_tokens or number in cancelled


@pytest.mark.parametrize("kind", ["one by one", "together"])
def test_a_cancelled_request_is_told_so_far_and_the_others_go_on(kind: str) -> None:
    decoder = tiny.decoder("llama")
    generator = generators(decoder)[kind]
    requests = [request(seed, 20) for seed in (1, 2, 3, 4)]
    numbers = [generator.add(each) for each in requests]
    responses = [each for _ in range(5) for each in generator.step()]
    running, waiting = numbers[0], numbers[3]
    lengths = []
    for number in (running, waiting):
        last = generator.cancel(number)
        assert last is not None and last.result is not None
        assert (last.number, last.step, last.result.finish_reason) == (number, None, "interrupted")
        expected = alone(decoder, requests[number]).token_ids
        assert last.result.token_ids == expected[: len(last.result.token_ids)]
        before = [each.text for each in responses if each.number == number]
        assert "".join([*before, last.text]) == last.result.text
        assert generator.cancel(number) is None
        lengths.append(len(last.result.token_ids))
    assert lengths[0] > lengths[1] == 0
    done = results(drained(generator))
    assert sorted(done) == [1, 2]
    assert all(same(done[n], alone(decoder, requests[n])) for n in (1, 2))
    assert generator.cancel(running) is None and generator.cancel(99) is None


def test_rows_are_used_again_and_the_cache_grows_only_where_it_must() -> None:
    decoder = tiny.decoder("llama")
    batch = Batch(decoder, size=2)
    requests = [request(seed, 6) for seed in range(6)]
    caches = []
    for each in requests:
        batch.add(each)
        batch.run()
        caches.append(batch.cache)
    assert len({id(cache) for cache in caches}) == 1
    for each in requests[:4]:  # one row is not enough now
        batch.add(each)
    batch.run()
    assert batch.cache.batch == 2
    assert batch.outputs == [
        list(alone(decoder, each).token_ids) for each in [*requests, *requests[:4]]
    ]


def test_a_longer_request_while_others_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = 4 * KV_BLOCK
    decoder = Decoder(tiny.build(config))
    made: list[KVCache] = []
    make = decoder.new_cache

    def making(capacity: int, batch: int = 1) -> KVCache:
        made.append(make(capacity, batch))
        return made[-1]

    monkeypatch.setattr(decoder, "new_cache", making)
    batch = Batch(decoder, size=3)
    requests = [request(1, 30), request(2, 30), request(3, 20, KV_BLOCK)]
    for each in requests:
        batch.add(each)
        batch.step()
        batch.step()
    batch.run()
    assert [(cache.batch, cache.capacity // KV_BLOCK) for cache in made] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    monkeypatch.undo()
    assert batch.outputs == [list(alone(decoder, each).token_ids) for each in requests]


def test_an_idle_generator_holds_no_memory_and_decides_nothing() -> None:
    decoder = tiny.decoder("llama")
    for generator in generators(decoder).values():
        assert generator.step() == []
        first = generator.add(request(1, 3))
        drained(generator)
        assert generator.step() == []
        assert generator.add(request(1, 3)) == first + 1  # no number is given twice
        assert [each.number for each in drained(generator)][-1] == first + 1


@pytest.mark.parametrize("kind", ["one by one", "together"])
def test_a_stream_may_be_closed_early(kind: str) -> None:
    decoder = tiny.decoder("llama")
    generator = generators(decoder)[kind]
    requests = [request(seed, 20) for seed in (1, 2, 3)]
    for taken in (1, 4, 7):
        stream = generator.stream(requests)
        for _ in range(taken):
            next(stream)
        with pytest.raises(RuntimeError, match="being decoded already"):
            next(generator.stream(requests))
        stream.close()  # type: ignore[attr-defined]
        assert generator.step() == []
    whole = generator.generate(requests)
    assert all(same(one, alone(decoder, each)) for one, each in zip(whole, requests, strict=True))


def test_a_chat_goes_on_from_a_stream_that_was_closed() -> None:
    decoder = tiny.decoder("llama")
    kept = PrefixCache(decoder)
    generator = TextGenerator(decoder, Bytes(), begin=kept.begin)
    stream = generator.stream([request(1, 20)])
    taken = [next(stream) for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    text = [*request(1).prompt, *(t for each in taken if each.step for t in each.step.tokens), 5]
    (again,) = generator.generate([GenerationRequest(text, 10)])
    assert again.cached_prompt_tokens == len(text) - 2
    assert same(again, alone(decoder, GenerationRequest(text, 10)))


def test_one_request_that_fails_leaves_the_others_as_they_are() -> None:
    decoder = tiny.decoder("llama")
    generator = TextGenerator(decoder, Bytes(), batch_size=3)
    requests = [request(seed, 20) for seed in (1, 2, 3)]
    for each in requests:
        generator.add(each)
    responses = [each for _ in range(4) for each in generator.step()]
    decide = type(generator._queue)._decide  # type: ignore[union-attr]

    def failing(batch: Batch, drafts: Any) -> list[tuple[int, ...]]:
        decided = decide(batch, drafts)
        decided[1] = (-1,)
        return decided

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_decide", failing)
        with pytest.raises(LogitsError) as caught:
            generator.step()
    assert caught.value.number == 1
    last = generator.cancel(1)
    assert last is not None and last.result is not None
    assert len(last.result.token_ids) == 2
    responses += drained(generator)
    done = results(responses)
    assert all(same(done[n], alone(decoder, requests[n])) for n in (0, 2))
    assert all(
        [t for r in responses if r.number == n and r.step for t in r.step.tokens]
        == list(done[n].token_ids)
        for n in (0, 2)
    )


def test_what_cannot_be_decoded_is_refused_and_disturbs_nobody() -> None:
    decoder = tiny.decoder("llama")
    for generator in generators(decoder).values():
        generator.add(request(1, 5))
        generator.step()
        with pytest.raises(InputError, match="token id 100"):
            generator.add(GenerationRequest([100], 5))
        (done,) = results(drained(generator)).values()
        assert same(done, alone(decoder, request(1, 5)))
    with pytest.raises(InputError, match="no tokens"):
        GenerationRequest([], 5)
    with pytest.raises(InputError, match="at least 1"):
        GenerationRequest([1], 0)
    with pytest.raises(InputError, match="empty text"):
        GenerationRequest([1], 1, stop=("a", ""))
    with pytest.raises(ValueError, match="need a tokenizer"):
        TextGenerator(decoder).add(GenerationRequest([1], 1, stop=("a",)))
    with pytest.raises(ValueError, match="one sequence at a time"):
        TextGenerator(decoder, proposer=SkipProposer(decoder, PLAN, 3, 0.0), batch_size=2)


def test_without_a_tokenizer_there_are_tokens_alone() -> None:
    decoder = tiny.decoder("llama")
    seen: list[int] = []

    def third(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    (result,) = TextGenerator(decoder).generate([request(1, 9, on_token=third)])
    assert (result.text, result.finish_reason, list(result.token_ids)) == ("", "stop", seen)
    seen.clear()
    (result,) = TextGenerator(decoder, Bytes()).generate([request(1, 9, on_token=third)])
    assert list(result.token_ids) == seen and len(seen) == 3 and result.text


def test_an_error_names_the_prompt_where_there_are_several() -> None:
    requests = [request(n, id=f"p{n}") for n in range(3)]
    error = LogitsError.at(4, 9, torch.float32)
    error.number = 1
    with (
        pytest.raises(LogitsError, match=r"^prompt p2: the logits"),
        name_failed_prompt(requests, 1),
    ):
        raise error
    with pytest.raises(LogitsError, match=r"^the logits"), name_failed_prompt(requests[:1]):
        raise error
