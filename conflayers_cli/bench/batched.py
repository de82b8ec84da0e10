"""Measuring with several prompts decoded at once: queues of them, the systems by turns.

What is timed is a whole queue, since the sequences of a batch share their passes: its tokens behind
the prefills by the seconds of all of its decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from conflayers_cli.bench.output_match import match_outputs
from conflayers_cli.bench.runner import (
    BenchResult,
    PeakBySystem,
    SystemResult,
    largest_cache,
    take_turns,
)
from conflayers_cli.bench.schema import VANILLA
from conflayers_cli.bench.systems import BatchedSystem, BenchPrompt, PromptRuns, Run
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.progress import ProgressCallback
from conflayers_cli.utils.statistics import Spread

MIN_BATCHES = 3
"""Prompts of a queue at the least, in batches, where there are so many: then sequences that end are
replaced two times out of three, as in a long run, and the thin end is a small part of the queue."""

Queue = tuple[BenchPrompt, ...]


def split_queues(prompts: Sequence[BenchPrompt], size: int) -> list[Queue]:
    """The prompts, in order, in queues of equal length for batches of ``size``."""
    count = max(1, len(prompts) // (MIN_BATCHES * size))
    bounds = [number * len(prompts) // count for number in range(count + 1)]
    return [tuple(prompts[bounds[i] : bounds[i + 1]]) for i in range(count)]


def measure_batches(
    systems: Sequence[BatchedSystem],
    prompts: Sequence[BenchPrompt],
    decoder: Decoder,
    sampling: SamplingParams,
    *,
    runs: int = 3,
    warmup: int = 1,
    on_progress: ProgressCallback | None = None,
) -> BenchResult:
    """Decode all prompts in every system, several at once, several times, and compare.

    Args:
        systems: all of one size.
        warmup: decodings of one batch by each system before the runs.
        prompts, decoder, sampling, runs, on_progress: as in `runner.measure`.
    """
    size = systems[0].size
    queues = split_queues(prompts, size)
    memory = PeakBySystem(decoder.device)

    def decode(system: BatchedSystem, queue: Queue) -> list[Run]:
        return memory.watch(system.name, lambda: system.run_all(queue))

    taken = take_turns(
        systems,
        queues,
        lambda system, queue: system.run_all(queue[:size]),
        decode,
        runs=runs,
        warmup=warmup,
        label=_label,
        on_progress=on_progress,
    )
    names = [system.name for system in systems]
    alone = tuple(
        PromptRuns(prompt, {name: tuple(done[i] for done in by_system[name]) for name in names})
        for queue, by_system in zip(queues, taken, strict=True)
        for i, prompt in enumerate(queue)
    )
    together = tuple(
        PromptRuns(
            replace(queue[0], id=_label(queue), category=None),
            {name: tuple(map(_merge, by_system[name])) for name in names},
        )
        for queue, by_system in zip(queues, taken, strict=True)
    )
    others = [name for name in names if name != VANILLA]
    return BenchResult(
        prompts=alone,
        systems={name: _system_result(alone, together, name) for name in names},
        matches=match_outputs(others, alone, decoder, sampling) if sampling.greedy else None,
        peak_memory=memory.peaks,
        cache_bytes=largest_cache(alone),
        queues=together,
        batch_size=size,
    )


def _label(queue: Queue) -> str:
    if len(queue) == 1:
        return f"prompt {queue[0].id}"
    return f"prompts {queue[0].id} to {queue[-1].id}"


def _merge(runs: Sequence[Run]) -> Run:
    """The runs of a queue's prompts, as one."""
    return Run((), GenerationStats.total(run.stats for run in runs), runs[0].cache_bytes)


def _system_result(
    alone: Sequence[PromptRuns], queues: Sequence[PromptRuns], system: str
) -> SystemResult:
    speeds = [run.stats.tokens_per_second for queue in queues for run in queue.runs[system]]
    waits = [run.stats.prefill_seconds for prompt in alone for run in prompt.runs[system]]
    return SystemResult(
        Spread.of([speed for speed in speeds if speed]),
        statistics.median(waits),
        GenerationStats.total(queue.first_stats(system) for queue in queues),
    )
