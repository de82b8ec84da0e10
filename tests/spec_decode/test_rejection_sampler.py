"""The rules by which drafts stand or fall, on distributions written down by hand.

Speculative sampling must leave the target's law untouched. Each test draws many times from known
p and q and compares the law of the tokens with p's by chi-square; the last ones show that the same
test finds rules that are slightly wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.rejection_sampler import accept_greedy, accept_sampled
from tests.tiny import chi_square

CPU = torch.device("cpu")
DRAWS = 6000
SIZE = 6
Rule = Callable[
    [Sequence[int], torch.Tensor, torch.Tensor | None, Sampler], tuple[int, int]
]  # accept_sampled's form

P = torch.tensor(
    [
        [0.30, 0.25, 0.20, 0.15, 0.07, 0.03],
        [0.05, 0.05, 0.10, 0.20, 0.20, 0.40],
        [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],
    ]
)
NEAR = torch.tensor([[0.10, 0.30, 0.10, 0.30, 0.10, 0.10], [0.30, 0.05, 0.30, 0.05, 0.10, 0.20]])
LOW, HIGH = [0.5, 0.3, 0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.2, 0.3, 0.5]
CUT = torch.tensor([[0.0, 0.6, 0.2, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3, 0.3, 0.4], LOW])
DISJOINT_P, DISJOINT_Q = torch.tensor([LOW, HIGH, LOW]), torch.tensor([HIGH, LOW])


def chains(
    p: torch.Tensor, q: torch.Tensor | None, rule: Rule = accept_sampled
) -> tuple[Counter[tuple[int, ...]], int]:
    """(how often each chain of three tokens came out, drafts kept in all).

    The tokens of a position depend on no earlier ones here, so the law of a chain is a product.
    What an early refusal leaves open is drawn from p, as a further step of decoding would.
    """
    sampler = Sampler(SamplingParams(1.0, seed=11), SIZE, CPU)
    counts: Counter[tuple[int, ...]] = Counter()
    kept_in_all = 0
    for i in range(DRAWS):
        fixed = [i % SIZE, i // SIZE % SIZE]  # beforehand, whatever p says
        drafted = fixed if q is None else [sampler.draw(row) for row in q]
        kept, token = rule(drafted, p, q, sampler)
        chain = [*drafted[:kept], token]
        chain += [sampler.draw(p[j]) for j in range(len(chain), 3)]
        counts[tuple(chain)] += 1
        kept_in_all += kept
    return counts, kept_in_all


def law(p: torch.Tensor) -> dict[tuple[int, ...], float]:
    a, b, c = p.double()
    joint = a[:, None, None] * b[None, :, None] * c[None, None, :]
    return {
        (i, j, k): float(joint[i, j, k])
        for i in range(SIZE)
        for j in range(SIZE)
        for k in range(SIZE)
    }


@pytest.mark.parametrize(
    ("p", "q", "share"),
    [
        pytest.param(P, P[:2], (1.0, 1.0), id="all accepted"),
        pytest.param(DISJOINT_P, DISJOINT_Q, (0.0, 0.0), id="all refused"),
        pytest.param(P, NEAR, (0.3, 0.8), id="some"),
        pytest.param(CUT, NEAR, (0.1, 0.8), id="target truncated"),
        pytest.param(P, CUT[:2], (0.2, 0.8), id="draft truncated"),
        pytest.param(P, None, (0.05, 0.3), id="certain drafts"),
        pytest.param(CUT, None, (0.05, 0.3), id="certain drafts, target truncated"),
    ],
)
def test_the_law_is_the_targets(
    p: torch.Tensor, q: torch.Tensor | None, share: tuple[float, float]
) -> None:
    counts, kept = chains(p, q)
    assert share[0] <= kept / (2 * DRAWS) <= share[1]
    assert chi_square(counts, law(p)) > 1e-4


def accept_all(
    drafted: Sequence[int], p: torch.Tensor, q: torch.Tensor | None, sampler: Sampler
) -> tuple[int, int]:
    return len(drafted), sampler.draw(p[len(drafted)])


def redraw_from_target(
    drafted: Sequence[int], p: torch.Tensor, q: torch.Tensor | None, sampler: Sampler
) -> tuple[int, int]:
    """The common slip: after a refusal, p in place of the residual."""
    kept, token = accept_sampled(drafted, p, q, sampler)
    return kept, token if kept == len(drafted) else sampler.draw(p[kept])


def residual_without_the_token(
    drafted: Sequence[int], p: torch.Tensor, q: torch.Tensor | None, sampler: Sampler
) -> tuple[int, int]:
    """The residual of a certain draft, after the refusal of a sampled one."""
    kept, token = accept_sampled(drafted, p, q, sampler)
    if kept == len(drafted):
        return kept, token
    residual = p[kept].clone()
    residual[drafted[kept]] = 0.0
    return kept, sampler.draw(residual)


@pytest.mark.parametrize("rule", [accept_all, redraw_from_target, residual_without_the_token])
def test_wrong_rules_are_found(rule: Rule) -> None:
    counts, _ = chains(P, NEAR, rule)
    assert chi_square(counts, law(P)) < 1e-8


def test_no_draft_draws_from_the_target() -> None:
    sampler = Sampler(SamplingParams(1.0), SIZE, CPU)
    only = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    assert accept_sampled([], only, None, sampler) == (0, 3)


def test_a_certain_draft_of_a_certain_token_always_stands() -> None:
    sampler = Sampler(SamplingParams(1.0), SIZE, CPU)
    certain = torch.zeros(3, SIZE)
    certain[:, 2] = 1.0
    for _ in range(200):
        assert accept_sampled([2, 2], certain, None, sampler) == (2, 2)
        assert accept_sampled([2, 2], certain, certain[:2], sampler) == (2, 2)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_greedy_keeps_the_common_start(drafted: list[int], best: list[int]) -> None:
    kept, token = accept_greedy(drafted, best[: len(drafted) + 1])
    assert drafted[:kept] == best[:kept]
    assert token == best[kept]
    assert kept == len(drafted) or drafted[kept] != best[kept]
