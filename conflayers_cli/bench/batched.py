"""Measuring with several prompts decoded at once: queues of them, vanilla and drafted by turns.

What is timed is a whole queue, since the rows of a batch share their passes: its tokens behind the
prompts by the seconds of all of its decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from conflayers_cli.bench.output_match import identities
from conflayers_cli.bench.runner import (
    ArmResult,
    BenchResult,
    CaseRuns,
    PeakByArm,
    Progress,
    Spread,
    largest_cache,
    rotated,
)
from conflayers_cli.bench.systems import Case, RowsArm, Run
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generate import Summary
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.progress import ProgressCallback

FULL_BATCHES = 3
"""Prompts of a queue at the least, in batches, where there are so many: then rows that end are
replaced two times out of three, as in a long run, and the thin end is a small part of the queue."""


def queues_of(cases: Sequence[Case], size: int) -> list[tuple[Case, ...]]:
    """The prompts, in order, in queues of equal length for batches of ``size``."""
    count = max(1, len(cases) // (FULL_BATCHES * size))
    bounds = [number * len(cases) // count for number in range(count + 1)]
    return [tuple(cases[bounds[i] : bounds[i + 1]]) for i in range(count)]


def measure_batches(
    arms: Sequence[RowsArm],
    cases: Sequence[Case],
    decoder: Decoder,
    sampling: SamplingParams,
    *,
    runs: int = 3,
    warmup: int = 1,
    on_progress: ProgressCallback | None = None,
) -> BenchResult:
    """Decode all prompts in every arm, several at once, several times, and compare.

    The arms take turns at each queue, and who begins changes from turn to turn.

    Args:
        arms: named, all of one size; one is ``vanilla`` and one ``speculative``.
        cases: at least one prompt.
        decoder: the model, for the scores where outputs part.
        sampling: how the arms choose tokens.
        runs, warmup: decodings of each prompt by each arm; decodings of a batch by each arm before
            them.
        on_progress: called with how far it is.
    """
    size = arms[0].size
    queues = queues_of(cases, size)
    memory = PeakByArm(decoder.device)
    progress = Progress(on_progress, (warmup + runs * len(queues)) * len(arms))
    for turn in range(warmup):
        for arm in arms:
            progress.step(f"warming up: {arm.name}")
            arm.run_all(queues[turn % len(queues)][:size])
    taken: list[dict[str, list[list[Run]]]] = [{arm.name: [] for arm in arms} for _ in queues]
    for turn in range(runs):
        for number, queue in enumerate(queues):
            for arm in rotated(arms, turn + number):
                progress.step(f"run {turn + 1} of {runs}, {_name(queue)}: {arm.name}")
                done = memory.run(arm.name, partial(arm.run_all, queue))
                taken[number][arm.name].append(done)
    names = [arm.name for arm in arms]
    alone = tuple(
        CaseRuns(case, {name: tuple(done[row] for done in by_arm[name]) for name in names})
        for queue, by_arm in zip(queues, taken, strict=True)
        for row, case in enumerate(queue)
    )
    together = tuple(
        CaseRuns(
            replace(queue[0], id=_name(queue), category=None),
            {name: tuple(map(_together, by_arm[name])) for name in names},
        )
        for queue, by_arm in zip(queues, taken, strict=True)
    )
    others = [name for name in names if name != "vanilla"]
    return BenchResult(
        cases=alone,
        arms={name: _arm_result(alone, together, name) for name in names},
        identical=identities(others, alone, decoder, sampling) if sampling.greedy else None,
        peak_memory=memory.peaks,
        cache_bytes=largest_cache(alone),
        queues=together,
        batch_size=size,
    )


def _name(queue: Sequence[Case]) -> str:
    if len(queue) == 1:
        return f"prompt {queue[0].id}"
    return f"prompts {queue[0].id} to {queue[-1].id}"


def _together(runs: Sequence[Run]) -> Run:
    """The runs of a queue's prompts, as one."""
    return Run((), Summary.total(run.stats for run in runs), runs[0].cache_bytes)


def _arm_result(alone: Sequence[CaseRuns], queues: Sequence[CaseRuns], arm: str) -> ArmResult:
    speeds = [run.stats.tokens_per_second for queue in queues for run in queue.runs[arm]]
    waits = [run.stats.prefill_seconds for case in alone for run in case.runs[arm]]
    return ArmResult(
        Spread.of([speed for speed in speeds if speed]),
        statistics.median(waits),
        Summary.total(queue.stats(arm) for queue in queues),
    )
