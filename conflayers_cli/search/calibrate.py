"""Calibration from prompts to a plan: search, refine, check by real decoding, decide."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from conflayers_cli.search.corpus import LEAST_TOKENS
from conflayers_cli.search.local_search import Refiner
from conflayers_cli.search.objective import VANILLA, Objective, Score, Setting
from conflayers_cli.search.problem import RangePlan, SearchResult, Strategy, Task
from conflayers_cli.search.tree_replay import with_tree
from conflayers_cli.search.validate import MOST_CHECKED, Check, check_by_decoding
from conflayers_cli.skip_plan import SkipPlan, Weights
from conflayers_cli.spec_decode.tree import TreeShape

PAYS = 1.02
"""A measured speed-up under this is noise; vanilla is the answer then."""
STARTS = 4
"""Plans of the search that the objective compares before the best is refined."""

Stage = Callable[[str], None]
Better = Callable[[Score, int], None]


@dataclass(frozen=True)
class Candidate:
    """What one strategy came to, before it is put to the proof.

    Attributes:
        method: the strategy, with its settings.
        plan, setting, ranges: the best plan looked at and how to draft with it, whether it pays or
            not; and those for longer contexts.
        expected: its score under the objective; None where it was not judged.
        result: the search behind it.
        refined: whether the plan went through refinement.
        judged: plans judged during refinement.
        seconds: wall time of search and refinement.
        full_passes, draft_passes: passes of the whole model, and with layers left out, spent.
        by_rule: there were no prompts to judge by, and none were needed.
    """

    method: Strategy
    plan: SkipPlan
    setting: Setting
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


@dataclass(frozen=True)
class Calibration:
    """What calibration came to.

    Attributes:
        plan, setting, ranges: the answer; the empty plan where no plan beats vanilla.
        candidate: the best plan looked at and the way to it, whether it paid or not.
        check: its real decoding; None where skipped.
        seconds: wall time of it all.
        conclusion: one sentence.
        others: all candidates with their checks, where several strategies ran.
    """

    plan: SkipPlan
    setting: Setting
    ranges: tuple[RangePlan, ...]
    candidate: Candidate
    check: Check | None
    seconds: float
    conclusion: str
    others: tuple[tuple[Candidate, Check | None], ...] = ()

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
    held = min(len(order) // 4, MOST_CHECKED)
    return tuple(order[held:]), tuple(order[:held])


def calibrate(
    strategy: Strategy,
    task: Task,
    held_out: Sequence[tuple[int, ...]],
    *,
    refine: int,
    tree: TreeShape | None = None,
    weights: Sequence[Weights | None] = (None,),
    on_stage: Stage,
    on_better: Better,
) -> Calibration:
    """Search, refine, check, decide.

    Args:
        strategy: the method.
        task: what it works on; without prompts the strategy's plan is the answer, unmeasured.
        held_out: prompts the search has not seen; where empty, the check decodes its first ones.
        refine: plans judged in refinement at the most; 0 keeps the strategy's own plan and its way
            of drafting, whatever they are worth.
        tree: side candidates that are drafted where refinement finds that they pay; None: a chain.
        weights: those that drafts may use, the model's own (None) among them or not; whatever is
            refined is so with those that begin best.
        on_stage: told what begins.
        on_better: told about better plans during refinement.

    A KeyboardInterrupt at any stage ends the work with the best plan so far.
    """
    begin = task.memo.usage()
    candidate = find(
        strategy,
        task,
        refine=refine,
        tree=tree,
        weights=weights,
        on_stage=on_stage,
        on_better=on_better,
    )
    check: Check | None = None
    try:
        worth = candidate.expected is not None and (not refine or candidate.expected.speedup > 1)
        if worth and not candidate.interrupted:
            on_stage("checking by real decoding")
            (check,) = check_by_decoding(
                task,
                [(candidate.plan, candidate.setting)],
                held_out,
                adaptive_draft_length=candidate.refined,
            )
    except KeyboardInterrupt:
        candidate = as_interrupted(candidate)
    seconds = task.memo.usage().seconds - begin.seconds
    return decide(candidate, check, always=not refine, seconds=seconds)


def find(
    strategy: Strategy,
    task: Task,
    *,
    refine: int,
    tree: TreeShape | None = None,
    weights: Sequence[Weights | None] = (None,),
    on_stage: Stage,
    on_better: Better,
) -> Candidate:
    """Search and refine; arguments as for :func:`calibrate`."""
    begin = task.memo.usage()
    result = strategy.search(task)
    plan, setting, ranges = result.plan, result.setting or strategy.setting, result.ranges
    expected: Score | None = None
    judged, interrupted = 0, result.interrupted
    try:
        if task.prompts and not interrupted and task.objective.texts:
            if refine:
                on_stage("refining")
                expected, judged, interrupted = _refined(
                    task, _starts(result, weights), weights, refine, on_better
                )
                if expected is not None:
                    expected = task.objective.modest(expected.plan)
                    plan, setting = expected.plan, expected.setting
                if expected is not None and not interrupted:
                    if tree is not None:
                        expected = with_tree(task.objective, expected, tree) or expected
                        setting = expected.setting
                    ranges, more = _refined_ranges(task, plan, ranges, max(refine - judged, 1))
                    judged += more
            else:
                expected = task.objective.score(plan)
    except KeyboardInterrupt:
        interrupted = True
        if expected is not None:
            plan, setting = expected.plan, expected.setting
    if interrupted and expected is None and refine:
        plan = _fastest_decoded(result)
    end = task.memo.usage()
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
        by_rule=not task.prompts,
    )


def decide(
    candidate: Candidate, check: Check | None, *, always: bool, seconds: float
) -> Calibration:
    """The answer from a candidate and its check.

    Args:
        candidate: the best plan looked at.
        check: its real decoding, if any.
        always: the plan is the answer whatever it is worth.
        seconds: wall time of it all.
    """
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


def as_interrupted(candidate: Candidate) -> Candidate:
    """The candidate, its work cut short by the user."""
    return replace(candidate, result=replace(candidate.result, interrupted=True))


def _fastest_decoded(result: SearchResult) -> SkipPlan:
    """The plan that decoded fastest during the search; the empty one where none beat vanilla."""
    paying = [t for t in result.trials if t.speedup is not None and t.speedup > 1]
    return max(paying, key=lambda t: t.speedup or 0.0).plan if paying else SkipPlan()


def _refiner(task: Task, objective: Objective, refine: int, on_better: Better) -> Refiner:
    return Refiner(
        objective,
        single_sub_layers=len(task.decoder.sub_layers) == 2,
        on_progress=on_better,
        most_plans=refine,
        out_of_time=lambda: task.out_of_time,
    )


def _refined(
    task: Task,
    starts: Sequence[SkipPlan],
    weights: Sequence[Weights | None],
    most_plans: int,
    on_better: Better,
) -> tuple[Score | None, int, bool]:
    """(best score of a plan that skips something, plans judged, interrupted)."""
    refiner = _refiner(task, task.objective, most_plans, on_better)
    best: Score | None = None
    interrupted = False
    try:
        for plan in starts:
            best = _better(best, task.objective.score(plan))
        if best is not None:
            best = _better(best, refiner.refine(best.plan))
        for kind in weights:  # what begins best with some weights may end best with others
            if best is None or kind == best.plan.weights:
                continue
            other = task.objective.score(replace(best.plan, weights=kind))
            if other.plan and other.speedup > best.speedup:
                best = _better(best, refiner.refine(other.plan))
    except KeyboardInterrupt:
        best, interrupted = _better(best, refiner.best), True
    return best, refiner.judged, interrupted


def _refined_ranges(
    task: Task, plan: SkipPlan, ranges: Sequence[RangePlan], most_plans: int
) -> tuple[tuple[RangePlan, ...], int]:
    """Each range's plan, refined with what passes cost at its context; equal neighbours merged.

    Also says how many plans were judged, ``most_plans`` at the most over all ranges.
    """
    refined: list[RangePlan] = []
    before, judged = plan, 0
    for each in ranges:
        objective = task.objective.at(each.from_context)
        refiner = _refiner(
            task, objective, max(most_plans // len(ranges), 1), lambda score, judged: None
        )
        with_weights = (replace(each.plan, weights=plan.weights), before)
        starts = [objective.score(start) for start in with_weights if start]
        if not starts:
            continue
        best = refiner.refine(max(starts, key=lambda score: score.speedup).plan)
        judged += refiner.judged
        if best.plan != before:
            setting = objective.modest(best.plan).setting
            refined.append(RangePlan(each.from_context, best.plan, setting))
            before = best.plan
    return tuple(refined), judged


def _better(one: Score | None, other: Score | None) -> Score | None:
    """The better of two plans; plans that skip nothing don't count."""
    scores = [score for score in (one, other) if score is not None and score.plan]
    return max(scores, key=lambda score: score.speedup, default=None)


def _starts(result: SearchResult, weights: Sequence[Weights | None]) -> list[SkipPlan]:
    """The strategy's own plan and the others it found fastest, with all weights that there may be;
    and those weights alone."""
    timed = [t for t in result.trials if t.speedup is not None]
    timed.sort(key=lambda t: t.speedup or 0.0, reverse=True)
    plans = dict.fromkeys([result.plan, *(t.plan for t in timed)])
    few = (*list(plans)[:STARTS], SkipPlan())
    each = [replace(plan, weights=kind) for kind in weights for plan in few]
    return [plan for plan in dict.fromkeys(each) if plan]


def _conclude(candidate: Candidate, check: Check | None) -> tuple[bool, str]:
    """(whether the plan pays, one sentence why or why not)."""
    plan, expected = candidate.plan, candidate.expected
    if check is not None:
        source = "held-out" if check.held_out else "calibration"
        prompts = f"{check.prompts} {source} prompt{'s' if check.prompts > 1 else ''}"
        figure = f"{check.speedup:.2f}× vanilla, measured on {prompts}"
        if check.speedup >= PAYS:
            return True, f"{_in_words(plan)} decodes at {figure}"
        return False, f"no plan pays: the best one, {_in_words(plan)}, decodes at {figure}"
    if candidate.interrupted:
        if plan and (expected is None or expected.speedup > 1):
            return True, "interrupted: the best plan so far, not measured by decoding"
        return False, "interrupted before a plan was found that pays"
    if expected is None:
        return _unjudged(candidate)
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


def _unjudged(candidate: Candidate) -> tuple[bool, str]:
    """As `_conclude`, for a plan that nothing was known about."""
    plan = candidate.plan
    if candidate.by_rule:
        found = f"skipping {len(plan)} sub-layers" if plan else "the target keeps all layers"
        return bool(plan), f"{found} by rule; not measured"
    if not plan:
        return False, f"no plan pays: {candidate.result.stopped_because}"
    return False, (
        f"no plan can be judged: no output has {LEAST_TOKENS} tokens or more "
        "(other prompts, or a larger --max-new-tokens, help)"
    )
