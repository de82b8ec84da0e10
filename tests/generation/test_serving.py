"""What a server asks of batches: prompts in chunks, shared beginnings, log-probabilities,
adjusted logits, predicted texts. Each text is the one that it would be alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SuppressTokensLogitsProcessor

from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prefix_store import MIN_TOKENS, PrefixStore
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import LogitAdjustments, SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny
from tests.engine.rows import SkipRows


def alone(request: GenerationRequest) -> list[int]:
    generation = Generation(tiny.decoder("llama"), request)
    list(generation)
    return generation.output


def batch(**more: Any) -> Batch:
    return Batch(tiny.decoder("llama"), **{"size": 3, "chunk": 4, "reserve": 200, **more})


def ngrams(decoder: Any) -> MixedProposer:
    verify = {width: 1.0 + 0.01 * (width - 1) for width in (1, 2, 64)}
    passes = PassCosts(verify, 0.1, 0.0, 0.0, 64)
    return MixedProposer(decoder, None, CostTable({1: passes, 2: passes}, tiny.DEPTH))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_chunks_and_drafts_between_them_change_no_text(family: str) -> None:
    decoder = tiny.decoder(family)
    requests = [
        GenerationRequest(tiny.prompt(length, length), tokens, SamplingParams(temperature, seed=3))
        for length, tokens, temperature in ((30, 12, 0.0), (3, 40, 0.9), (50, 5, 0.0), (17, 9, 0.7))
    ]
    proposer = SkipRows(decoder, SkipPlan.of_layers([2]), 3)
    chunked = Batch(decoder, size=2, chunk=7, reserve=128, proposer=proposer)
    for request in requests[:2]:
        chunked.add(request)
    for _ in range(3):
        chunked.step()
    for request in requests[2:]:
        chunked.add(request)
    chunked.run()

    for request, output in zip(requests, chunked.outputs, strict=True):
        generation = Generation(decoder, request)
        list(generation)
        assert output == generation.output


def test_a_step_of_the_others_lies_between_two_chunks() -> None:
    running = batch()
    running.add(GenerationRequest(tiny.prompt(4), 60))
    running.step()
    running.add(GenerationRequest(tiny.prompt(41), 3))
    kinds = []
    while not running.outputs[1]:
        kinds.append(bool(running.step()))

    # the chunks but the last one decide nothing
    assert kinds.count(False) == 10
    assert all(one or other for one, other in pairwise(kinds))


def test_a_prompt_that_is_being_read_can_be_cancelled() -> None:
    running = batch()
    first = running.add(GenerationRequest(tiny.prompt(4), 30))
    running.step()
    second = running.add(GenerationRequest(tiny.prompt(60), 3))
    for _ in range(4):
        running.step()
    running.cancel(second)
    third = running.add(GenerationRequest(tiny.prompt(9), 5))
    running.run()

    assert running.outputs[second] == []
    assert running.outputs[first] == alone(GenerationRequest(tiny.prompt(4), 30))
    assert running.outputs[third] == alone(GenerationRequest(tiny.prompt(9), 5))


def test_shared_beginnings_are_read_once_and_change_no_text() -> None:
    decoder = tiny.decoder("llama")
    start = tiny.prompt(40)
    store = PrefixStore(decoder, 4 << 20)
    running = batch(prefixes=store)
    requests = [
        GenerationRequest([*start, *tiny.prompt(more, more)], 6, owner=owner)
        for more, owner in ((5, "a"), (9, "a"), (7, "b"), (1, "a"))
    ]
    numbers = []
    for request in requests:
        numbers.append(running.add(request))
    running.run()
    later = running.add(requests[1])
    running.run()
    cached = [running.pop(number) for number in (*numbers, later)]

    assert [each.output for each in cached if each] == [
        alone(request) for request in (*requests, requests[1])
    ]
    assert [each.num_cached for each in cached if each] == [0, 40, 0, 40, 48]


def test_stored_texts_are_bounded_and_belong_to_their_owners() -> None:
    decoder = tiny.decoder("llama")
    slot = decoder.kv_bytes_per_slot
    store = PrefixStore(decoder, 3 * 512 * slot)  # a cache has 512 slots at least
    cache = decoder.new_cache(64)
    decoder.prefill(torch.tensor([tiny.prompt(64)]), cache)
    texts = [tiny.prompt(30, seed) for seed in range(5)]

    for text in texts[:3]:
        store.add("a", text, cache)
    assert store.find("b", tuple(texts[0])) == (None, 0)
    assert store.find("a", (*texts[0], 1))[1] == 30
    store.add("a", texts[3], cache)
    assert store.bytes <= 3 * 512 * slot
    assert [store.find("a", tuple(text))[1] for text in texts] == [30, 0, 30, 30, 0]
    store.add("a", [*texts[3], 1, 2], cache)  # in place of the one that it begins with
    assert len(store) == 3
    store.add("a", texts[3][: MIN_TOKENS - 1], cache)
    assert len(store) == 3
    found, length = store.find("a", (*texts[3], 1, 2, 3))
    assert found is not None and length == 32
    np.testing.assert_array_equal(
        found.layers[0].keys[0, :, :32].numpy(), cache.layers[0].keys[0, :, :32].numpy()
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_adjusted_logits_are_those_of_openais_formula(temperature: float) -> None:
    prompt = tiny.prompt(8)
    given = LogitAdjustments(0.7, 0.4, ((3, -100.0), (5, 1.5)))
    sampling = SamplingParams(temperature, seed=1)
    decoder = tiny.decoder("llama")
    request = GenerationRequest(prompt, 30, sampling, adjustments=given)
    plain = alone(GenerationRequest(prompt, 30, sampling))

    output = alone(request)

    drafted = Generation(decoder, request, proposer=SkipProposer(decoder, SkipPlan.of_layers([2])))
    list(drafted)
    together = batch()
    together.add(GenerationRequest(tiny.prompt(5), 20))
    number = together.add(request)
    together.run()
    assert output == drafted.output == together.outputs[number]
    assert output != plain and 3 not in output
    if not temperature:
        logits = decoder.model(torch.tensor([[*prompt, *output]])).logits[0].float()
        for i, token in enumerate(output):
            row = logits[len(prompt) - 1 + i].clone()
            for seen in range(len(row)):
                count = output[:i].count(seen)
                row[seen] -= 0.4 * count + 0.7 * (count > 0)
            row[3] -= 100
            row[5] += 1.5
            assert int(row.argmax()) == token


@pytest.mark.parametrize(
    "wrong",
    [{"presence_penalty": 2.1}, {"logit_bias": ((1, 101.0),)}, {"logit_bias": ((-1, 1.0),)}],
)
def test_adjustments_have_their_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        LogitAdjustments(**wrong)


def test_log_probabilities_come_with_drafted_tokens_too() -> None:
    decoder, prompt = tiny.decoder("llama"), tiny.prompt(8)
    request = GenerationRequest(prompt, 20, logprobs=2)
    drafted = Generation(decoder, request, proposer=SkipProposer(decoder, SkipPlan.of_layers([2])))
    steps = list(drafted)
    running = batch()
    number = running.add(request)
    running.add(GenerationRequest(prompt, 20))
    running.run()

    found = [each for step in steps for each in step.logprobs]
    together = [each for step in running.steps[number] for each in step.logprobs]
    assert [each.token for each in found] == drafted.output == alone(request)
    assert any(step.accepted for step in steps)
    logits = decoder.model(torch.tensor([[*prompt, *drafted.output]])).logits[0]
    expected = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 :]
    for i, each in enumerate(found):
        assert each.logprob == pytest.approx(float(expected[i, each.token]), abs=1e-4)
        assert [token for token, _ in each.top] == expected[i].topk(2).indices.tolist()
        assert together[i].token == each.token
        assert together[i].logprob == pytest.approx(each.logprob, abs=1e-4)
    assert all(not step.logprobs for step in running.steps[1])


@pytest.mark.parametrize("several", [False, True])
def test_a_predicted_text_is_drafted_and_its_changes_are_not_taken(several: bool) -> None:
    decoder, prompt = tiny.decoder("llama"), tiny.prompt(12)
    output = alone(GenerationRequest(prompt, 80))
    predicted = [*output[:30], 1, *output[31:50], *output[53:]]
    request = GenerationRequest(prompt, 80, prediction=tuple(predicted))

    def steps(request: GenerationRequest) -> int:
        if several:
            running = Batch(decoder, [request], size=2, proposer=ngrams(decoder))
            running.run()
            assert running.outputs == [output]
            return len(running.steps[0])
        generation = Generation(decoder, request, proposer=ngrams(decoder))
        made = list(generation)
        assert generation.output == output
        return len(made)

    assert steps(request) <= 25 < steps(GenerationRequest(prompt, 80))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_adjusted_logits_under_processors(temperature: float) -> None:
    """A token that is pushed away by what is added to the logits, and one that a processor bars."""
    plain = GenerationRequest(tiny.prompt(5), 12, SamplingParams(temperature, seed=3))
    first, barred = alone(plain)[0], alone(plain)[1]
    requests = [
        GenerationRequest(
            tiny.prompt(5),
            12,
            SamplingParams(temperature, seed=3),
            processors=(SuppressTokensLogitsProcessor([barred]),),
            adjustments=LogitAdjustments(frequency_penalty=1.5, logit_bias=((first, -100.0),)),
        ),
        plain,
    ]
    decoded = batch(proposer=SkipRows(tiny.decoder("llama"), SkipPlan.of_layers([2]), 3))
    for request in requests:
        decoded.add(request)
    decoded.run()
    assert decoded.outputs == [alone(request) for request in requests]
    assert not {first, barred} & set(decoded.outputs[0])
