"""Drafts in a batch change nothing: every text is the one that vanilla decoding gives alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.kernels.kv_cache import KV_BLOCK
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Context, Draft
from tests import tiny
from tests.engine.rows import Guesses, SkipRows
from tests.engine.test_bfloat16 import VOCABULARY
from tests.engine.test_bfloat16 import decoder as half
from tests.engine.test_lossless import SAMPLINGS

GREEDY = SamplingParams()
FAMILIES = st.sampled_from(["llama", "mistral", "gemma2"])
ROWS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 16)), min_size=1, max_size=7)


def alone(model: Decoder, request: GenerationRequest, more: int = 0) -> list[int]:
    one = Generation(
        model, GenerationRequest(request.prompt, request.max_new_tokens + more, request.sampling)
    )
    tiny.steps_of(one)
    return one.output


def requests_of(
    rows: list[tuple[int, int]], sampling: SamplingParams = GREEDY
) -> list[GenerationRequest]:
    """Prompts of these lengths, each other than the rest from its first token on."""
    return [
        GenerationRequest([i, *tiny.prompt(length, 50 * i + length)], budget, sampling)
        for i, (length, budget) in enumerate(rows)
    ]


@dataclass(frozen=True)
class Ahead:
    """Drafts so many of the tokens that it knows to come, for each (prompt, what follows)."""

    texts: list[tuple[Sequence[int], list[int]]]
    size: int
    name: str = "ahead"

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        drafts = []
        for context, limit in zip(contexts, limits, strict=True):
            begun = ((p, text) for p, text in self.texts if context.tokens[: len(p)] == list(p))
            prompt, text = next(begun)
            at = len(context.tokens) - len(prompt)
            drafts.append(Draft(tuple(text[at : at + min(self.size, limit)])))
        return drafts


def guessing(
    model: Decoder, requests: list[GenerationRequest], seed: int = 0, check: bool = False
) -> Guesses:
    texts = [[*request.prompt, *alone(model, request, more=6)] for request in requests]
    return Guesses(texts, [request.prompt for request in requests], model, seed, check=check)


@settings(max_examples=30)
@given(
    family=FAMILIES,
    rows=ROWS,
    size=st.integers(1, 5),
    sampling=SAMPLINGS,
    seed=st.integers(0, 1000),
)
def test_drafts_right_and_wrong_of_any_length(
    family: str, rows: list[tuple[int, int]], size: int, sampling: SamplingParams, seed: int
) -> None:
    model = tiny.decoder(family)
    requests = requests_of(rows, sampling)
    proposer = guessing(model, requests, seed)
    batch = Batch(model, requests, size=size, proposer=proposer)
    batch.run()
    for output, request, text in zip(batch.outputs, requests, proposer.texts, strict=True):
        begin = len(request.prompt)
        assert output == text[begin : begin + request.max_new_tokens]
    assert batch.finishes == ["length"] * len(requests)
    assert all(len(lengths) <= size for lengths, _ in proposer.seen)


@settings(max_examples=10)
@given(family=FAMILIES, rows=ROWS, size=st.integers(1, 4), seed=st.integers(0, 1000))
def test_the_cache_before_every_draft_is_that_of_a_fresh_pass(
    family: str, rows: list[tuple[int, int]], size: int, seed: int
) -> None:
    model = tiny.decoder(family)
    requests = requests_of(rows)
    batch = Batch(model, requests, size=size, proposer=guessing(model, requests, seed, check=True))
    batch.run()
    assert [len(output) for output in batch.outputs] == [budget for _, budget in rows]


@settings(max_examples=25)
@given(
    family=FAMILIES,
    layers=st.sets(st.integers(1, 3), min_size=1),
    rows=ROWS,
    size=st.integers(1, 5),
    drafts=st.integers(1, 5),
    sampling=SAMPLINGS,
)
def test_drafts_by_the_skipped_model(
    family: str,
    layers: set[int],
    rows: list[tuple[int, int]],
    size: int,
    drafts: int,
    sampling: SamplingParams,
) -> None:
    """They write to the cache that the rows share, behind the texts."""
    model = tiny.decoder(family)
    requests = requests_of(rows, sampling)
    proposer = SkipRows(model, SkipPlan.of_layers(layers), drafts)
    batch = Batch(model, requests, size=size, proposer=proposer)
    batch.run()
    assert batch.outputs == [alone(model, request) for request in requests]


def test_steps_are_told_of_the_right_request_and_add_up() -> None:
    model = tiny.decoder("llama")
    requests = requests_of([(5, 12), (9, 1), (2, 20), (14, 7), (1, 9)])
    batch = Batch(model, requests, size=2, proposer=guessing(model, requests))
    told: list[list[Step]] = [[] for _ in requests]
    for number, step in batch:
        told[number].append(step)
    assert told == batch.steps
    for steps, request in zip(told, requests, strict=True):
        tokens = [token for step in steps for token in step.tokens]
        assert tokens == alone(model, request)
        assert (steps[0].proposer, steps[0].drafted, len(steps[0].tokens)) == ("prefill", 0, 1)
        assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["length"]
        for step in steps[1:]:
            assert len(step.tokens) == step.accepted + 1
            assert 0 <= step.accepted <= step.drafted
            assert step.leaves == 0
            assert step.proposer == ("guesses" if step.drafted else "none")
    every = [step for steps in told for step in steps]
    assert 0 < sum(step.accepted for step in every) < sum(step.drafted for step in every)
    assert any(step.drafted == 0 for step in every if step.proposer != "prefill")


def test_rows_are_filled_from_the_queue_and_fall_away() -> None:
    """Request 1 ends with its prompt, 0 soon; behind them 2 and 3 are begun, in that order."""
    model = tiny.decoder("llama")
    requests = requests_of([(5, 3), (9, 1), (2, 9), (14, 6)])
    batch = Batch(model, requests, size=2)
    assert batch.finishes == [None] * 4
    decided = [[number for number, _ in batch.step()] for _ in range(14)]
    assert decided == [
        *([0], [1], [2]),  # prompts, as long as a row is free
        *([0, 2], [0, 2]),
        [3],
        *([2, 3], [2, 3], [2, 3], [2, 3], [2, 3]),
        [2],
        *([], []),
    ]
    assert batch.finishes == ["length"] * 4
    assert batch.cache.batch == 2
    assert batch.outputs == [alone(model, request) for request in requests]


def test_limits_leave_a_place_for_the_models_own_token() -> None:
    model = tiny.decoder("llama")
    requests = requests_of([(5, 12), (9, 2), (2, 20), (14, 7)])
    guesses = guessing(model, requests)
    by_length = {len(r.prompt): r.max_new_tokens for r in requests}

    class Counting(Guesses):
        def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
            for context, limit in zip(contexts, limits, strict=True):
                prompt = next(p for p in self.prompts if context.tokens[: len(p)] == list(p))
                produced = len(context.tokens) - len(prompt)
                assert limit == by_length[len(prompt)] - produced - 1
            return super().propose_batch(contexts, limits)

    counting = Counting(guesses.texts, guesses.prompts, model)
    Batch(model, requests, proposer=counting).run()
    assert any(0 in limits and any(limits) for _, limits in counting.seen)
    assert all(any(limits) for _, limits in counting.seen)  # nobody is asked for nothing


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_an_end_token_and_a_watch_end_their_own_row(at: int) -> None:
    model = tiny.decoder("llama")
    requests = requests_of([(5, 20), (9, 20), (2, 20)])
    plain = [alone(model, request) for request in requests]
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    requests[1] = GenerationRequest(requests[1].prompt, 20, GREEDY, on_token=watch)
    end = plain[0][at]
    batch = Batch(
        *(model, requests),
        size=2,
        proposer=guessing(model, requests),
        end_tokens=frozenset([end]),
    )
    batch.run()
    cut = [text[: text.index(end) + 1] if end in text else text for text in plain]
    cut[1] = cut[1][:3]
    assert batch.outputs == cut
    assert seen == cut[1]
    assert batch.finishes[:2] == ["stop", "stop"]
    assert batch.finishes[2] == ("stop" if end in plain[2] else "length")


def test_an_end_token_inside_a_draft_cuts_the_draft() -> None:
    model, requests = tiny.decoder("llama"), requests_of([(5, 20), (9, 20)])
    one, other = (alone(model, request) for request in requests)
    at = next(i for i in range(2, 8) if one[i] not in (*one[:i], *other[:10]))
    proposer = Ahead([(requests[0].prompt, one), (requests[1].prompt, other)], 8)
    batch = Batch(model, requests, proposer=proposer, end_tokens=frozenset([one[at]]))
    decided = [batch.step() for _ in range(3)][-1]
    assert [step.tokens for _, step in decided] == [tuple(one[1 : at + 1]), tuple(other[1:10])]
    assert [(step.drafted, step.accepted) for _, step in decided] == [(8, at), (8, 8)]
    assert [step.finish for _, step in decided] == ["stop", None]


def test_a_full_row_beside_one_with_a_longer_draft() -> None:
    """What fills up the shorter row must not reach beyond the cache."""
    model = half("grouped")
    requests = half_requests([(KV_BLOCK - 13, 12), (20, 100)], 3)
    texts = [alone(model, request) for request in requests]
    proposer = Ahead([(requests[0].prompt, []), (requests[1].prompt, texts[1])], 6)
    batch = Batch(model, requests, proposer=proposer)
    batch.run()
    assert batch.cache.capacity == KV_BLOCK
    assert batch.outputs == texts
    assert [step.drafted for step in batch.steps[0]] == [0] * 12
    assert [step.accepted for step in batch.steps[1][1:12]] == [6] * 11  # all the while


def test_an_interruption_leaves_what_is_finished() -> None:
    model = tiny.decoder("llama")
    requests = requests_of([(5, 4), (9, 20), (2, 6)])
    plain = [alone(model, request) for request in requests]
    seen: list[int] = []

    def interrupted(token: int) -> bool:
        seen.append(token)
        if len(seen) == 15:
            raise KeyboardInterrupt
        return False

    requests[1] = GenerationRequest(requests[1].prompt, 20, GREEDY, on_token=interrupted)
    batch = Batch(model, requests, size=2, proposer=guessing(model, requests))
    with pytest.raises(KeyboardInterrupt):
        batch.run()
    assert batch.finishes == ["length", None, "length"]
    assert [batch.outputs[0], batch.outputs[2]] == [plain[0], plain[2]]


@settings(max_examples=10)
@given(rows=ROWS, size=st.integers(1, 4), temperature=st.sampled_from([0.5, 1.0]))
def test_sampled_texts_depend_on_seed_and_prompt_alone(
    rows: list[tuple[int, int]], size: int, temperature: float
) -> None:
    """Not on their place in the file, nor on their neighbours."""
    model = tiny.decoder("llama")
    requests = [
        GenerationRequest(
            request.prompt, request.max_new_tokens, SamplingParams(temperature, seed=i)
        )
        for i, request in enumerate(requests_of(rows))
    ]
    batch = Batch(model, requests, size=size)
    batch.run()
    assert batch.outputs == [alone(model, request) for request in requests]
    again = Batch(model, requests[::-1], size=size)
    again.run()
    assert again.outputs == batch.outputs[::-1]


def test_answers_to_one_prompt_differ() -> None:
    model, sampling = tiny.decoder("llama"), SamplingParams(1.0, seed=4)
    requests = [GenerationRequest(tiny.prompt(5), 20, sampling, answer=i) for i in (0, 1, 0, 2)]
    batch = Batch(model, requests)
    batch.run()
    first, second, same, third = batch.outputs
    assert first == same and len({tuple(first), tuple(second), tuple(third)}) == 3


def half_requests(
    rows: list[tuple[int, int]], seed: int, sampling: SamplingParams = GREEDY
) -> list[GenerationRequest]:
    return [
        GenerationRequest([i, *tiny.prompt(length, seed + i, VOCABULARY)], budget, sampling)
        for i, (length, budget) in enumerate(rows)
    ]


@settings(max_examples=12)
@given(
    shape=st.sampled_from(["grouped", "ungrouped"]),
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6),
    size=st.integers(1, 5),
    drafts=st.integers(0, 5),
    sampling=SAMPLINGS,
    seed=st.integers(0, 1000),
)
def test_in_bfloat16_too(
    shape: str,
    rows: list[tuple[int, int]],
    size: int,
    drafts: int,
    sampling: SamplingParams,
    seed: int,
) -> None:
    model, requests = half(shape), half_requests(rows, seed, sampling)
    proposer: BatchProposer | None = None
    if drafts:
        proposer = SkipRows(model, SkipPlan.of_layers([2]), drafts)
    batch = Batch(model, requests, size=size, proposer=proposer)
    batch.run()
    assert batch.outputs == [alone(model, request) for request in requests]


@pytest.mark.parametrize("shape", ["grouped", "ungrouped"])
def test_in_bfloat16_beside_a_longer_text(shape: str) -> None:
    """Which makes the other rows' keys be read in longer extents, and crosses a border itself."""
    model = half(shape)
    rows = [(12, 60), (KV_BLOCK - 20, 60), (33, 60), (KV_BLOCK + 40, 20), (2, 60)]
    requests = half_requests(rows, 5)
    for proposer in (None, SkipRows(model, SkipPlan.of_layers([2]), 4)):
        batch = Batch(model, requests, size=3, proposer=proposer)
        batch.run()
        assert batch.outputs == [alone(model, request) for request in requests]


@functools.cache
def filled(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(a text, its logits' bits token by token behind 20 tokens, when decoded alone)."""
    model = half(shape)
    text = torch.tensor([tiny.prompt(30, 3, VOCABULARY)])
    cache = model.new_cache(30)
    model.prefill(text[:, :20], cache)
    logits = [
        model.forward(text[:, at : at + 1], torch.tensor([[at]]), cache) for at in range(20, 30)
    ]
    return text, torch.cat(logits, dim=1)[0]


@settings(max_examples=15)
@given(
    shape=st.sampled_from(["grouped", "ungrouped"]),
    others=st.lists(st.integers(1, 600), min_size=1, max_size=4),
    place=st.integers(0, 4),
    width=st.integers(1, 6),
    real=st.integers(1, 6),
)
def test_a_rows_bits_do_not_depend_on_the_others(
    shape: str, others: list[int], place: int, width: int, real: int
) -> None:
    """Nor on its place, on how many columns repeat its last token, on the extent."""
    model, (text, expected) = half(shape), filled(shape)
    place, real = place % (len(others) + 1), min(real, width)
    lengths = [*others[:place], 20, *others[place:]]
    cache = model.new_cache(max(lengths) + width, batch=len(lengths))
    tokens, positions = [], []
    for row, length in enumerate(lengths):
        own = text if row == place else torch.tensor([tiny.prompt(length + 6, row, VOCABULARY)])
        model.prefill(own[:, :length], cache.view(row, row + 1))
        columns = [length + min(i, real - 1) for i in range(width)]
        tokens.append(own[0, columns])
        positions.append(torch.tensor(columns))
    logits = model.forward(torch.stack(tokens), torch.stack(positions), cache)
    assert torch.equal(logits[place, :real], expected[:real])
