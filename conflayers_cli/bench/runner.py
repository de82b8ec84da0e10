"""Measuring speculative decoding against vanilla: the same prompts, interleaved in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from conflayers_cli.bench.agreement import Agreement
from conflayers_cli.bench.output_match import Identity, identities
from conflayers_cli.bench.systems import SKIP_ONLY, Arm, Case, Run
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generate import Summary
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.memory import PeakMemory
from conflayers_cli.utils.progress import ProgressCallback
from conflayers_cli.utils.statistics import Interval as Interval
from conflayers_cli.utils.statistics import Spread as Spread

AnyArm = TypeVar("AnyArm")


@dataclass(frozen=True)
class CaseRuns:
    """All runs of one prompt, by arm, in order; run i of one arm is next to run i of another."""

    case: Case
    runs: Mapping[str, tuple[Run, ...]]

    def speed(self, arm: str) -> float | None:
        """Median tokens per second over the runs."""
        speeds = [speed for run in self.runs[arm] if (speed := run.stats.tokens_per_second)]
        return statistics.median(speeds) if speeds else None

    def stats(self, arm: str) -> Summary:
        """Of the first run. (Vanilla's counts are the same in every one; who drafts may learn.)"""
        return self.runs[arm][0].stats


@dataclass(frozen=True)
class ArmResult:
    """One arm's figures.

    Attributes:
        tokens_per_second: of decoding, without the prefill: per prompt the median of its runs;
            here the spread over the prompts.
        time_to_first_token: seconds, the median over all runs.
        stats: of one run over all prompts.
    """

    tokens_per_second: Spread
    time_to_first_token: float
    stats: Summary

    @classmethod
    def of(cls, cases: Sequence[CaseRuns], arm: str) -> ArmResult:
        """Of the runs of some prompts."""
        waits = [run.stats.prefill_seconds for case in cases for run in case.runs[arm]]
        return cls(
            Spread.of([speed for case in cases if (speed := case.speed(arm))]),
            statistics.median(waits),
            Summary.total(case.stats(arm) for case in cases),
        )


@dataclass(frozen=True)
class BenchResult:
    """What a bench measured.

    Attributes:
        identical: outputs compared with vanilla's, for every arm that should give the same; None
            when sampling.
        peak_memory: the most memory over the model's weights, in bytes, by arm; empty where
            nothing tells.
        cache_bytes: of the largest cache of keys and values.
        agreement: of the lossy arm's outputs with vanilla's; None without one, or when sampling.
        queues: where prompts are decoded together, the runs of each queue as if it were a prompt:
            they are what speeds are measured of. Empty: each prompt is decoded alone.
        batch_size: prompts decoded at once.
    """

    cases: tuple[CaseRuns, ...]
    arms: Mapping[str, ArmResult]
    identical: Mapping[str, Identity] | None
    peak_memory: Mapping[str, int]
    cache_bytes: int
    agreement: Agreement | None = None
    queues: tuple[CaseRuns, ...] = ()
    batch_size: int = 1

    def speedup(
        self, over: str = "vanilla", category: str | None = None, *, arm: str = "speculative"
    ) -> Interval:
        """One arm over another, per prompt the ratio of the medians.

        With one prompt its single runs are the pairs; where prompts are decoded together, all runs
        of the queues.
        """
        cases = self.of_category(category) if category is not None else self.cases
        if self.queues or len(cases) == 1:
            return Interval.of(run_ratios(self.queues or cases, arm, over))
        ratios = [
            ours / theirs
            for case in cases
            if (ours := case.speed(arm)) and (theirs := case.speed(over))
        ]
        return Interval.of(ratios)

    @property
    def categories(self) -> tuple[str, ...]:
        """The prompts' categories, in the order of their first appearance; none where prompts are
        decoded together: a queue's speed is not one category's.
        """
        if self.queues:
            return ()
        return tuple(dict.fromkeys(c.case.category for c in self.cases if c.case.category))

    def of_category(self, category: str) -> tuple[CaseRuns, ...]:
        """The prompts of one category."""
        return tuple(case for case in self.cases if case.case.category == category)


def measure(
    arms: Sequence[Arm],
    cases: Sequence[Case],
    decoder: Decoder,
    sampling: SamplingParams,
    *,
    runs: int = 3,
    warmup: int = 1,
    on_progress: ProgressCallback | None = None,
) -> BenchResult:
    """Decode every prompt in every arm, several times, and compare.

    The arms take turns at each prompt, and who begins changes from turn to turn, so that whatever
    slows the machine for a while slows all alike.

    Args:
        arms: named; one is ``vanilla`` and one ``speculative``.
        cases: at least one prompt.
        decoder: the model, for the scores where outputs part.
        sampling: how the arms choose tokens.
        runs, warmup: decodings of each prompt by each arm; decodings by each arm before them.
        on_progress: called with how far it is.
    """
    memory = PeakByArm(decoder.device)

    def run(arm: Arm, case: Case) -> Run:
        return memory.run(arm.name, lambda: [arm.run(case)])[0]

    progress = Progress(on_progress, (warmup + runs * len(cases)) * len(arms))
    for turn in range(warmup):
        for arm in arms:
            progress.step(f"warming up: {arm.name}")
            run(arm, cases[turn % len(cases)])
    taken: list[dict[str, list[Run]]] = [{arm.name: [] for arm in arms} for _ in cases]
    for turn in range(runs):
        for number, case in enumerate(cases):
            for arm in rotated(arms, turn + number):
                progress.step(f"run {turn + 1} of {runs}, prompt {case.id}: {arm.name}")
                taken[number][arm.name].append(run(arm, case))
    results = tuple(
        CaseRuns(case, {name: tuple(done) for name, done in by_arm.items()})
        for case, by_arm in zip(cases, taken, strict=True)
    )
    exact = [arm.name for arm in arms if arm.name not in ("vanilla", SKIP_ONLY)]
    return BenchResult(
        cases=results,
        arms={arm.name: ArmResult.of(results, arm.name) for arm in arms},
        identical=identities(exact, results, decoder, sampling) if sampling.greedy else None,
        peak_memory=memory.peaks,
        cache_bytes=largest_cache(results),
        agreement=_agreement(arms, results) if sampling.greedy else None,
    )


class PeakByArm:
    """Runs arms and notes the most memory each has taken."""

    def __init__(self, device: torch.device) -> None:
        self._memory = PeakMemory(device)
        self.peaks: dict[str, int] = {}

    def run(self, arm: str, work: Callable[[], list[Run]]) -> list[Run]:
        """What the work gives, done and watched."""
        self._memory.begin()
        done = work()
        if (peak := self._memory.peak()) is not None:
            peak -= max(run.weights_twice_bytes for run in done)
            self.peaks[arm] = max(peak, self.peaks.get(arm, 0))
        return done


class Progress:
    """Counts what is begun."""

    def __init__(self, on_progress: ProgressCallback | None, total: int) -> None:
        self._on_progress, self._total, self._begun = on_progress, total, 0

    def step(self, message: str) -> None:
        if self._on_progress:
            self._on_progress(message, self._begun / self._total)
        self._begun += 1


def rotated(arms: Sequence[AnyArm], turn: int) -> list[AnyArm]:
    """The arms in their order, begun with another one every turn."""
    first = turn % len(arms)
    return [*arms[first:], *arms[:first]]


def run_ratios(cases: Sequence[CaseRuns], arm: str, over: str = "vanilla") -> list[float]:
    """Speeds of one arm over another, of runs that took place one behind the other."""
    return [
        ours / theirs
        for case in cases
        for one, other in zip(case.runs[arm], case.runs[over], strict=True)
        if (ours := one.stats.tokens_per_second) and (theirs := other.stats.tokens_per_second)
    ]


def _agreement(arms: Sequence[Arm], cases: Sequence[CaseRuns]) -> Agreement | None:
    """Of the lossy arm, if there is one, with vanilla: first runs, greedy ones are all alike."""
    if SKIP_ONLY not in [arm.name for arm in arms]:
        return None
    return Agreement.of(
        [(case.runs["vanilla"][0].tokens, case.runs[SKIP_ONLY][0].tokens) for case in cases]
    )


def largest_cache(cases: Sequence[CaseRuns]) -> int:
    """Bytes of keys and values at the most."""
    runs = (run for case in cases for done in case.runs.values() for run in done)
    return max((run.cache_bytes or 0 for run in runs), default=0)
