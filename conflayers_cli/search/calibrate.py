"""Calibration from prompts to a plan: search, refine, check by real decoding, decide."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from conflayers_cli.engine.decode import Generation, Step
from conflayers_cli.engine.draft import Drafter, SkipDrafter
from conflayers_cli.engine.plan import SkipPlan

from .objective import VANILLA, Objective, Score, Setting
from .refine import Refiner
from .task import Sample, SearchResult, Strategy, Task

PAYS = 1.02
"""A measured speed-up under this is noise; vanilla is the answer then."""
MOST_TEXTS = 8
"""Texts the objective judges plans by."""
MOST_CHECKED = 6
CHECK_TOKENS = 96
"""Prompts held out for the check by real decoding, and tokens decoded of each."""
STARTS = 4
"""Plans of the search that the objective compares before the best is refined."""


@dataclass(frozen=True)
class Check:
    """Real decoding of prompts, vanilla and speculative interleaved.

    Attributes:
        speedup: median over prompts of the ratio of decoding speeds.
        acceptance_rate, tokens_per_step: of the speculative runs; None where nothing was drafted.
        prompts: how many.
        held_out: whether the search never saw them.
    """

    speedup: float
    acceptance_rate: float | None
    tokens_per_step: float | None
    prompts: int
    held_out: bool


@dataclass(frozen=True)
class Calibration:
    """What calibration came to.

    Attributes:
        plan, setting: the answer; the empty plan where no plan beats vanilla.
        candidate: the best plan looked at, whether it paid or not.
        expected: its score under the objective; None where there was no text to judge by.
        check: its real decoding; None where skipped by an interrupt.
        result: the search behind it.
        refined: whether the plan went through refinement.
        judged: plans judged during refinement.
        seconds: wall time of it all.
        conclusion: one sentence.
    """

    plan: SkipPlan
    setting: Setting
    candidate: SkipPlan
    expected: Score | None
    check: Check | None
    result: SearchResult
    refined: bool
    judged: int
    seconds: float
    conclusion: str

    @property
    def interrupted(self) -> bool:
        return self.result.interrupted


Stage = Callable[[str], None]


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
    paper_setting: Setting,
    on_stage: Stage,
    on_better: Callable[[Score, int], None],
) -> Calibration:
    """Search, refine, check, decide.

    Args:
        strategy: the method.
        task: what it works on.
        held_out: prompts the search has not seen; where empty, the check decodes its first ones.
        refine: plans judged in refinement at the most; 0 keeps the strategy's own plan and
            ``paper_setting``, whatever they are worth.
        paper_setting: the strategy's own way of drafting.
        on_stage: told what begins.
        on_better: told about better plans during refinement.

    A KeyboardInterrupt at any stage ends the work with the best plan so far.
    """
    begin = time.perf_counter()
    result = strategy.search(task)
    plan, setting, judged = result.plan, paper_setting, 0
    expected: Score | None = None
    check: Check | None = None
    try:
        if result.interrupted:
            raise KeyboardInterrupt
        objective = Objective(task.decoder, task.costs, enough_samples(task, result.samples))
        if refine:
            on_stage("refining")
            expected, judged, interrupted = _refined(objective, result, refine, on_better)
            if expected is not None:
                expected = objective.modest(expected.plan)
                plan, setting = expected.plan, expected.setting
            if interrupted:
                raise KeyboardInterrupt
        else:
            expected = objective.score(plan)
        if not refine or (expected is not None and expected.speedup > 1):
            on_stage("checking by real decoding")
            check = check_by_decoding(task, plan, setting, held_out)
    except KeyboardInterrupt:
        result = replace(result, interrupted=True)
        if expected is None and refine:
            plan = _fastest_decoded(result)
    pays, conclusion = _conclude(plan, expected, check, result)
    keep = pays or not refine
    return Calibration(
        plan=plan if keep else SkipPlan(),
        setting=setting if keep else VANILLA,
        candidate=plan,
        expected=expected,
        check=check,
        result=result,
        refined=bool(refine) and expected is not None,
        judged=judged,
        seconds=time.perf_counter() - begin,
        conclusion=conclusion,
    )


def _fastest_decoded(result: SearchResult) -> SkipPlan:
    """The plan that decoded fastest during the search; the empty one where none beat vanilla."""
    paying = [t for t in result.trials if t.speedup is not None and t.speedup > 1]
    return max(paying, key=lambda t: t.speedup or 0.0).plan if paying else SkipPlan()


def enough_samples(task: Task, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Up to eight texts to judge plans by; vanilla decoding makes what the search did not."""
    texts = [s for s in samples if len(s.output) >= 16]
    known = {s.prompt for s in texts}
    for prompt in task.prompts:
        if len(texts) >= MOST_TEXTS:
            break
        if prompt not in known:
            generation = _generation(task, prompt, None, task.max_new_tokens)
            list(generation)
            texts.append(Sample(prompt, tuple(generation.output)))
    return tuple(texts[:MOST_TEXTS])


def _refined(
    objective: Objective,
    result: SearchResult,
    most_plans: int,
    on_better: Callable[[Score, int], None],
) -> tuple[Score | None, int, bool]:
    """(best score of a plan that skips something, plans judged, interrupted)."""
    refiner = Refiner(
        objective,
        single_sub_layers=len(objective.decoder.sub_layers) == 2,
        on_progress=on_better,
        most_plans=most_plans,
    )
    best: Score | None = None
    interrupted = False
    try:
        for plan in _starts(result):
            best = _better(best, objective.score(plan))
        if best is not None:
            best = _better(best, refiner.refine(best.plan))
    except KeyboardInterrupt:
        best, interrupted = _better(best, refiner.best), True
    return best, refiner.judged, interrupted


def _better(one: Score | None, other: Score | None) -> Score | None:
    """The better of two plans; plans that skip nothing don't count."""
    scores = [score for score in (one, other) if score is not None and score.plan]
    return max(scores, key=lambda score: score.speedup, default=None)


def _starts(result: SearchResult) -> list[SkipPlan]:
    """The strategy's own plan and the best others it decoded with."""
    decoded = [t for t in result.trials if t.speedup is not None]
    decoded.sort(key=lambda t: t.speedup or 0.0, reverse=True)
    plans = dict.fromkeys([result.plan, *(t.plan for t in decoded)])
    return list(plans)[:STARTS]


def check_by_decoding(
    task: Task, plan: SkipPlan, setting: Setting, held_out: Sequence[tuple[int, ...]]
) -> Check | None:
    """Decode prompts with the plan and vanilla, interleaved; None for an empty plan."""
    if not plan or setting.max_tokens == 0:
        return None
    prompts = tuple(held_out) or task.prompts[:MOST_CHECKED]
    drafter = SkipDrafter(task.decoder, plan, setting.max_tokens, setting.stop_probability)
    ratios, steps = [], list[Step]()
    limit = min(task.max_new_tokens, CHECK_TOKENS)
    for i, prompt in enumerate(prompts):
        arms: list[Drafter | None] = [None, drafter] if i % 2 else [drafter, None]
        speed = {}
        for arm in arms:
            decoded = list(_generation(task, prompt, arm, limit))[1:]
            seconds = sum(step.seconds for step in decoded)
            speed[arm is None] = sum(len(s.tokens) for s in decoded) / seconds if decoded else 0.0
            if arm is not None:
                steps += decoded
        if speed[True] > 0:
            ratios.append(speed[False] / speed[True])
    if not ratios:
        return None
    drafted, accepted = sum(s.drafted for s in steps), sum(s.accepted for s in steps)
    return Check(
        speedup=statistics.median(ratios),
        acceptance_rate=accepted / drafted if drafted else None,
        tokens_per_step=sum(len(s.tokens) for s in steps) / len(steps) if drafted else None,
        prompts=len(ratios),
        held_out=bool(held_out),
    )


def _generation(
    task: Task, prompt: tuple[int, ...], drafter: Drafter | None, tokens: int
) -> Generation:
    return Generation(
        task.decoder,
        prompt,
        max_new_tokens=tokens,
        drafter=drafter,
        end_tokens=task.end_tokens,
    )


def _conclude(
    plan: SkipPlan, expected: Score | None, check: Check | None, result: SearchResult
) -> tuple[bool, str]:
    """(whether the plan pays, one sentence why or why not)."""
    if check is not None:
        source = "held-out" if check.held_out else "calibration"
        figure = f"{check.speedup:.2f}× vanilla, measured on {check.prompts} {source} prompts"
        if check.speedup >= PAYS:
            return True, f"skipping {len(plan)} sub-layers decodes at {figure}"
        return False, f"no plan pays: the best one, skipping {len(plan)}, decodes at {figure}"
    if result.interrupted:
        if plan and (expected is None or expected.speedup > 1):
            return True, "interrupted: the best plan so far, not measured by decoding"
        return False, "interrupted before a plan was found that pays"
    if expected is None:
        return False, "no plan pays: there was no text to judge one by"
    return False, (
        "no plan pays: whatever is left out costs more in refused drafts than it saves "
        f"(the best one found is predicted at {expected.speedup:.2f}× vanilla)"
    )
