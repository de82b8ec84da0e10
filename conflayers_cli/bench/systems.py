"""The systems that a bench compares. Those of transformers are in :mod:`.hf_baselines`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt to decode.

    Attributes:
        id: its name.
        category: what kind of prompt it is, if it says so.
        tokens: the prompt's token ids.
        max_new_tokens: the most tokens produced.
        processors: as of `GenerationRequest`.
    """

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int
    processors: tuple[Any, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Run:
    """One decoding of a prompt by one system.

    Attributes:
        tokens: the output's token ids.
        stats: counts and seconds.
        cache_bytes: memory of the KV cache; None where it is not known.
        weights_twice_bytes: memory of weights held twice only because systems are compared in one
            process; it does not count as the system's.
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
    """Decodes prompts."""

    @property
    def name(self) -> str: ...

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]: ...


@dataclass(frozen=True)
class EngineSystem:
    """This package's engine.

    Attributes:
        name: the system's.
        decoder: the model.
        proposer: drafts; None decodes vanilla.
        sampling, end_tokens: how tokens are chosen, and ids that end an output.
        batch_size: prompts decoded at once.
        skip_plan: left out for good behind the prompts, which is lossy; None: nothing.
        store: of earlier texts to draft from, which gets those decoded; None: there is none.
    """

    name: str
    decoder: Decoder
    proposer: Proposer | BatchProposer | None
    sampling: SamplingParams
    end_tokens: frozenset[int]
    batch_size: int = 1
    skip_plan: SkipPlan | None = None
    store: DraftStore | None = None

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        """Decode prompts once.

        Returns:
            A run for each prompt, in order. Of prompts decoded together, its seconds are its share
            of what all took; its cache is the one that all sequences share.
        """
        generator = TextGenerator(
            self.decoder,
            end_tokens=self.end_tokens,
            proposer=self.proposer,
            batch_size=self.batch_size,
            skip_plan=self.skip_plan,
            store=self.store,
        )
        results = generator.generate(
            GenerationRequest(
                each.tokens, each.max_new_tokens, self.sampling, processors=each.processors
            )
            for each in prompts
        )
        return [Run(each.token_ids, each.stats, each.cache_bytes) for each in results]
