"""Calibration from prompts to a plan: search, refine, check by real decoding, decide."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict, Unpack

from conflayers_cli.search.corpus import MIN_TOKENS
from conflayers_cli.search.local_search import LocalSearch, OnBetter, OnLook, ignore_look
from conflayers_cli.search.objective import VANILLA, DraftParams, Objective, Score
from conflayers_cli.search.problem import RangePlan, SearchProblem, SearchResult, Strategy, Trial
from conflayers_cli.search.validate import MAX_CHECKED_PROMPTS, Check, check_by_decoding
from conflayers_cli.skip_plan import SkipPlan, Weights
from conflayers_cli.spec_decode.tree import TreeShape

MIN_SPEEDUP = 1.02  # a measured speed-up under this is noise; vanilla is the answer then
START_TEXTS = 3  # texts that plans to start from are compared by
MAX_STARTS = 4  # plans of the search that the objective compares before the best is refined

SEARCH_SHARE, REFINE_SHARE = 0.4, 0.75
"""Shares of a budget after which the strategy's search, and refinement, end; then comes the check.
"""

OnStage = Callable[[str], None]


class RefineOptions(TypedDict):
    """Keyword arguments for refinement.

    Attributes:
        refine: plans judged at the most; 0 keeps the strategy's own plan and its way of drafting,
            whatever they are worth.
        tree: side candidates that are drafted where they pay; None: a chain.
        weights: weights that drafts may use; None among them is the model's own.
        on_stage: called with what begins.
        on_better: called with every better plan.
        on_look: called after every look of refinement.
    """

    refine: int
    tree: NotRequired[TreeShape | None]
    weights: NotRequired[Sequence[Weights | None]]
    on_stage: OnStage
    on_better: OnBetter
    on_look: NotRequired[OnLook]


@dataclass(frozen=True)
class Candidate:
    """What one strategy found, before it is checked.

    Attributes:
        method: the strategy, with its settings.
        plan, setting, ranges: the best plan and how to draft with it, whether it pays or not; and
            those for longer contexts.
        expected: its score under the objective; None where it was not judged.
        result: of the search.
        refined: whether the plan went through refinement.
        judged: plans judged during refinement.
        seconds: wall time of search and refinement.
        full_passes, draft_passes: passes of the whole model, and with layers skipped.
        by_rule: there were no prompts to judge by, and none were needed.
    """

    method: Strategy
    plan: SkipPlan
    setting: DraftParams
    ranges: tuple[RangePlan, ...]
    expected: Score | None
    result: SearchResult
    refined: bool
    judged: int
    seconds: float
    full_passes: int
    draft_passes: int
    by_rule: bool = False

    @property
    def strategy(self) -> str:
        return self.method.name

    @property
    def interrupted(self) -> bool:
        return self.result.interrupted

    def as_interrupted(self) -> Candidate:
        """The candidate, marked as interrupted by the user."""
        return replace(self, result=replace(self.result, interrupted=True))


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        plan, setting, ranges: the answer; the empty plan where no plan beats vanilla.
        candidate: the best plan, whether it pays or not, and how it was found.
        check: its real decoding; None where skipped.
        seconds: total wall time.
        conclusion: one sentence.
        candidates: all candidates with their checks, where several strategies ran.
    """

    plan: SkipPlan
    setting: DraftParams
    ranges: tuple[RangePlan, ...]
    candidate: Candidate
    check: Check | None
    seconds: float
    conclusion: str
    candidates: tuple[tuple[Candidate, Check | None], ...] = ()

    @property
    def interrupted(self) -> bool:
        return self.candidate.interrupted

    @property
    def result(self) -> SearchResult:
        return self.candidate.result


def split_prompts(
    prompts: Sequence[tuple[int, ...]], seed: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(for the search, for the check). A quarter, up to six, is held out where there are 4 or more.

    Shuffled by ``seed``, so that files sorted by category give mixed parts.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)
    held = min(len(order) // 4, MAX_CHECKED_PROMPTS)
    return tuple(order[held:]), tuple(order[:held])


def calibrate(
    strategy: Strategy,
    problem: SearchProblem,
    held_out: Sequence[tuple[int, ...]],
    *,
    budget: float | None = None,
    **how: Unpack[RefineOptions],
) -> Calibration:
    """Search, refine, check, decide. Ctrl-C at any stage ends it with the best plan so far.

    Args:
        strategy: the method.
        problem: without prompts the strategy's plan is the answer, unmeasured.
        held_out: prompts the search has not seen; where empty, the check decodes its first ones.
        budget: seconds since the memo began, measuring costs included; None: as long as it takes.
        how: see :class:`RefineOptions`.
    """
    begin = problem.memo.usage().seconds
    candidate = search_and_refine(strategy, problem, budget=budget, **how)
    problem.deadline = budget
    expected, check = candidate.expected, None
    try:
        promising = expected is not None and (not how["refine"] or expected.speedup > 1)
        if promising and not candidate.interrupted:
            how["on_stage"]("checking by real decoding")
            (check,) = check_by_decoding(
                problem,
                [(candidate.plan, candidate.setting)],
                held_out,
                adaptive_draft_length=candidate.refined,
            )
    except KeyboardInterrupt:
        candidate = candidate.as_interrupted()
    seconds = problem.memo.usage().seconds - begin
    return decide(candidate, check, always=not how["refine"], seconds=seconds)


def search_and_refine(
    strategy: Strategy,
    problem: SearchProblem,
    *,
    budget: float | None = None,
    **how: Unpack[RefineOptions],
) -> Candidate:
    """Search and refine; arguments as for :func:`calibrate`. Without a budget the problem's own
    deadline counts."""
    begin = problem.memo.usage()
    refine = how["refine"]
    if budget is not None:
        problem.deadline = budget * (SEARCH_SHARE if refine else REFINE_SHARE)
    result = strategy.search(problem)
    if budget is not None:
        problem.deadline = budget * REFINE_SHARE
    plan, setting, ranges = result.plan, result.setting or strategy.setting, result.ranges
    expected: Score | None = None
    judged, interrupted = 0, result.interrupted
    try:
        if problem.prompts and not interrupted and problem.objective.num_texts:
            if refine:
                how["on_stage"]("refining")
                expected, judged, interrupted = _refine(problem, result, how)
            else:
                expected = problem.objective.score(plan)
        if refine and expected is not None:
            objective = problem.expected_objective
            expected = objective.conservative_score(expected.plan)
            plan, setting = expected.plan, expected.setting
            if not interrupted:
                if tree := how.get("tree"):
                    expected = objective.with_tree(expected, tree) or expected
                    setting = expected.setting
                expected = objective.as_decoded(expected)
                left = max(refine - judged, 1)
                ranges, more = _refine_ranges(problem, plan, ranges, left)
                judged += more
    except KeyboardInterrupt:
        interrupted = True
        if expected is not None:
            plan, setting = expected.plan, expected.setting
    if interrupted and expected is None and refine:
        faster = [t.plan for t in _by_speedup(result.trials) if t.speedup and t.speedup > 1]
        plan = faster[0] if faster else SkipPlan()
    end = problem.memo.usage()
    return Candidate(
        method=strategy,
        plan=plan,
        setting=setting,
        ranges=ranges,
        expected=expected,
        result=replace(result, interrupted=interrupted),
        refined=bool(refine) and expected is not None,
        judged=judged,
        seconds=end.seconds - begin.seconds,
        full_passes=end.full_passes - begin.full_passes,
        draft_passes=end.draft_passes - begin.draft_passes,
        by_rule=not problem.prompts,
    )


def decide(
    candidate: Candidate, check: Check | None, *, always: bool, seconds: float
) -> Calibration:
    """The answer from a candidate and its check; ``always``: its plan, whatever it is worth."""
    pays, conclusion = _conclude(candidate, check)
    keep = pays or always
    return Calibration(
        plan=candidate.plan if keep else SkipPlan(),
        setting=candidate.setting if keep else VANILLA,
        ranges=candidate.ranges if keep else (),
        candidate=candidate,
        check=check,
        seconds=seconds,
        conclusion=conclusion,
    )


def _by_speedup(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a known speed-up, the fastest first."""
    known = [trial for trial in trials if trial.speedup is not None]
    return sorted(known, key=lambda trial: trial.speedup or 0.0, reverse=True)


def _refine(
    problem: SearchProblem, result: SearchResult, how: RefineOptions
) -> tuple[Score | None, int, bool]:
    """(best score of a plan that skips something, plans judged, interrupted).

    Starts from what few texts say is the best of nothing, the strategy's plan and its fastest
    trials, with each kind of weights; then from the best plan with the other weights, where these
    make it faster.
    """
    weights, objective = how.get("weights", (None,)), problem.expected_objective
    plans = dict.fromkeys([result.plan, *(trial.plan for trial in _by_speedup(result.trials))])
    few = (*list(plans)[:MAX_STARTS], SkipPlan())
    starts = dict.fromkeys(replace(plan, weights=kind) for kind in weights for plan in few)
    on_look = how.get("on_look", ignore_look)
    search = _local_search(problem, objective, how["refine"], how["on_better"], on_look)
    best: Score | None = None
    try:
        rough = {plan: objective.score(plan, START_TEXTS).speedup for plan in starts}
        best = _better(None, search.refine(max(rough, key=rough.__getitem__)))
        for kind in weights:  # what begins best with some weights may end best with others
            if best is None or kind == best.plan.weights:
                continue
            other = objective.score(replace(best.plan, weights=kind))
            if other.plan and other.speedup > best.speedup:
                best = _better(best, search.refine(other.plan))
    except KeyboardInterrupt:
        return _better(best, search.best), search.judged, True
    return best, search.judged, False


def _refine_ranges(
    problem: SearchProblem, plan: SkipPlan, ranges: Sequence[RangePlan], max_plans: int
) -> tuple[tuple[RangePlan, ...], int]:
    """(each range's plan, refined with the costs at its context, equal neighbours merged; plans
    judged, about ``max_plans`` at the most)."""
    refined: list[RangePlan] = []
    before, judged = plan, 0
    for each in ranges:
        objective = problem.expected_objective.at_context(each.from_context)
        starts = filter(None, (replace(each.plan, weights=plan.weights), before))
        best = max(map(objective.score, starts), key=lambda score: score.speedup, default=None)
        if best is None:
            continue
        share = max(max_plans // len(ranges), 1)
        search = _local_search(problem, objective, share, lambda score, judged: None)
        best = search.refine(best.plan)
        judged += search.judged
        if best.plan != before:
            setting = objective.conservative_score(best.plan).setting
            refined.append(RangePlan(each.from_context, best.plan, setting))
            before = best.plan
    return tuple(refined), judged


def _local_search(
    problem: SearchProblem,
    objective: Objective,
    max_plans: int,
    on_better: OnBetter,
    on_look: OnLook = ignore_look,
) -> LocalSearch:
    return LocalSearch(
        objective,
        single_sub_layers=len(problem.decoder.sub_layers) == 2,
        on_progress=on_better,
        max_plans=max_plans,
        out_of_time=lambda: problem.out_of_time,
        on_look=on_look,
    )


def _better(one: Score | None, other: Score | None) -> Score | None:
    """The better of two scores; plans that skip nothing don't count."""
    scores = [score for score in (one, other) if score is not None and score.plan]
    return max(scores, key=lambda score: score.speedup, default=None)


def _conclude(candidate: Candidate, check: Check | None) -> tuple[bool, str]:
    """(whether the plan pays, one sentence why or why not)."""
    plan, expected = candidate.plan, candidate.expected
    if check is not None:
        source = "held-out" if check.held_out else "calibration"
        prompts = f"{check.prompts} {source} prompt{'s' if check.prompts > 1 else ''}"
        figure = f"{check.speedup:.2f}× vanilla, measured on {prompts}"
        if check.speedup >= MIN_SPEEDUP:
            return True, f"{_in_words(plan)} decodes at {figure}"
        return False, f"no plan pays: the best one, {_in_words(plan)}, decodes at {figure}"
    if candidate.interrupted:
        if plan and (expected is None or expected.speedup > 1):
            return True, "interrupted: the best plan so far, not measured by decoding"
        return False, "interrupted before a plan was found that pays"
    if expected is None:
        return _conclude_unjudged(candidate)
    if plan and expected.speedup > 1:
        return False, "not measured: no output is longer than one token, so no plan is known to pay"
    return False, (
        "no plan pays: whatever is left out costs more in refused drafts than it saves "
        f"(the best one found is predicted at {expected.speedup:.2f}× vanilla)"
    )


def _in_words(plan: SkipPlan) -> str:
    """What a plan does, as the subject of a sentence."""
    skipping = f"skipping {len(plan)} sub-layer{'' if len(plan) == 1 else 's'}"
    if plan.weights is None:
        return skipping
    rounded = f"drafting with {plan.weights} weights"
    return f"{rounded} and {skipping}" if len(plan) else rounded


def _conclude_unjudged(candidate: Candidate) -> tuple[bool, str]:
    plan = candidate.plan
    if candidate.by_rule:
        found = f"skipping {len(plan)} sub-layers" if plan else "the target keeps all layers"
        return bool(plan), f"{found} by rule; not measured"
    if not plan:
        return False, f"no plan pays: {candidate.result.stopped_because}"
    return False, (
        f"no plan can be judged: no output has {MIN_TOKENS} tokens or more "
        "(other prompts, or a larger --max-new-tokens, help)"
    )
