"""The ways to decode that a bench compares. Each decodes prompts and says what that took.

Those of transformers are in :mod:`conflayers_cli.bench.runner.hf_baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.batch import Batch, BatchRequest
from conflayers_cli.generation.generate import Summary
from conflayers_cli.generation.loop import Generation
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer

SKIP_ONLY = "skip-only"
"""The name of the arm whose output is not the model's own."""


@dataclass(frozen=True)
class Case:
    """One prompt to decode.

    Attributes:
        id: its name.
        category: what kind of prompt it is, if it says so.
        tokens: the prompt's token ids.
        max_new_tokens: the most tokens produced.
        seed: of the random numbers; the same in every arm.
    """

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One decoding of a prompt.

    Attributes:
        tokens: what came out.
        stats: what it took.
        cache_bytes: memory of the keys and values; None where it is not known.
        weights_twice_bytes: memory of weights that were held twice meanwhile, for the comparison's
            sake: not what this way to decode takes by itself.
    """

    tokens: tuple[int, ...]
    stats: Summary
    cache_bytes: int | None = None
    weights_twice_bytes: int = 0


class Arm(Protocol):
    """A way to decode."""

    @property
    def name(self) -> str: ...

    def run(self, case: Case) -> Run: ...


class RowsArm(Protocol):
    """A way to decode several prompts together."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def run_all(self, cases: Sequence[Case]) -> list[Run]: ...


@dataclass(frozen=True)
class EngineArm:
    """This package's engine: vanilla where ``drafter`` is None."""

    name: str
    decoder: Decoder
    drafter: Proposer | None
    sampling: SamplingParams
    end_tokens: frozenset[int]

    def run(self, case: Case) -> Run:
        """Decode the prompt once."""
        generation = Generation(
            self.decoder,
            case.tokens,
            max_new_tokens=case.max_new_tokens,
            sampling=replace(self.sampling, seed=case.seed),
            drafter=self.drafter,
            end_tokens=self.end_tokens,
        )
        stats = Summary.of(list(generation))
        return Run(tuple(generation.output), stats, generation.cache.bytes)


@dataclass(frozen=True)
class SkipOnlyArm:
    """The model with layers left out for good behind the prompt: lossy (see `engine.batch`)."""

    decoder: Decoder
    plan: SkipPlan
    sampling: SamplingParams
    end_tokens: frozenset[int]
    name: str = SKIP_ONLY

    def run(self, case: Case) -> Run:
        """Decode the prompt once."""
        sampling = replace(self.sampling, seed=case.seed)
        request = BatchRequest(case.tokens, case.max_new_tokens, sampling)
        batch = Batch(self.decoder, [request], plan=self.plan, end_tokens=self.end_tokens)
        batch.run()
        (tokens,) = batch.outputs
        return Run(tuple(tokens), Summary.of(batch.steps[0]), batch.cache.bytes)


@dataclass(frozen=True)
class BatchArm:
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

    def run_all(self, cases: Sequence[Case]) -> list[Run]:
        """Decode prompts once, as one queue.

        Returns:
            A run for each prompt, in order. Its seconds are its share of what all took together, so
            that those of all add up; its cache is the one that all rows share.
        """
        requests = [
            BatchRequest(case.tokens, case.max_new_tokens, replace(self.sampling, seed=case.seed))
            for case in cases
        ]
        batch = Batch(
            self.decoder,
            requests,
            size=self.size,
            drafter=self.drafter,
            end_tokens=self.end_tokens,
        )
        batch.run()
        return [
            Run(tuple(tokens), Summary.of(steps), batch.cache.bytes)
            for tokens, steps in zip(batch.outputs, batch.steps, strict=True)
        ]
