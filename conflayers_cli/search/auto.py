"""Auto: the strategies one after the other within a time budget, and the fastest plan of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conflayers_cli.errors import InputError
from conflayers_cli.search.calibrate import (
    Better,
    Calibration,
    Candidate,
    Stage,
    as_interrupted,
    decide,
    find,
)
from conflayers_cli.search.problem import Strategy, Task
from conflayers_cli.search.validate import Check, check_by_decoding
from conflayers_cli.skip_plan import Weights
from conflayers_cli.spec_decode.tree import TreeShape

SEARCHING = 0.7
"""Share of the budget for searches; the rest is for decoding with what they found."""
MOST_ARMS = 4
"""Plans decoded with at the most."""
NEAR = 0.05
"""A plan predicted this much under the best one is not decoded with, unless it is all there is."""


def auto(
    strategies: Sequence[Strategy],
    task: Task,
    held_out: Sequence[tuple[int, ...]],
    *,
    budget: float,
    refine: int,
    tree: TreeShape | None = None,
    weights: Sequence[Weights | None] = (None,),
    on_stage: Stage,
    on_better: Better,
) -> Calibration:
    """Run the strategies that the budget affords, decode with their plans, keep the fastest.

    Every strategy gets an equal share of the searching time that is left; what one does not use
    goes to the others. They judge by the same texts and know what the others have judged.

    Args:
        strategies: in the order they run; those the time does not reach are left out.
        task: what they work on; its deadline is set anew.
        held_out, refine, tree, weights, on_stage, on_better: as for `calibrate`.
        budget: seconds.

    A KeyboardInterrupt ends the searches with what was found until then.

    Raises:
        InputError: no strategy applies to the model and the prompts.
    """
    begin = task.memo.usage().seconds
    found: list[Candidate] = []
    refused: InputError | None = None
    for i, strategy in enumerate(strategies):
        now = task.memo.usage().seconds
        left = begin + SEARCHING * budget - now
        if left <= 0 and found:
            on_stage(f"no time left for {', '.join(s.name for s in strategies[i:])}")
            break
        task.deadline = now + max(left, 0.0) / (len(strategies) - i)
        on_stage(f"searching: {strategy.name}")
        try:
            candidate = find(
                strategy,
                task,
                refine=refine,
                tree=tree,
                weights=weights,
                on_stage=on_stage,
                on_better=on_better,
            )
        except InputError as error:  # not for this model or these prompts; others may be
            on_stage(f"{strategy.name} does not apply: {error}")
            refused = error
            continue
        found.append(candidate)
        if candidate.interrupted:
            break
    task.deadline = None
    if not found:
        raise refused or InputError("no strategy was given")
    checks = _checks(found, task, held_out, on_stage)
    best = _best(found, checks)
    if any(candidate.interrupted for candidate in found):
        found[best] = as_interrupted(found[best])
    calibration = decide(
        found[best],
        checks[best],
        always=not refine,
        seconds=task.memo.usage().seconds - begin,
    )
    return replace(calibration, others=tuple(zip(found, checks, strict=True)))


def _checks(
    found: list[Candidate],
    task: Task,
    held_out: Sequence[tuple[int, ...]],
    on_stage: Stage,
) -> list[Check | None]:
    """Real decoding with each of the plans, equal ones once; those without a chance left out."""
    if found[-1].interrupted:
        return [None] * len(found)
    expected = [c.expected.speedup if c.expected else 0.0 for c in found]
    least = max(1.0, max(expected) * (1 - NEAR))
    ranked = sorted(range(len(found)), key=lambda i: expected[i], reverse=True)
    near = [found[i] for i in ranked if found[i].plan and expected[i] >= least]
    chosen = list(dict.fromkeys((c.plan, c.setting) for c in near))[:MOST_ARMS]
    if not chosen:
        return [None] * len(found)
    on_stage("checking by real decoding")
    try:
        refined = any(c.refined for c in found)
        done = check_by_decoding(task, chosen, held_out, adaptive_draft_length=refined)
    except KeyboardInterrupt:
        found[-1] = as_interrupted(found[-1])
        return [None] * len(found)
    by_plan = dict(zip(chosen, done, strict=True))
    return [by_plan.get((c.plan, c.setting)) for c in found]


def _best(found: Sequence[Candidate], checks: Sequence[Check | None]) -> int:
    """The fastest by real decoding, else by prediction."""

    def worth(i: int) -> tuple[float, float]:
        check, expected = checks[i], found[i].expected
        return (
            check.speedup if check else 0.0,
            expected.speedup if expected and found[i].plan else 0.0,
        )

    return max(range(len(found)), key=worth)
