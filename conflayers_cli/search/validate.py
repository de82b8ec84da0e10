"""Plans put to the proof: real decoding of prompts, vanilla and speculative interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.search.memo import label_of
from conflayers_cli.search.objective import Setting
from conflayers_cli.search.problem import Task
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer

MOST_CHECKED = 6
CHECK_TOKENS = 96
"""Prompts held out for the check by real decoding, and tokens decoded of each."""


@dataclass(frozen=True)
class Check:
    """What real decoding of some prompts came to.

    Attributes:
        speedup: median over prompts of the ratio of decoding speeds, speculative over vanilla.
        acceptance_rate, tokens_per_step: of the speculative runs; None where nothing was drafted.
        prompts: how many.
        held_out: whether the search never saw them.
    """

    speedup: float
    acceptance_rate: float | None
    tokens_per_step: float | None
    prompts: int
    held_out: bool


def drafter_of(
    task: Task, plan: SkipPlan, setting: Setting, *, adaptive_draft_length: bool = False
) -> Proposer | None:
    """What decodes with a plan; None (vanilla) where it would draft nothing.

    With an adaptive length every step drafts as far as it pays; otherwise as the setting
    says. n-grams don't draft: it is the plan that is put to the proof.
    """
    if not plan or setting.max_tokens == 0:
        return None
    costs = task.costs
    if adaptive_draft_length:
        table = CostTable({1: costs}, task.decoder.depth)
        return MixedProposer(task.decoder, plan, table, ngram=False, tree=setting.tree)
    return SkipProposer(
        task.decoder,
        plan,
        setting.max_tokens,
        setting.stop_probability,
        setting.tree,
        costs.verify_cost,
        costs.draft_cost(plan, task.decoder.depth),
    )


def check_by_decoding(
    task: Task,
    candidates: Sequence[tuple[SkipPlan, Setting]],
    held_out: Sequence[tuple[int, ...]],
    *,
    adaptive_draft_length: bool = False,
) -> list[Check | None]:
    """Decode prompts with each plan and vanilla, in turns; who begins changes every prompt.

    Args:
        candidates: plans with their way of drafting.
        held_out: prompts the search has not seen; where empty, the task's first ones are decoded.
        adaptive_draft_length: as for :func:`drafter_of`.

    Returns:
        One check per candidate; None for one that drafts nothing or where nothing was decoded.

    It is measured in one go: drafters learn from prompt to prompt, so that of a check that was cut
    short nothing is kept.
    """
    names = "; ".join(f"{label_of(plan)}, {setting}" for plan, setting in candidates)
    found = task.memo.cached(
        f"check{' with lookahead' if adaptive_draft_length else ''}: {names}",
        lambda: [
            None if check is None else dict(vars(check))
            for check in _checks(task, candidates, held_out, adaptive_draft_length)
        ],
    )
    return [None if check is None else Check(**check) for check in found]


def _checks(
    task: Task,
    candidates: Sequence[tuple[SkipPlan, Setting]],
    held_out: Sequence[tuple[int, ...]],
    adaptive_draft_length: bool,
) -> list[Check | None]:
    """What :func:`check_by_decoding` gives, by decoding."""
    prompts = tuple(held_out) or task.prompts[:MOST_CHECKED]
    drafters = [
        drafter_of(task, plan, setting, adaptive_draft_length=adaptive_draft_length)
        for plan, setting in candidates
    ]
    arms: list[tuple[int, Proposer | None]] = [(-1, None)]
    arms += [(i, drafter) for i, drafter in enumerate(drafters) if drafter is not None]
    if len(arms) == 1:
        return [None] * len(candidates)
    steps: dict[int, list[Step]] = {i: [] for i, _ in arms}
    ratios: dict[int, list[float]] = {i: [] for i, _ in arms}
    for turn, prompt in enumerate(prompts):
        speed: dict[int, float] = {}
        first = turn % len(arms)
        for i, drafter in [*arms[first:], *arms[:first]]:
            decoded = _decode(task, prompt, drafter)
            seconds = sum(step.seconds for step in decoded)
            if decoded:
                speed[i] = sum(len(step.tokens) for step in decoded) / seconds
            steps[i] += decoded
        for i in speed:
            ratios[i].append(speed[i] / speed[-1])
    return [
        _check(ratios[i], steps[i], bool(held_out)) if ratios.get(i) else None
        for i in range(len(candidates))
    ]


def _decode(task: Task, prompt: tuple[int, ...], drafter: Proposer | None) -> list[Step]:
    """The steps behind the prefill."""
    generation = Generation(
        task.decoder,
        GenerationRequest(prompt, min(task.max_new_tokens, CHECK_TOKENS)),
        drafter=drafter,
        end_tokens=task.end_tokens,
    )
    return list(generation)[1:]


def _check(ratios: Sequence[float], steps: Sequence[Step], held_out: bool) -> Check:
    drafted, accepted = sum(s.drafted for s in steps), sum(s.accepted for s in steps)
    return Check(
        speedup=statistics.median(ratios),
        acceptance_rate=accepted / drafted if drafted else None,
        tokens_per_step=sum(len(s.tokens) for s in steps) / len(steps) if drafted else None,
        prompts=len(ratios),
        held_out=held_out,
    )
