"""Measuring speculative decoding against vanilla: the same prompts, interleaved in one process."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from conflayers_cli.bench.agreement import measure_agreement
from conflayers_cli.bench.output_match import match_outputs
from conflayers_cli.bench.schema import SKIP_ONLY, SPECULATIVE, VANILLA, Agreement, OutputMatch
from conflayers_cli.bench.systems import BenchPrompt, PromptRuns, Run, System
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.memory import PeakMemory
from conflayers_cli.utils.progress import ProgressCallback
from conflayers_cli.utils.statistics import Interval, Spread


class Named(Protocol):
    """What has a system's name."""

    @property
    def name(self) -> str: ...


AnySystem = TypeVar("AnySystem", bound=Named)
Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SystemResult:
    """One system's figures.

    Attributes:
        tokens_per_second: of decoding, without the prefill: per prompt the median of its runs;
            here the spread over the prompts.
        time_to_first_token: seconds, the median over all runs.
        stats: of one run over all prompts.
    """

    tokens_per_second: Spread
    time_to_first_token: float
    stats: GenerationStats

    @classmethod
    def of(cls, prompts: Sequence[PromptRuns], system: str) -> SystemResult:
        """Of the runs of some prompts."""
        waits = [run.stats.prefill_seconds for prompt in prompts for run in prompt.runs[system]]
        return cls(
            Spread.of([speed for prompt in prompts if (speed := prompt.speed(system))]),
            statistics.median(waits),
            GenerationStats.total(prompt.first_stats(system) for prompt in prompts),
        )


@dataclass(frozen=True)
class BenchResult:
    """What a bench measured.

    Attributes:
        prompts: all runs of every prompt.
        systems: figures by system.
        matches: outputs compared with vanilla's, for every system that should give the same; None
            when sampling.
        peak_memory: the most memory over the model's weights, in bytes, by system; empty where it
            can't be read.
        cache_bytes: of the largest KV cache.
        agreement: of the lossy system's outputs with vanilla's; None without one, or when
            sampling.
        queues: where prompts are decoded together, the runs of each queue as if it were a prompt:
            they are what speeds are measured of. Empty: each prompt is decoded alone.
        batch_size: prompts decoded at once.
    """

    prompts: tuple[PromptRuns, ...]
    systems: Mapping[str, SystemResult]
    matches: Mapping[str, OutputMatch] | None
    peak_memory: Mapping[str, int]
    cache_bytes: int
    agreement: Agreement | None = None
    queues: tuple[PromptRuns, ...] = ()
    batch_size: int = 1

    def speedup(
        self, over: str = VANILLA, category: str | None = None, *, system: str = SPECULATIVE
    ) -> Interval:
        """One system over another, per prompt the ratio of the medians.

        With one prompt its single runs are the pairs; where prompts are decoded together, all runs
        of the queues.
        """
        prompts = self.of_category(category) if category is not None else self.prompts
        if self.queues or len(prompts) == 1:
            return Interval.of(run_ratios(self.queues or prompts, system, over))
        ratios = [
            ours / theirs
            for prompt in prompts
            if (ours := prompt.speed(system)) and (theirs := prompt.speed(over))
        ]
        return Interval.of(ratios)

    @property
    def categories(self) -> tuple[str, ...]:
        """The prompts' categories, in the order of their first appearance; none where prompts are
        decoded together: a queue's speed is not one category's.
        """
        if self.queues:
            return ()
        return tuple(dict.fromkeys(p.prompt.category for p in self.prompts if p.prompt.category))

    def of_category(self, category: str) -> tuple[PromptRuns, ...]:
        """The prompts of one category."""
        return tuple(prompt for prompt in self.prompts if prompt.prompt.category == category)


def measure(
    systems: Sequence[System],
    prompts: Sequence[BenchPrompt],
    decoder: Decoder,
    sampling: SamplingParams,
    *,
    runs: int = 3,
    warmup: int = 1,
    on_progress: ProgressCallback | None = None,
) -> BenchResult:
    """Decode every prompt in every system, several times, and compare.

    The systems take turns at each prompt, and who begins changes from turn to turn, so that
    whatever slows the machine for a while slows all alike.

    Args:
        systems: one is named ``vanilla`` and one ``speculative``.
        prompts: at least one.
        decoder: the model, for the logits where outputs part.
        sampling: how the systems choose tokens.
        runs, warmup: decodings of each prompt by each system; decodings by each system before them.
        on_progress: called before every decoding.
    """
    memory = PeakBySystem(decoder.device)

    def decode(system: System, prompt: BenchPrompt) -> Run:
        return memory.watch(system.name, lambda: [system.run(prompt)])[0]

    taken = take_turns(
        systems,
        prompts,
        decode,
        decode,
        runs=runs,
        warmup=warmup,
        label=lambda prompt: f"prompt {prompt.id}",
        on_progress=on_progress,
    )
    results = tuple(
        PromptRuns(prompt, {name: tuple(done) for name, done in by_system.items()})
        for prompt, by_system in zip(prompts, taken, strict=True)
    )
    lossless = [system.name for system in systems if system.name not in (VANILLA, SKIP_ONLY)]
    greedy = sampling.greedy
    return BenchResult(
        prompts=results,
        systems={system.name: SystemResult.of(results, system.name) for system in systems},
        matches=match_outputs(lossless, results, decoder, sampling) if greedy else None,
        peak_memory=memory.peaks,
        cache_bytes=largest_cache(results),
        agreement=_skip_only_agreement(systems, results) if greedy else None,
    )


class PeakBySystem:
    """The most memory over the model's weights, in bytes, that each system has taken."""

    def __init__(self, device: torch.device) -> None:
        self._memory = PeakMemory(device)
        self.peaks: dict[str, int] = {}

    def watch(self, system: str, decode: Callable[[], list[Run]]) -> list[Run]:
        """The runs that ``decode`` gives, their peak counted as the system's."""
        self._memory.begin()
        done = decode()
        if (peak := self._memory.peak()) is not None:
            peak -= max(run.weights_twice_bytes for run in done)
            self.peaks[system] = max(peak, self.peaks.get(system, 0))
        return done


def take_turns(
    systems: Sequence[AnySystem],
    items: Sequence[Work],
    warm_up: Callable[[AnySystem, Work], object],
    decode: Callable[[AnySystem, Work], Result],
    *,
    runs: int,
    warmup: int,
    label: Callable[[Work], str],
    on_progress: ProgressCallback | None,
) -> list[dict[str, list[Result]]]:
    """Warm up, then decode every item in every system ``runs`` times, the systems by turns.

    Returns:
        For each item, its results by system, in the order of the runs.
    """
    total, begun = (warmup + runs * len(items)) * len(systems), itertools.count()

    def begin(message: str) -> None:
        if on_progress:
            on_progress(message, next(begun) / total)

    for turn in range(warmup):
        for system in systems:
            begin(f"warming up: {system.name}")
            warm_up(system, items[turn % len(items)])
    taken: list[dict[str, list[Result]]] = [{each.name: [] for each in systems} for _ in items]
    for turn in range(runs):
        for number, item in enumerate(items):
            for system in rotated(systems, turn + number):
                begin(f"run {turn + 1} of {runs}, {label(item)}: {system.name}")
                taken[number][system.name].append(decode(system, item))
    return taken


def rotated(items: Sequence[Work], turn: int) -> list[Work]:
    """The items in their order, begun with another one every turn."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def run_ratios(prompts: Sequence[PromptRuns], system: str, over: str = VANILLA) -> list[float]:
    """Speeds of one system over another, of runs that took place one after the other."""
    return [
        ours / theirs
        for prompt in prompts
        for one, other in zip(prompt.runs[system], prompt.runs[over], strict=True)
        if (ours := one.stats.tokens_per_second) and (theirs := other.stats.tokens_per_second)
    ]


def _skip_only_agreement(
    systems: Sequence[System], prompts: Sequence[PromptRuns]
) -> Agreement | None:
    """Of the lossy system, if there is one, with vanilla: first runs, greedy ones are all alike."""
    if SKIP_ONLY not in [system.name for system in systems]:
        return None
    return measure_agreement(
        [(prompt.runs[VANILLA][0].tokens, prompt.runs[SKIP_ONLY][0].tokens) for prompt in prompts]
    )


def largest_cache(prompts: Sequence[PromptRuns]) -> int:
    """Bytes of the largest KV cache; 0 where none is known."""
    runs = (run for prompt in prompts for done in prompt.runs.values() for run in done)
    return max((run.cache_bytes or 0 for run in runs), default=0)
