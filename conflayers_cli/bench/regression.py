"""A bench against an earlier one: what changed, whether that is a regression, and the gates.

Speeds are compared prompt by prompt, as ratios of new over old, so that what makes one prompt
quicker than another cancels out (see `utils.statistics.Change`). By default the speed-up over
vanilla is judged: vanilla ran by turns with it in the same process, so that a slower machine, or
one that is busy, cancels out, too. Tokens per second have no such partner.

**The rule.** A metric is a regression where new/old is under 1 − tolerance *and* its 95 % interval
lies below 1. Noise alone then fails a job less than one time in forty, whatever the tolerance; and
a drop beyond the tolerance is not excused by an interval that merely reaches up to it. What is
under the tolerance by an interval that includes 1 is "unclear": reported, and no failure. Counts
that come out the same in every run have no interval: under the tolerance is a regression.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from conflayers_cli.bench.comparison import ComparedMetric, Comparison, Verdict
from conflayers_cli.bench.metrics import TOLERANCE, RegressionMetric
from conflayers_cli.bench.schema import (
    SPECULATIVE,
    VANILLA,
    BenchContext,
    BenchDocument,
    PromptFigures,
    QueueFigures,
)
from conflayers_cli.errors import GateError, InputError
from conflayers_cli.utils.statistics import CONFIDENCE, MIN_RATIOS, Change
from conflayers_cli.utils.yaml import format_value

_SAME_WORK = ("max_new_tokens", "batch_size", "system", "raw", "quantize", "keep_quantized")
"""Settings that decide what is decoded; others decide how, which one may want to compare."""
_SAME_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MACHINE = ("processor", "gpu", "threads", "platform")
_SOFTWARE = ("conflayers", "torch", "transformers", "python")
_HOW = ("exact", "compile", "device_map", "merge_adapter")
_DRAFTING = ("skip", "draft", "ranges", "draft_by", "lookahead", "tree", "target_speedup")

Pair = tuple[PromptFigures, PromptFigures]
"""The same prompt in the new and in the old bench."""
Timed = Sequence[PromptFigures | QueueFigures]


def compare(
    new: BenchDocument,
    old: BenchDocument,
    name: str,
    *,
    tolerance: float = TOLERANCE,
    judged: Sequence[RegressionMetric] | None = None,
) -> Comparison:
    """Compare a bench with an earlier one of the same model and, at least in part, prompts.

    Args:
        new, old: the two.
        name: the old one's, for messages.
        tolerance: the share by which a metric may be lower, from 0 to under 1.
        judged: what a regression is judged by; None: the speed-up and, where drafts depend on
            nothing that is measured, acceptance.

    Raises:
        InputError: they are of different models, work or prompts, or tokens per second are to be
            judged on different machines.
    """
    check_comparable(old, name, new, [prompt.sha256 for prompt in new.prompts])
    repeatable = all(bench.settings.get("repeatable_drafts") is True for bench in (new, old))
    same_machine = not _differing(_machine(new), _machine(old))
    if judged is None:
        judged = [RegressionMetric.SPEEDUP, *([RegressionMetric.ACCEPTANCE] if repeatable else [])]
    if RegressionMetric.SPEED in judged and not same_machine:
        raise InputError(
            f"judge speed: {name} was measured on another machine, and tokens per second of two "
            "machines can't be compared",
            names=("judge speed",),
        )
    pairs = _paired(new, old)
    if new.queues or old.queues or len(pairs) == 1:
        ours: Timed = new.queues or [one for one, _ in pairs]
        theirs: Timed = old.queues or [other for _, other in pairs]
        speedup = Change.unpaired(new=_run_ratios(ours), old=_run_ratios(theirs))
        speed = Change.unpaired(new=_run_speeds(ours), old=_run_speeds(theirs))
    else:
        speedup, speed = _paired_change(pairs, _speedup), _paired_change(pairs, _median_speed)
    changes = {
        RegressionMetric.SPEEDUP: speedup,
        RegressionMetric.ACCEPTANCE: _acceptance(pairs, certain=repeatable),
        RegressionMetric.SPEED: speed,
    }
    metrics = tuple(
        ComparedMetric(
            metric=metric,
            change=change,
            verdict=find_verdict(
                change, tolerance, certain=repeatable and metric is RegressionMetric.ACCEPTANCE
            ),
            judged=metric in judged,
        )
        for metric, change in changes.items()
    )
    remarks = tuple(_remarks(new, old, len(pairs), metrics, repeatable))
    return Comparison(name, len(pairs), tolerance, metrics, remarks)


def check_comparable(
    old: BenchDocument, name: str, new: BenchContext, prompt_hashes: Sequence[str]
) -> None:
    """Refuse to compare what has nothing to do with an earlier bench.

    Args:
        old, name: the earlier one, and its name for messages.
        new: what the other one ran with.
        prompt_hashes: SHA-256 of the contents of its prompts.

    Raises:
        InputError: they are of different models, work or prompts.
    """
    if new.model_hash != old.model_hash:
        raise InputError(
            f"{name}: is of another model ({old.model}, configuration {old.model_hash}; this is "
            f"{new.model}, {new.model_hash})"
        )
    ours, theirs = _work(new.settings), _work(old.settings)
    if different := _differing(ours, theirs):
        changed = ", ".join(
            f"{k} {format_value(theirs[k])} (this: {format_value(ours[k])})" for k in different
        )
        raise InputError(f"{name}: was measured with other settings: {changed}")
    there = [prompt.sha256 for prompt in old.prompts]
    if not set(prompt_hashes) & set(there):
        raise InputError(f"{name}: was measured with other prompts, none of them is the same")
    if ours["batch_size"] != 1 and sorted(prompt_hashes) != sorted(there):
        raise InputError(f"{name}: was measured with other prompts, and they decode together")


def _work(settings: Mapping[str, Any]) -> dict[str, Any]:
    sampling = settings.get("sampling")
    known = {**settings, **(sampling if isinstance(sampling, dict) else {})}
    return {key: known.get(key) for key in (*_SAME_WORK, *_SAME_SAMPLING)}


def _machine(bench: BenchDocument) -> dict[str, Any]:
    known = {key: bench.environment.get(key) for key in _MACHINE}
    return {"device": bench.device, "dtype": bench.dtype, **known}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in one if one[key] != other[key]]


def _paired(new: BenchDocument, old: BenchDocument) -> list[Pair]:
    """The prompts that both have, by their content; the n-th of equal ones with the n-th."""
    there = _keyed(old.prompts)
    return [(prompt, there[key]) for key, prompt in _keyed(new.prompts).items() if key in there]


def _keyed(prompts: Sequence[PromptFigures]) -> dict[tuple[str, int], PromptFigures]:
    seen: Counter[str] = Counter()
    found = {}
    for prompt in prompts:
        found[prompt.sha256, seen[prompt.sha256]] = prompt
        seen[prompt.sha256] += 1
    return found


def _median_speed(prompt: PromptFigures, system: str = SPECULATIVE) -> float | None:
    """Tokens per second of the runs."""
    speeds = [speed for speed in prompt.tokens_per_second.get(system, ()) if speed]
    return statistics.median(speeds) if speeds else None


def _speedup(prompt: PromptFigures) -> float | None:
    ours, theirs = _median_speed(prompt), _median_speed(prompt, VANILLA)
    return ours / theirs if ours and theirs else None


def _paired_change(
    pairs: Sequence[Pair], figure: Callable[[PromptFigures], float | None]
) -> Change:
    figures = [(figure(one), figure(other)) for one, other in pairs]
    both = [(one, other) for one, other in figures if one and other]
    return Change.paired([one for one, _ in both], [other for _, other in both])


def _run_speeds(timed: Timed) -> list[float]:
    """Tokens per second of single runs."""
    speeds = (each.tokens_per_second.get(SPECULATIVE, ()) for each in timed)
    return [speed for of_one in speeds for speed in of_one if speed]


def _run_ratios(timed: Timed) -> list[float]:
    """Speed-ups of single runs over vanilla's that took place beside them."""
    speeds = (
        [each.tokens_per_second.get(system, ()) for system in (SPECULATIVE, VANILLA)]
        for each in timed
    )
    runs = (run for of_one in speeds for run in zip(*of_one, strict=False))
    return [ours / theirs for ours, theirs in runs if ours and theirs]


def _acceptance(pairs: Sequence[Pair], *, certain: bool) -> Change:
    """Of all drafts together; its interval, where there is one, by a bootstrap over prompts."""
    counts = np.array(
        [(n.accepted, n.drafted, o.accepted, o.drafted) for n, o in pairs], dtype=np.float64
    )
    accepted, drafted, accepted_before, drafted_before = counts.sum(axis=0)
    new = float(accepted / drafted) if drafted else None
    old = float(accepted_before / drafted_before) if drafted_before else None
    if new is None or not old:
        return Change(old, new, None)
    if certain or len(pairs) < MIN_RATIOS:
        return Change(old, new, new / old)
    found = scipy.stats.bootstrap(
        tuple(counts.T),
        _ratio_of_rates,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(0),
    ).confidence_interval
    if not np.isfinite([found.low, found.high]).all():  # a draw drafted nothing
        return Change(old, new, new / old)
    return Change(old, new, new / old, float(found.low), float(found.high))


def _ratio_of_rates(new: Any, drafted: Any, old: Any, drafted_before: Any, axis: int) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (new.sum(axis) / drafted.sum(axis)) / (old.sum(axis) / drafted_before.sum(axis))


def find_verdict(change: Change, tolerance: float, *, certain: bool) -> Verdict:
    """By the rule of this module.

    Args:
        change: new over old.
        tolerance: the share by which new may be lower.
        certain: the figure comes out the same in every run.
    """
    if change.ratio is None:
        return "unknown"
    if change.ratio >= 1 - tolerance:
        return "held"
    if certain or (change.high is not None and change.high < 1):
        return "regression"
    return "unclear"


def _remarks(
    new: BenchDocument,
    old: BenchDocument,
    pairs: int,
    metrics: Sequence[ComparedMetric],
    repeatable: bool,
) -> Iterable[str]:
    if new.model != old.model:
        yield f"the model's name was {old.model}; by its configuration it is the same"
    if pairs < max(len(new.prompts), len(old.prompts)):
        yield (
            f"{pairs} prompts are the same; {len(new.prompts) - pairs} new and "
            f"{len(old.prompts) - pairs} old ones are left out"
        )
    ours, theirs = _machine(new), _machine(old)
    if different := _differing(ours, theirs):
        changed = ", ".join(
            f"{k} {format_value(theirs[k])} → {format_value(ours[k])}" for k in different
        )
        yield f"measured elsewhere: {changed}; tokens/s can't be compared, speed-ups with caution"
    for keys, where in ((_SOFTWARE, "environment"), (_HOW, "settings"), (_DRAFTING, "settings")):
        parts = [{key: getattr(b, where).get(key) for key in keys} for b in (new, old)]
        if different := _differing(*parts):
            yield f"not the same: {', '.join(different)}"
    if not repeatable:
        yield "how much is drafted depends on measured times, so acceptance varies from run to run"
    for compared in (each for each in metrics if each.judged):
        if compared.verdict == "unclear":
            yield (
                f"{compared.metric.label}: lower than tolerated, but that may be noise; more "
                "prompts or --runs would tell"
            )
        certain = repeatable and compared.metric is RegressionMetric.ACCEPTANCE
        if compared.change.ratio is not None and compared.change.low is None and not certain:
            yield f"{compared.metric.label}: too few prompts and runs to tell any change from noise"


def broken_gates(
    bench: BenchDocument, fail_under: float | None, comparison: Comparison | None
) -> list[GateError]:
    """What does not hold; empty where all does.

    Args:
        bench: the results.
        fail_under: the least speed-up over vanilla; None: any.
        comparison: with an earlier bench, if there is one.
    """
    broken = []
    if fail_under is not None:
        speedup, problem = bench.speedup.median, None
        if speedup is None:
            problem = "could not be measured: no output is longer than one token"
        elif not speedup >= fail_under:
            problem = f"is {speedup:.3f}, under {fail_under:g}"
        if problem:
            message = f"fail_under: the speed-up {problem}"
            broken.append(GateError(message, names=("fail_under",)))
    for message in comparison.regressions if comparison else ():
        broken.append(GateError(f"compare: {message}", names=("compare:",)))
    # In half precision a GPU's rounding may part outputs at a near-tie; that is reported only.
    match = bench.identical_outputs
    exact = bench.dtype == "float32" and bench.engine.get("exact_to_the_bit") is True
    if match and match.divergences and exact:
        parted = ", ".join(divergence.id for divergence in match.divergences[:5])
        broken.append(
            GateError(
                f"outputs in float32 differ from vanilla's at {len(match.divergences)} "
                f"of {match.total} prompts ({parted})"
            )
        )
    return broken
