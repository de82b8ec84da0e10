"""The sampler's races against transformers' distributions; the settings' ranges."""

from __future__ import annotations

import math
from dataclasses import replace
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

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.noise import ExponentialNoise, stream_key
from conflayers_cli.engine.race import dense_winners
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
    one = Sampler(replace(setting, seed=setting.seed or 0), VOCABULARY, CPU)
    one.mark_seen(seen or [])
    return one


def raced(setting: SamplingParams, law: torch.Tensor, position: int) -> int:
    """The winner of p / E, by transformers' p and all exponentials."""
    noise = ExponentialNoise(stream_key(setting.seed or 0, ()), law.numel())
    log_exponentials = noise.dense([position], CPU)[0, : law.numel()]
    return int((law.double().log() - log_exponentials).argmax())


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 2 * VOCABULARY),
    top_p=st.none() | st.floats(0.02, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0]) | st.floats(0.5, 2),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=300)
@given(
    setting=SETTINGS,
    seen=st.lists(st.integers(0, VOCABULARY - 1), min_size=1),
    position=st.integers(0, 1000),
    seed=st.integers(0, 10_000),
)
def test_the_race_is_run_by_transformers_distribution(
    setting: SamplingParams, seen: list[int], position: int, seed: int
) -> None:
    logits = random_logits(seed, rows=1)
    law = theirs(setting, logits, seen)[0]
    assert sampler(setting, seen).choose(logits, position) == [raced(setting, law, position)]


@settings(max_examples=60)
@given(
    setting=SETTINGS,
    vocabulary=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_looking_at_few_tokens_is_as_good_as_at_all(
    setting: SamplingParams, vocabulary: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    """Also among ties, of which half precision has many."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(6, vocabulary, generator=generator) * spread).to(dtype)
    scores[0, : vocabulary // 2] = -math.inf
    positions = range(seed, seed + 6)
    noise = ExponentialNoise(stream_key(setting.seed or 0, ()), vocabulary)
    one = Sampler(replace(setting, repetition_penalty=1.0), vocabulary, CPU)
    expected = dense_winners(setting, scores, noise.dense(positions, CPU))
    assert one.sample(scores, positions) == expected
    if vocabulary > 1:
        leaders = one.candidates(scores, positions, 4)
        assert [each[0][0] for each in leaders] == expected
        for each in leaders:
            shares = [share for _, share in each]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(1)
            assert len({token for token, _ in each}) == len(each) <= 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_have_no_winner(bad: float) -> None:
    scores = torch.zeros(3, 200)
    scores[1, 150] = bad
    scores[2] = -math.inf
    setting = SamplingParams(1.0, top_p=0.9, seed=0)
    one = Sampler(setting, 200, CPU)
    noise = ExponentialNoise(stream_key(0, ()), 200).dense(range(3), CPU)
    for chosen in (one.sample(scores, range(3)), dense_winners(setting, scores, noise)):
        assert chosen[0] >= 0 and chosen[1:] == [INVALID_TOKEN] * 2
    assert [bool(each) for each in one.candidates(scores, range(3), 2)] == [True, False, False]


def kept(setting: SamplingParams, logits: list[float]) -> set[int]:
    """The tokens that win at one of many positions."""
    one = Sampler(replace(setting, seed=0), len(logits), CPU)
    rows = torch.tensor([logits]).expand(300, -1)
    return set(one.sample(rows, range(300)))


def test_tokens_tied_at_a_filters_border_all_stay() -> None:
    """No token is preferred for its place."""
    tied = [2.0, 1.0, 1.0, 1.0, 0.0]
    assert kept(SamplingParams(1.0, top_k=2), tied) == {0, 1, 2, 3}
    assert kept(SamplingParams(1.0, top_p=0.6), tied) == {0, 1, 2, 3}
    assert kept(SamplingParams(1.0, min_p=math.exp(-1)), tied) == {0, 1, 2, 3}


def test_top_p_ends_where_the_sum_is_reached() -> None:
    """As in transformers: two tokens reach it, no third is needed."""
    logits = [math.log(0.24), math.log(0.26), math.log(0.2), math.log(0.3)]
    assert kept(SamplingParams(1.0, top_p=0.55), logits) == {1, 3}


@pytest.mark.parametrize(
    "setting", [SamplingParams(), SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-6)]
)
def test_one_choice_left_is_the_best_token(setting: SamplingParams) -> None:
    logits = random_logits(3, rows=1)
    for penalty in (1.0, 1.5):
        best = theirs(SamplingParams(repetition_penalty=penalty), logits, [7], greedy=True).argmax()
        penalised = replace(setting, repetition_penalty=penalty)
        assert sampler(penalised, [7]).choose(logits, 3) == [int(best)]


def test_tokens_cannot_be_sampled_without_a_seed() -> None:
    with pytest.raises(ValueError, match="no seed"):
        Sampler(SamplingParams(1.0), VOCABULARY, CPU)


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
    together = one.choose(logits, 10, drafted)
    for i in range(len(drafted) + 1):
        alone = sampler(setting, [*seen, *drafted[:i]]).choose(logits[i : i + 1], 10 + i)
        assert together[i : i + 1] == alone
    # assumed tokens leave no trace
    assert one.choose(logits[:1], 10) == sampler(setting, seen).choose(logits[:1], 10)


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
