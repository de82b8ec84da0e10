"""Rows decoded together equal rows decoded alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.engine.rows import SkipRows

GREEDY = SamplingParams()


def request(
    length: int, tokens: int, sampling: SamplingParams = GREEDY, seed: int = 0
) -> GenerationRequest:
    return GenerationRequest(tiny.prompt(length, seed + length), tokens, sampling)


def outputs(
    family: str, requests: list[GenerationRequest], plan: SkipPlan, size: int | None = None
) -> list[list[int]]:
    batch = Batch(tiny.decoder(family), requests, size=size, plan=plan)
    batch.run()
    return batch.outputs


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "opt", "mixtral"])
@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 20)), min_size=1, max_size=6),
    size=st.integers(1, 4),
    layers=st.sets(st.integers(1, 3)),
    temperature=st.sampled_from([0.0, 0.9]),
)
def test_a_row_is_what_it_is_alone(
    family: str, rows: list[tuple[int, int]], size: int, layers: set[int], temperature: float
) -> None:
    plan = SkipPlan.of_layers(layers)
    requests = [
        request(length, tokens, SamplingParams(temperature=temperature, seed=i), i)
        for i, (length, tokens) in enumerate(rows)
    ]
    together = outputs(family, requests, plan, size)
    assert [len(row) for row in together] == [tokens for _, tokens in rows]
    assert together == [outputs(family, [each], plan)[0] for each in requests]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_nothing_left_out_it_is_vanilla(family: str) -> None:
    requests = [request(5, 12), request(17, 20), request(1, 9)]
    for row, each in zip(outputs(family, requests, FULL), requests, strict=True):
        alone = Generation(
            tiny.decoder(family), GenerationRequest(each.prompt, each.max_new_tokens)
        )
        list(alone)
        assert row == alone.output


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_chosen_by_the_settings_of_their_row(temperature: float) -> None:
    samplings = [
        SamplingParams(temperature=temperature, repetition_penalty=1.0, seed=1),
        SamplingParams(temperature=temperature, repetition_penalty=1.8, seed=2),
        SamplingParams(temperature=temperature, repetition_penalty=1.8, top_k=5, seed=3),
    ]
    requests = [GenerationRequest(tiny.prompt(40), 30, sampling) for sampling in samplings]
    together = outputs("llama", requests, FULL)
    for row, each in zip(together, requests, strict=True):
        alone = Generation(tiny.decoder("llama"), GenerationRequest(each.prompt, 30, each.sampling))
        list(alone)
        assert row == alone.output
    assert together[0] != together[1]


def test_the_prompt_is_read_by_the_whole_model_and_the_rest_by_what_is_left() -> None:
    decoder, plan, text = tiny.decoder("llama"), SkipPlan.of_layers([1, 3]), tiny.prompt(9)
    cache = decoder.new_cache(40)
    logits = decoder.prefill(torch.tensor([text]), cache)
    expected = [int(logits.argmax())]
    while len(expected) < 15:
        at = torch.tensor([[len(text) + len(expected) - 1]])
        logits = decoder.forward(torch.tensor([expected[-1:]]), at, cache, plan)
        expected.append(int(logits.argmax()))
    assert outputs("llama", [GenerationRequest(text, 15, GREEDY)], plan) == [expected]
    assert outputs("llama", [GenerationRequest(text, 15, GREEDY)], FULL) != [expected]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_in_bfloat16_too_a_row_is_what_it_is_alone(temperature: float) -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"](), dtype=torch.bfloat16))
    plan = SkipPlan.of([1], [1, 3])
    requests = [
        request(length, 20, SamplingParams(temperature=temperature, seed=i), i)
        for i, length in enumerate((1, 30, 12, 7, 19))
    ]
    together = Batch(decoder, requests, plan=plan)
    together.run()
    for row, each in zip(together.outputs, requests, strict=True):
        alone = Batch(decoder, [each], plan=plan)
        alone.run()
        assert alone.outputs == [row]


def test_where_all_rows_have_ended_there_is_no_further_step() -> None:
    batch = Batch(tiny.decoder("llama"), [request(5, 3), request(2, 1)])
    batch.run()
    assert (batch.finishes, list(map(len, batch.steps))) == (["length", "length"], [3, 1])
    outputs = batch.outputs
    assert batch.step() == list(batch) == []
    assert batch.outputs == outputs


def test_every_row_ends_for_itself() -> None:
    requests = [request(5, 20), request(8, 20)]
    plain = outputs("llama", requests, FULL)
    end = plain[0][3]
    batch = Batch(tiny.decoder("llama"), requests, end_tokens=frozenset({end}))
    batch.run()
    assert batch.outputs[0] == plain[0][: plain[0].index(end) + 1]
    assert batch.finishes[0] == "stop"
    assert len(batch.outputs[1]) == 20 or batch.outputs[1][-1] == end
    watched = GenerationRequest(requests[1].prompt, 20, GREEDY, on_token=lambda token: True)
    assert [len(row) for row in outputs("llama", [requests[0], watched], FULL)] == [20, 1]


def test_prompts_longer_than_a_chunk() -> None:
    import transformers as hf

    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "max_position_embeddings": 2048})
    decoder = Decoder(tiny.build(config))
    requests = [request(600, 6), request(20, 6)]
    batch = Batch(decoder, requests, plan=SkipPlan.of_layers([2]))
    batch.run()
    for row, each in zip(batch.outputs, requests, strict=True):
        alone = Batch(decoder, [each], plan=SkipPlan.of_layers([2]))
        alone.run()
        assert alone.outputs == [row]


def test_what_cannot_be_decoded_is_refused() -> None:
    decoder = tiny.decoder("llama")
    with pytest.raises(InputError, match="at least one prompt"):
        Batch(decoder, [])
    with pytest.raises(InputError, match="no tokens"):
        Batch(decoder, [GenerationRequest([], 5, GREEDY)])
    with pytest.raises(InputError, match="token id 100"):
        Batch(decoder, [GenerationRequest([100], 5, GREEDY)])
    with pytest.raises(InputError, match="at least 1"):
        Batch(decoder, [GenerationRequest([1], 0, GREEDY)])
    with pytest.raises(InputError, match="never"):
        Batch(decoder, [request(3, 5)], plan=SkipPlan.of_layers([0]))
    with pytest.raises(ValueError, match="batch size 0"):
        Batch(decoder, [request(3, 5)], size=0)
    plan = SkipPlan.of_layers([2])
    with pytest.raises(ValueError, match="left out for good"):
        Batch(decoder, [request(3, 5)], proposer=SkipRows(decoder, plan, 2), plan=plan)
