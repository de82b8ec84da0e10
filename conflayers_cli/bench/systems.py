"""The systems that a bench compares. Each decodes prompts and says what that took.

Those of transformers are in :mod:`.hf_baselines`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from conflayers_cli.bench.schema import SKIP_ONLY
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt to decode.

    Attributes:
        id: its name.
        category: what kind of prompt it is, if it says so.
        tokens: the prompt's token ids.
        max_new_tokens: the most tokens produced.
        seed: of the random numbers; the same in every system.
    """

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One decoding of a prompt by one system.

    Attributes:
        tokens: the output's token ids.
        stats: counts and seconds.
        cache_bytes: memory of the KV cache; None where it is not known.
        weights_twice_bytes: memory of weights that were held twice meanwhile, only so that systems
            can be compared in one process: not what the system takes by itself.
    """

    tokens: tuple[int, ...]
    stats: GenerationStats
    cache_bytes: int | None = None
    weights_twice_bytes: int = 0


@dataclass(frozen=True)
class PromptRuns:
    """All runs of one prompt, by system, in order; run i of one is next to run i of another."""

    prompt: BenchPrompt
    runs: Mapping[str, tuple[Run, ...]]

    def speed(self, system: str) -> float | None:
        """Median tokens per second over the runs; None where nothing was decoded."""
        speeds = [speed for run in self.runs[system] if (speed := run.stats.tokens_per_second)]
        return statistics.median(speeds) if speeds else None

    def first_stats(self, system: str) -> GenerationStats:
        """Of the first run. (Vanilla's counts are the same in every one; a drafter may learn.)"""
        return self.runs[system][0].stats


class System(Protocol):
    """Decodes one prompt at a time."""

    @property
    def name(self) -> str: ...

    def run(self, prompt: BenchPrompt) -> Run: ...


class BatchedSystem(Protocol):
    """Decodes several prompts together, ``size`` at once."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def run_all(self, prompts: Sequence[BenchPrompt]) -> list[Run]: ...


@dataclass(frozen=True)
class EngineSystem:
    """This package's engine: vanilla where ``drafter`` is None."""

    name: str
    decoder: Decoder
    drafter: Proposer | None
    sampling: SamplingParams
    end_tokens: frozenset[int]

    def run(self, prompt: BenchPrompt) -> Run:
        """Decode the prompt once."""
        generator = TextGenerator(self.decoder, end_tokens=self.end_tokens, drafter=self.drafter)
        (run,) = _runs(generator, [prompt], self.sampling)
        return run


@dataclass(frozen=True)
class SkipOnlySystem:
    """The model with layers left out for good behind the prompt: lossy (see `generation.batch`)."""

    decoder: Decoder
    plan: SkipPlan
    sampling: SamplingParams
    end_tokens: frozenset[int]
    name: str = SKIP_ONLY

    def run(self, prompt: BenchPrompt) -> Run:
        """Decode the prompt once."""
        generator = TextGenerator(self.decoder, end_tokens=self.end_tokens, skip_plan=self.plan)
        (run,) = _runs(generator, [prompt], self.sampling)
        return run


@dataclass(frozen=True)
class BatchedEngineSystem:
    """This package's engine on several prompts at once: vanilla where ``drafter`` is None.

    Attributes:
        size: prompts decoded at once; one that ends makes room for the next.
    """

    name: str
    decoder: Decoder
    drafter: BatchProposer | None
    size: int
    sampling: SamplingParams
    end_tokens: frozenset[int]

    def run_all(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        """Decode prompts once, as one queue.

        Returns:
            A run for each prompt, in order. Its seconds are its share of what all took together, so
            that those of all add up; its cache is the one that all sequences share.
        """
        generator = TextGenerator(
            self.decoder,
            end_tokens=self.end_tokens,
            drafter=self.drafter,
            batch_size=self.size,
        )
        return _runs(generator, prompts, self.sampling)


def _runs(
    generator: TextGenerator, prompts: Sequence[BenchPrompt], sampling: SamplingParams
) -> list[Run]:
    """Decode prompts once; only tokens, no texts."""
    requests = [
        GenerationRequest(each.tokens, each.max_new_tokens, replace(sampling, seed=each.seed))
        for each in prompts
    ]
    results = generator.generate(requests)
    return [Run(each.token_ids, each.stats, each.cache_bytes) for each in results]
