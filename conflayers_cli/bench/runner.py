"""Measuring speculative decoding against vanilla: the same prompts, interleaved in one process."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from conflayers_cli.bench.agreement import measure_agreement
from conflayers_cli.bench.hf_baselines import HF_BASELINES
from conflayers_cli.bench.output_match import match_outputs
from conflayers_cli.bench.schema import SKIP_ONLY, SPECULATIVE, VANILLA, Agreement, OutputMatch
from conflayers_cli.bench.systems import BenchPrompt, PromptRuns, Run, System
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.memory import PeakMemory
from conflayers_cli.utils.progress import ProgressCallback, no_progress
from conflayers_cli.utils.statistics import Interval, Spread

MIN_BATCHES = 3
"""Prompts of a queue, in batches, where there are so many: then sequences that end are replaced two
times out of three, as in a long run, and the thin end is a small part of the queue."""

Item = TypeVar("Item")
Queue = tuple[BenchPrompt, ...]


@dataclass(frozen=True)
class SystemResult:
    """One system's figures.

    Attributes:
        tokens_per_second: of decoding, without the prefill: the spread over the prompts' medians,
            or over all runs of queues of prompts decoded together.
        time_to_first_token: seconds, the median over all runs.
        stats: of one run over all prompts.
    """

    tokens_per_second: Spread
    time_to_first_token: float
    stats: GenerationStats

    @classmethod
    def of(
        cls, prompts: Sequence[PromptRuns], system: str, queues: Sequence[PromptRuns] = ()
    ) -> SystemResult:
        """Of the runs of some prompts, and of the queues that they were decoded in."""
        if queues:
            speeds = [run.stats.tokens_per_second for queue in queues for run in queue.runs[system]]
        else:
            speeds = [prompt.speed(system) for prompt in prompts]
        waits = [run.stats.prefill_seconds for prompt in prompts for run in prompt.runs[system]]
        return cls(
            Spread.of([speed for speed in speeds if speed]),
            statistics.median(waits),
            GenerationStats.total(prompt.first_stats(system) for prompt in prompts),
        )


@dataclass(frozen=True)
class BenchResult:
    """What a bench measured.

    Attributes:
        prompts: all runs of every prompt.
        systems: figures by system.
        matches: outputs compared with vanilla's, for every system that should give the same.
        peak_memory: the most memory over the model's weights, in bytes, by system; empty where it
            can't be read.
        cache_bytes: of the largest KV cache.
        agreement: of the lossy system's outputs with vanilla's; None without one.
        queues: where prompts are decoded together, the runs of each queue as if it were a prompt:
            they are what speeds are measured of. Empty: each prompt is decoded alone.
        batch_size: prompts decoded at once.
    """

    prompts: tuple[PromptRuns, ...]
    systems: Mapping[str, SystemResult]
    matches: Mapping[str, OutputMatch]
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
        """The prompts' categories by first appearance; none of queues, which mix them."""
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
    batch_size: int = 1,
    runs: int = 3,
    warmup: int = 1,
    on_progress: ProgressCallback = no_progress,
) -> BenchResult:
    """Decode all prompts in every system, several times, and compare.

    The systems take turns at each prompt, and who begins changes from turn to turn, so that
    whatever slows the machine for a while slows all alike. Prompts that are decoded together share
    their passes: there the turns, and what is timed, are whole queues of prompts.

    Args:
        systems: one is named ``vanilla`` and one ``speculative``.
        prompts: at least one.
        decoder: the model, for the logits where outputs part.
        sampling: how the systems choose tokens.
        batch_size: prompts that every system decodes at once.
        runs, warmup: decodings of each prompt by each system; of one batch, before them.
        on_progress: called before every decoding.
    """
    queues = split_queues(prompts, batch_size)
    memory, peaks = PeakMemory(decoder.device), dict[str, int]()
    total, begun = (warmup + runs * len(queues)) * len(systems), itertools.count()

    def decode(system: System, queue: Queue, doing: str) -> list[Run]:
        on_progress(f"{doing}: {system.name}", next(begun) / total)
        memory.begin()
        done = system.run(queue)
        if (peak := memory.peak()) is not None:
            peak -= max(run.weights_twice_bytes for run in done)
            peaks[system.name] = max(peak, peaks.get(system.name, 0))
        return done

    for turn in range(warmup):
        for system in systems:
            decode(system, queues[turn % len(queues)][:batch_size], "warming up")
    taken: list[dict[str, list[list[Run]]]] = [{each.name: [] for each in systems} for _ in queues]
    for turn in range(runs):
        for number, queue in enumerate(queues):
            for system in rotated(systems, turn + number):
                doing = f"run {turn + 1} of {runs}, {_queue_label(queue)}"
                taken[number][system.name].append(decode(system, queue, doing))
    alone = tuple(
        PromptRuns(prompt, {name: tuple(run[i] for run in of) for name, of in by_system.items()})
        for queue, by_system in zip(queues, taken, strict=True)
        for i, prompt in enumerate(queue)
    )
    together = () if batch_size == 1 else tuple(map(_merge_prompts, queues, taken))
    names = [system.name for system in systems]
    lossless = [name for name in names if name not in (VANILLA, SKIP_ONLY)]
    if not sampling.greedy:  # transformers samples with random numbers of its own
        lossless = [name for name in lossless if name not in HF_BASELINES]
    return BenchResult(
        prompts=alone,
        systems={name: SystemResult.of(alone, name, together) for name in names},
        matches=match_outputs(lossless, alone, decoder, sampling),
        peak_memory=peaks,
        cache_bytes=max(
            run.cache_bytes or 0 for each in alone for of in each.runs.values() for run in of
        ),
        agreement=_agreement(alone) if SKIP_ONLY in names else None,
        queues=together,
        batch_size=batch_size,
    )


def split_queues(prompts: Sequence[BenchPrompt], batch_size: int) -> list[Queue]:
    """The prompts, in order, in queues of equal length for batches of ``batch_size``."""
    count = len(prompts)
    if batch_size > 1:
        count = max(1, count // (MIN_BATCHES * batch_size))
    bounds = [number * len(prompts) // count for number in range(count + 1)]
    return [tuple(prompts[begin:end]) for begin, end in itertools.pairwise(bounds)]


def _queue_label(queue: Queue) -> str:
    if len(queue) == 1:
        return f"prompt {queue[0].id}"
    return f"prompts {queue[0].id} to {queue[-1].id}"


def _merge_prompts(queue: Queue, by_system: Mapping[str, Sequence[Sequence[Run]]]) -> PromptRuns:
    """The runs of a queue as if it were one prompt."""
    merged = {
        name: tuple(
            Run((), GenerationStats.total(each.stats for each in run), run[0].cache_bytes)
            for run in of_system
        )
        for name, of_system in by_system.items()
    }
    return PromptRuns(replace(queue[0], id=_queue_label(queue), category=None), merged)


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
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


def _agreement(prompts: Sequence[PromptRuns]) -> Agreement:
    """Of the lossy system with vanilla: of their first runs, since they are all alike."""
    first = [{name: runs[0].tokens for name, runs in prompt.runs.items()} for prompt in prompts]
    return measure_agreement([(tokens[VANILLA], tokens[SKIP_ONLY]) for tokens in first])
