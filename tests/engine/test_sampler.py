"""The sampler's transforms against transformers' own; the settings' ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.errors import InputError
from conflayers_cli.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCABULARY = 40


def theirs(
    setting: SamplingParams, logits: torch.Tensor, seen: list[int], *, greedy: bool = False
) -> torch.Tensor:
    """The distribution (or scores) transformers would have, in the order ``generate`` applies."""
    chain = LogitsProcessorList()
    if setting.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(setting.repetition_penalty))
    if not greedy:
        chain.append(TemperatureLogitsWarper(float(setting.temperature)))
        if setting.top_k is not None:
            chain.append(TopKLogitsWarper(setting.top_k))
        if setting.top_p is not None:
            chain.append(TopPLogitsWarper(setting.top_p))
        if setting.min_p is not None:
            chain.append(MinPLogitsWarper(setting.min_p))
    ids = torch.tensor([seen], dtype=torch.long).expand(logits.shape[0], -1)
    scores: torch.Tensor = chain(ids, logits.clone())
    return scores if greedy else torch.softmax(scores, dim=-1)


def random_logits(seed: int, rows: int = 3, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * 3


def sampler(setting: SamplingParams, seen: list[int] | None = None) -> Sampler:
    one = Sampler(setting, VOCABULARY, CPU)
    one.mark_seen(seen or [])
    return one


@settings(max_examples=150)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 2 * VOCABULARY),
    top_p=st.none() | st.floats(0.02, 1),
    min_p=st.none() | st.floats(0, 1),
    penalty=st.sampled_from([1.0]) | st.floats(0.5, 2),
    seen=st.lists(st.integers(0, VOCABULARY - 1), min_size=1),
    seed=st.integers(0, 10_000),
)
def test_the_distribution_is_transformers(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    seen: list[int],
    seed: int,
) -> None:
    setting = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    logits = random_logits(seed)
    got = sampler(setting, seen).distribution(logits)
    torch.testing.assert_close(got, theirs(setting, logits, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        SamplingParams(0.7),
        SamplingParams(1.0, top_k=5),
        SamplingParams(1.0, top_p=0.8),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(1.0, repetition_penalty=1.3),
    ],
    ids=lambda s: ", ".join(
        f"{k}={v}" for k, v in vars(s).items() if v != vars(SamplingParams())[k]
    ),
)
def test_every_transform_alone(setting: SamplingParams) -> None:
    logits, seen = random_logits(1), [3, 3, 17]
    got = sampler(setting, seen).distribution(logits)
    torch.testing.assert_close(got, theirs(setting, logits, seen), rtol=1e-5, atol=1e-6)
    assert (got - torch.softmax(logits, -1)).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(got.sum(-1), torch.ones(3))


def test_half_precision_logits_are_taken_in_float32() -> None:
    logits = random_logits(2).bfloat16()
    setting = SamplingParams(0.7, top_p=0.9, repetition_penalty=1.2)
    got = sampler(setting, [1, 2]).distribution(logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, theirs(setting, logits.float(), [1, 2]), rtol=1e-4, atol=1e-6)


def test_tokens_tied_at_the_top_k_border_all_stay() -> None:
    """As in transformers: no token is preferred for its place."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    got = Sampler(SamplingParams(1.0, top_k=2), 5, CPU).distribution(logits)
    assert (got > 0).tolist() == [[True, True, True, True, False]]


def test_top_p_among_ties_keeps_as_few_as_needed() -> None:
    got = Sampler(SamplingParams(1.0, top_p=0.45), 5, CPU).distribution(torch.zeros(1, 5))
    assert int((got > 0).sum()) == 3


def test_top_p_ends_where_the_sum_is_reached_exactly() -> None:
    """As in transformers: a half is reached by two tokens of a quarter each, no third is needed."""
    setting, logits = SamplingParams(1.0, top_p=0.5), torch.zeros(1, 4)
    got = Sampler(setting, 4, CPU).distribution(logits)
    assert int((got > 0).sum()) == int((theirs(setting, logits, [0]) > 0).sum()) == 2


@pytest.mark.parametrize(
    "setting", [SamplingParams(), SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-6)]
)
def test_one_choice_left_is_the_best_token(setting: SamplingParams) -> None:
    logits = random_logits(3, rows=1)
    for penalty in (1.0, 1.5):
        best = theirs(SamplingParams(repetition_penalty=penalty), logits, [7], greedy=True).argmax()
        chosen = sampler(
            SamplingParams(setting.temperature, setting.top_k, setting.top_p, None, penalty), [7]
        ).choose(logits)
        assert chosen == int(best)


@given(
    seen=st.lists(st.integers(0, VOCABULARY - 1)),
    drafted=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    seed=st.integers(0, 1000),
)
def test_rows_are_penalised_for_the_drafts_before_them(
    seen: list[int], drafted: list[int], seed: int
) -> None:
    """Row i has seen the text and i drafts: the same as one row at a time, each with its text."""
    setting = SamplingParams(1.0, repetition_penalty=1.4)
    logits = random_logits(seed, rows=len(drafted) + 1)
    one = sampler(setting, seen)
    together = one.distribution(logits, drafted)
    for i in range(len(drafted) + 1):
        alone = sampler(setting, [*seen, *drafted[:i]]).distribution(logits[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    # assumed tokens leave no trace
    torch.testing.assert_close(
        one.distribution(logits), sampler(setting, seen).distribution(logits)
    )


def test_a_seed_settles_everything() -> None:
    def draws(seed: int) -> list[int]:
        one = sampler(SamplingParams(1.0, seed=seed))
        return [one.choose(torch.zeros(1, VOCABULARY)) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0: allowed is 1 or more"),
        ({"top_k": -5}, "top_k -5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": 1.1}, "min_p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty inf"),
    ],
)
def test_values_outside_their_range(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        SamplingParams(**values)


def test_values_at_the_ends_of_their_range() -> None:
    assert SamplingParams(0, 1, 1.0, 0.0, 0.1).greedy
    assert not SamplingParams(0.01, 1, 1e-9, 1.0, 10.0).greedy
