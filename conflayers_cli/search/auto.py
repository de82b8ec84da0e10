"""Auto: the strategies one after the other within a time budget, and the fastest plan of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from conflayers_cli.errors import InputError
from conflayers_cli.search.calibrate import (
    Calibration,
    Candidate,
    OnStage,
    RefineOptions,
    decide,
    search_and_refine,
)
from conflayers_cli.search.problem import SearchProblem, Strategy
from conflayers_cli.search.validate import Check, check_by_decoding

SEARCH_SHARE = 0.7  # share of the budget for searches; the rest is for the check by decoding
MAX_CHECKED_PLANS = 4
NEAR = 0.05  # a plan predicted this much under the best one is not checked


def auto(
    strategies: Sequence[Strategy],
    problem: SearchProblem,
    held_out: Sequence[tuple[int, ...]],
    *,
    budget: float,
    **how: Unpack[RefineOptions],
) -> Calibration:
    """Run the strategies that the budget affords, decode with their plans, keep the fastest.

    Every strategy gets an equal share of the searching time that is left; what one does not use
    goes to the others. They share texts and measurements. Ctrl-C ends the searches with what was
    found until then.

    Args:
        strategies: in the order they run; those the time does not reach are left out.
        problem: its deadline is set anew.
        held_out: as for `calibrate`.
        budget: seconds.
        how: see `RefineOptions`.

    Raises:
        InputError: no strategy applies to the model and the prompts.
    """
    on_stage = how["on_stage"]
    begin = problem.memo.usage().seconds
    found: list[Candidate] = []
    not_applicable: InputError | None = None
    for i, strategy in enumerate(strategies):
        now = problem.memo.usage().seconds
        left = begin + SEARCH_SHARE * budget - now
        if left <= 0 and found:
            on_stage(f"no time left for {', '.join(s.name for s in strategies[i:])}")
            break
        problem.deadline = now + max(left, 0.0) / (len(strategies) - i)
        on_stage(f"searching: {strategy.name}")
        try:
            found.append(search_and_refine(strategy, problem, **how))
        except InputError as error:  # not for this model or these prompts; others may be
            on_stage(f"{strategy.name} does not apply: {error}")
            not_applicable = error
            continue
        if found[-1].interrupted:
            break
    problem.deadline = None
    if not found:
        raise not_applicable or InputError("no strategy was given")
    checks: list[Check | None] = [None] * len(found)
    try:
        if not found[-1].interrupted:
            checks = _check(found, problem, held_out, on_stage)
        interrupted = found[-1].interrupted
    except KeyboardInterrupt:
        interrupted = True
    best = max(range(len(found)), key=lambda i: _speedups(found[i], checks[i]))
    calibration = decide(
        found[best].as_interrupted() if interrupted else found[best],
        checks[best],
        always=not how["refine"],
        seconds=problem.memo.usage().seconds - begin,
    )
    found[best] = calibration.candidate
    return replace(calibration, candidates=tuple(zip(found, checks, strict=True)))


def _check(
    found: list[Candidate],
    problem: SearchProblem,
    held_out: Sequence[tuple[int, ...]],
    on_stage: OnStage,
) -> list[Check | None]:
    """Real decoding with each of the plans that may be the fastest, equal ones once."""
    expected = [c.expected.speedup if c.expected else 0.0 for c in found]
    least = max(1.0, max(expected) * (1 - NEAR))
    ranked = sorted(range(len(found)), key=lambda i: expected[i], reverse=True)
    near = [found[i] for i in ranked if found[i].plan and expected[i] >= least]
    chosen = list(dict.fromkeys((c.plan, c.setting) for c in near))[:MAX_CHECKED_PLANS]
    if not chosen:
        return [None] * len(found)
    on_stage("checking by real decoding")
    refined = any(c.refined for c in found)
    checks = check_by_decoding(problem, chosen, held_out, adaptive_draft_length=refined)
    by_plan = dict(zip(chosen, checks, strict=True))
    return [by_plan.get((c.plan, c.setting)) for c in found]


def _speedups(candidate: Candidate, check: Check | None) -> tuple[float, float]:
    """(measured, predicted); 0 where there is none."""
    expected = candidate.expected if candidate.plan else None
    return check.speedup if check else 0.0, expected.speedup if expected else 0.0
