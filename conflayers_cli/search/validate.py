"""Plans checked by real decoding of prompts, vanilla and speculative interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.search.memo import plan_label
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.problem import SearchProblem
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer

MAX_CHECKED_PROMPTS = 6
CHECK_TOKENS = 96  # tokens decoded of each prompt by each plan
VANILLA_SHARE = 4
"""Vanilla decoding gets one of so many tokens: its steps all take the same time."""
TURN = 16
"""Tokens of a plan's turn: so often the plans and vanilla take turns within a text."""


@dataclass(frozen=True)
class Check:
    """Figures of real decoding of some prompts.

    Attributes:
        speedup: median over prompts of the ratio of decoding speeds, speculative over vanilla.
        acceptance_rate, tokens_per_step: of the speculative runs; None where nothing was drafted.
        prompts: how many.
        held_out: whether the search never saw them.
        overall: tokens per second of all prompts together over vanilla's: what is predicted. Of
            prompts that draft very differently the median may be far from it.
    """

    speedup: float
    acceptance_rate: float | None
    tokens_per_step: float | None
    prompts: int
    held_out: bool
    overall: float | None = None


def make_proposer(
    problem: SearchProblem,
    plan: SkipPlan,
    setting: DraftParams,
    *,
    adaptive_draft_length: bool = False,
) -> Proposer | None:
    """The proposer for a plan, without n-grams; None (vanilla) where it would draft nothing.

    With an adaptive length every step drafts as far as it pays; otherwise as the setting says.
    """
    if not plan or setting.max_tokens == 0:
        return None
    decoder, costs = problem.decoder, problem.costs
    if adaptive_draft_length:
        table = CostTable({1: costs}, decoder.depth)
        return MixedProposer(decoder, plan, table, ngram=False, tree=setting.tree)
    return SkipProposer(
        decoder,
        plan,
        setting.max_tokens,
        setting.stop_probability,
        setting.tree,
        costs.verify_cost,
        costs.draft_cost(plan, decoder.depth),
    )


def check_by_decoding(
    problem: SearchProblem,
    candidates: Sequence[tuple[SkipPlan, DraftParams]],
    held_out: Sequence[tuple[int, ...]],
    *,
    adaptive_draft_length: bool = False,
) -> list[Check | None]:
    """Decode prompts with each plan and vanilla, in turns of a few tokens within every text, so
    that what else the machine does meets all alike; who begins changes every prompt.

    It is one entry of the memo: proposers learn from prompt to prompt, so nothing of an
    interrupted check is kept.

    Args:
        problem: the model and its costs.
        candidates: plans with their way of drafting.
        held_out: prompts the search has not seen; where empty, the problem's first ones.
        adaptive_draft_length: as for :func:`make_proposer`.

    The check ends early at the problem's deadline, but not before the first prompt's end.

    Returns:
        One check per candidate; None for one that drafts nothing or where nothing was decoded.
    """
    names = "; ".join(f"{plan_label(plan)}, {setting}" for plan, setting in candidates)
    found = problem.memo.cached(
        f"check{' with lookahead' if adaptive_draft_length else ''}: {names}",
        lambda: [
            check and dict(vars(check))
            for check in _checks(problem, candidates, held_out, adaptive_draft_length)
        ],
    )
    return [check and Check(**check) for check in found]


def _checks(
    problem: SearchProblem,
    candidates: Sequence[tuple[SkipPlan, DraftParams]],
    held_out: Sequence[tuple[int, ...]],
    adaptive_draft_length: bool,
) -> list[Check | None]:
    proposers: dict[int, Proposer | None] = {-1: None}  # vanilla
    for i, (plan, setting) in enumerate(candidates):
        proposer = make_proposer(
            problem, plan, setting, adaptive_draft_length=adaptive_draft_length
        )
        if proposer is not None:
            proposers[i] = proposer
    if len(proposers) == 1:
        return [None] * len(candidates)
    steps: dict[int, list[Step]] = {i: [] for i in proposers}
    speeds: dict[int, list[float]] = {i: [] for i in proposers}
    order = list(proposers)
    for number, prompt in enumerate(tuple(held_out) or problem.prompts[:MAX_CHECKED_PROMPTS]):
        if number and problem.out_of_time:
            break
        decoded = _decode(problem, prompt, {i: proposers[i] for i in order})
        if all(decoded.values()):
            for i, own in decoded.items():
                seconds = sum(step.seconds for step in own)
                speeds[i].append(sum(len(step.tokens) for step in own) / seconds)
                steps[i] += own
        order = [*order[1:], order[0]]
    ratios = {
        i: [one / vanilla for one, vanilla in zip(own, speeds[-1], strict=True)]
        for i, own in speeds.items()
    }
    return [
        _check(ratios[i], steps[i], steps[-1], bool(held_out)) if ratios.get(i) else None
        for i in range(len(candidates))
    ]


def _decode(
    problem: SearchProblem, prompt: tuple[int, ...], proposers: dict[int, Proposer | None]
) -> dict[int, list[Step]]:
    """The steps behind the prefill that each took in its turns."""
    steps: dict[int, list[Step]] = {i: [] for i in proposers}
    wanted = {i: CHECK_TOKENS // (1 if proposers[i] else VANILLA_SHARE) for i in proposers}
    total = min(problem.max_new_tokens, 1 + sum(wanted.values()))
    share = total / (1 + sum(wanted.values()))
    generation = Generation(
        problem.decoder, GenerationRequest(prompt, total), end_tokens=problem.end_tokens
    )
    generation.step()
    while generation.finish is None:
        for i, proposer in proposers.items():
            turn = max(int(share * TURN * wanted[i] / CHECK_TOKENS), 2)
            generation.proposer, end = proposer, len(generation.output) + turn
            while generation.finish is None and len(generation.output) < end:
                steps[i].append(generation.step())
    return steps


def _check(
    ratios: Sequence[float], steps: Sequence[Step], vanilla: Sequence[Step], held_out: bool
) -> Check:
    drafted, accepted = sum(s.drafted for s in steps), sum(s.accepted for s in steps)
    return Check(
        speedup=statistics.median(ratios),
        acceptance_rate=accepted / drafted if drafted else None,
        tokens_per_step=sum(len(s.tokens) for s in steps) / len(steps) if drafted else None,
        prompts=len(ratios),
        held_out=held_out,
        overall=_speed(steps) / _speed(vanilla),
    )


def _speed(steps: Sequence[Step]) -> float:
    return sum(len(step.tokens) for step in steps) / sum(step.seconds for step in steps)
