"""The loop: its budget, where it ends, what its steps say, stopping and going on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, Proposer, SkipProposer
from tests import tiny

PROMPT = tiny.prompt(8, 3)
PLAN = SkipPlan.of_layers([2])


def generation(
    count: int = 20,
    *,
    sampling: SamplingParams | None = None,
    proposer: Proposer | None = None,
    end_tokens: frozenset[int] = frozenset(),
) -> Generation:
    return Generation(
        tiny.decoder("llama"),
        GenerationRequest(PROMPT, count, sampling or SamplingParams()),
        proposer=proposer,
        end_tokens=end_tokens,
    )


def finished(one: Generation) -> list[int]:
    tiny.steps_of(one)
    return one.output


def oracle(size: int) -> tiny.Scripted:
    """Always right, ``size`` tokens at once."""
    text = finished(generation(40))
    return tiny.Scripted(lambda tokens: text[len(tokens) - len(PROMPT) :][:size])


def skip(size: int = 4) -> SkipProposer:
    return SkipProposer(tiny.decoder("llama"), PLAN, size, 0.0)


@settings(max_examples=25)
@given(
    count=st.integers(1, 20),
    size=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    right=st.booleans(),
)
def test_budget_and_bookkeeping(count: int, size: int, temperature: float, right: bool) -> None:
    proposer = oracle(size) if right else skip(size)
    one = generation(count, sampling=SamplingParams(temperature), proposer=proposer)
    steps = tiny.steps_of(one)
    assert len(one.output) == count
    assert [token for step in steps for token in step.tokens] == one.output
    assert one.tokens == PROMPT + one.output
    assert one.finish == "length"
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["length"]
    assert (steps[0].proposer, steps[0].drafted, len(steps[0].tokens)) == ("prefill", 0, 1)
    for step in steps[1:]:
        assert 0 <= step.accepted <= step.drafted <= size
        assert len(step.tokens) == step.accepted + 1
        assert step.proposer == (proposer.name if step.drafted else "none")
        assert step.seconds == step.draft_seconds + step.verify_seconds


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", [0, 1, 3, 8])
def test_an_end_token_cuts_what_follows(at: int, size: int) -> None:
    """Wherever it falls: behind the prompt, inside an accepted draft, or as the model's choice."""
    text = finished(generation(20))
    end = text[at]
    expected = text[: text.index(end) + 1]
    one = generation(20, proposer=oracle(size) if size else None, end_tokens=frozenset((end, 999)))
    steps = tiny.steps_of(one)
    assert one.output == expected
    assert one.finish == steps[-1].finish == "stop"
    for step in steps[1:]:
        assert step.accepted <= min(step.drafted, len(step.tokens))
    assert sum(len(step.tokens) for step in steps) == len(expected)


def test_an_end_token_inside_a_draft_cuts_the_draft() -> None:
    text = finished(generation(20))
    assert text[3] not in text[:3]
    one = generation(20, proposer=oracle(8), end_tokens=frozenset([text[3]]))
    last = tiny.steps_of(one)[-1]
    assert last.tokens == tuple(text[1:4])
    assert (last.drafted, last.accepted) == (8, 3)


def test_an_end_token_at_the_end_of_the_budget_is_a_stop() -> None:
    text = finished(generation(6))
    one = generation(6, end_tokens=frozenset([text[5]]))
    assert text[5] not in text[:5]
    assert finished(one) == text
    assert one.finish == "stop"


@pytest.mark.parametrize("stop_at", [1, 2, 5, 20])
@pytest.mark.parametrize("size", [0, 3, 8])
def test_watch_sees_every_token_and_ends_the_output(stop_at: int, size: int) -> None:
    text = finished(generation(20))
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) == stop_at

    one = Generation(
        tiny.decoder("llama"),
        GenerationRequest(PROMPT, 20, on_token=watch),
        proposer=oracle(size) if size else None,
    )
    assert finished(one) == seen == text[:stop_at]
    assert one.finish == "stop"


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stopping_early_and_going_on(steps: int, temperature: float) -> None:
    """Whoever stops consuming, by break or by closing the iterator, can go on where it ended."""
    sampling = SamplingParams(temperature, repetition_penalty=1.2, seed=5)
    expected = finished(generation(24, sampling=sampling, proposer=skip()))
    one = generation(24, sampling=sampling, proposer=skip())
    for count, _ in enumerate(one, 1):
        if count == steps:
            break
    part = list(one.output)
    assert 0 < len(part) < 24
    while one.finish is None:
        one.step()
    assert one.output == expected
    assert one.output[: len(part)] == part


def test_the_drafter_may_be_exchanged_between_steps() -> None:
    expected = finished(generation(24))
    one = generation(24)
    choices: list[Proposer | None] = [None, skip(), oracle(3), tiny.Scripted(lambda _: [])]
    for count, _ in enumerate(one):
        one.proposer = choices[count % 4]
    assert one.output == expected


def test_drafts_end_with_the_budget() -> None:
    """No token is drafted that could not be kept: one place is the full model's own."""
    limits: list[int] = []

    class Greedy(tiny.Scripted):
        def propose(self, context: Context, limit: int) -> Draft:
            limits.append(limit)
            return super().propose(context, limit)

    text = finished(generation(40))
    right = Greedy(lambda tokens: text[len(tokens) - len(PROMPT) :][:4])
    assert finished(generation(8, proposer=right)) == text[:8]
    assert limits == [6, 1]


@pytest.mark.parametrize(
    ("prompt", "count", "reason"),
    [
        ([], 5, "no tokens"),
        ([1], 0, "max_new_tokens 0"),
        ([1], -3, "max_new_tokens -3"),
        ([1, 100], 5, "token id 100.*vocabulary ends at 99"),
        ([5, -1], 5, "token id -1"),
    ],
)
def test_input_errors(prompt: list[int], count: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Generation(tiny.decoder("llama"), GenerationRequest(prompt, count))
