"""The results document of a bench: what ``--json`` prints and ``--from`` and ``--compare`` read.

`serialize.build_document` makes a `BenchDocument` of what was measured, `load.load_document` reads
a stored one; tables, exporters, plots and comparisons work from the document alone, without torch.
Keys that were not given are not written, unknown ones are kept. docs/figures.md explains the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from conflayers_cli.generation.positions import AcceptedPerPosition
from conflayers_cli.utils.statistics import Interval, PositiveFigure, Spread

SCHEMA_VERSION: Final = 3
"""3: figures of every prompt and run, of every position in a draft, and of drafting and verifying.
2: peak memory is over the model's weights and by system; in 1 it was the whole process's."""

VANILLA, SPECULATIVE, SKIP_ONLY = "vanilla", "speculative", "skip-only"
OWN_SYSTEMS = (VANILLA, SPECULATIVE, SKIP_ONLY)
"""The systems of this package's engine; the others are Hugging Face baselines."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _as_given(value: float, check: ValidatorFunctionWrapHandler) -> float:
    check(value)
    return value


Number = Annotated[float, WrapValidator(_as_given)]
"""A float that, given as a whole number, is written as one again."""


class Section(BaseModel):
    """A part of the document, checked strictly; keys that are not known here are kept."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


class PositionCounts(Section):
    """Tokens drafted and accepted, by their position in the draft, from 0 on."""

    drafted: list[Count]
    accepted: list[Count]

    @model_validator(mode="after")
    def _check_lengths(self) -> PositionCounts:
        if len(self.drafted) != len(self.accepted):
            raise ValueError("drafted and accepted should have as many entries")
        if any(a > d for a, d in zip(self.accepted, self.drafted, strict=True)):
            raise ValueError("accepted should not be more than drafted")
        return self

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Acceptance rate at each position; None where nothing was drafted."""
        return AcceptedPerPosition(tuple(self.drafted), tuple(self.accepted)).rates


class DrafterCounts(Section):
    """What one drafter did: steps with a draft of its, tokens drafted and accepted."""

    steps: Count = 0
    drafted: Count
    accepted: Count


class DecodingTotals(Section):
    """All runs of a system together, without the prefill."""

    tokens: Count
    steps: Count
    draft_seconds: Seconds
    verify_seconds: Seconds


class SystemFigures(Section):
    """One system's figures. Those of drafting are the speculative system's alone.

    ``decoding`` is of this package's systems only. ``peak_memory_bytes`` is over the weights.
    """

    tokens_per_second: Spread
    time_to_first_token_s: Seconds
    tokens: Count
    tokens_per_step: float | None = None
    peak_memory_bytes: int | None = None
    decoding: DecodingTotals | None = None
    acceptance_rate: Share | None = None
    drafted: Count = 0
    accepted: Count = 0
    by_drafter: dict[str, DrafterCounts] = {}
    by_position: dict[str, PositionCounts] = {}


class Divergence(Section):
    """Where a system's output leaves vanilla's.

    Attributes:
        id: the prompt.
        position: index of the first new token that differs.
        gap: difference of the two best logits there, by the whole model.
        vanilla: vanilla's token; None where its output has ended.
        other: the other system's.
    """

    id: str
    position: Count
    gap: float
    vanilla: int | None
    other: int | None


class OutputMatch(Section):
    """How many prompts' outputs equal vanilla's, and where the others part from them."""

    matching: Count
    total: Count
    divergences: list[Divergence]


class Agreement(Section):
    """How far lossy outputs agree with the model's own: means over the prompts, unless noted.

    Attributes:
        equal: share of positions with the same token, of the longer output's.
        rouge_2: F1 of the pairs of neighbouring tokens (ROUGE-2, Lin 2004, over token ids).
        first_divergence: median index of the first token that differs; None where none does.
        identical, prompts: outputs that are the same, and all.
    """

    equal: Share
    rouge_2: float
    first_divergence: Number | None
    identical: Count
    prompts: Count


class SkipOnlyFigures(Section):
    """The system that skips layers for good, whose output is not the model's own."""

    lossless: Literal[False] = False
    speedup: Interval
    agreement: Agreement | None


class MedianSpeed(Section):
    """A system's speed in a category."""

    tokens_per_second: PositiveFigure | None


class CategoryFigures(Section):
    """The prompts of one category."""

    prompts: Count
    vanilla: MedianSpeed
    speculative: MedianSpeed
    speedup: PositiveFigure | None
    acceptance_rate: Share | None
    tokens_per_step: float | None


class PromptFigures(Section):
    """One prompt: counts of the speculative system's first run, and the speeds of all runs.

    ``tokens_per_second`` is by system; it is empty where prompts were decoded together.
    """

    id: str
    category: str | None
    sha256: str
    prompt_tokens: Count
    tokens: Count
    steps: Count
    drafted: Count
    accepted: Count
    tokens_per_second: dict[str, list[PositiveFigure | None]]


class QueueFigures(Section):
    """Prompts that were decoded together, and the speeds of their runs by system."""

    prompts: str
    tokens_per_second: dict[str, list[PositiveFigure | None]]


class BenchContext(Section):
    """What a bench ran with.

    Attributes:
        model, model_hash: the model's name, and the hash of its configuration.
        device, dtype: where and how it ran.
        environment: versions, processors, threads.
        settings: what was measured, so that it can be measured again.
        engine: how passes were run.
    """

    schema_version: Literal[3]
    model: str
    model_hash: str
    device: str
    dtype: str
    environment: dict[str, str | int | None]
    settings: dict[str, Any]
    engine: dict[str, Any]


class BenchDocument(BenchContext):
    """The results of a bench, and what it ran with."""

    arms: dict[str, SystemFigures]
    speedup: Interval
    speedup_over: dict[str, Interval]
    identical_outputs: OutputMatch | None
    identical_to_transformers: OutputMatch | None = None
    identical_to: dict[str, OutputMatch | None] = {}
    skip_only: SkipOnlyFigures | None = None
    categories: dict[str, CategoryFigures]
    prompts: Annotated[list[PromptFigures], Field(min_length=1)]
    peak_memory_bytes: int | None
    kv_cache_bytes: Count
    batch_size: Annotated[int, Field(ge=1)] = 1
    queues: list[QueueFigures] = []
    comparison: Any = None
    """What `comparison.Comparison.as_json` gives, where it was compared; written, never read."""

    @model_validator(mode="after")
    def _has_its_systems(self) -> BenchDocument:
        missing = [name for name in (VANILLA, SPECULATIVE) if name not in self.arms]
        if missing:
            raise ValueError(f"arms should hold {' and '.join(missing)}")
        return self

    def as_json(self) -> dict[str, Any]:
        """The document as JSON takes it, in the order of the fields above."""
        return self.model_dump(exclude_unset=True)

    @property
    def speculative(self) -> SystemFigures:
        """The speculative system's figures."""
        return self.arms[SPECULATIVE]

    @property
    def timed(self) -> Sequence[PromptFigures | QueueFigures]:
        """What speeds were measured of: prompts, or queues of prompts decoded together."""
        return self.queues or self.prompts

    @property
    def token_times(self) -> dict[str, tuple[float, float]]:
        """Milliseconds per token of drafting and verifying, by system; empty: none is known."""
        parts = {name: self.arms[name].decoding for name in (VANILLA, SPECULATIVE)}
        return {
            name: (
                1000 * each.draft_seconds / each.tokens,
                1000 * each.verify_seconds / each.tokens,
            )
            for name, each in parts.items()
            if each is not None and each.tokens
        }

    def speedup_of(self, system: str) -> Interval | None:
        """A system of the engine over vanilla, where that was measured."""
        if system == SPECULATIVE:
            return self.speedup
        if system == SKIP_ONLY and self.skip_only:
            return self.skip_only.speedup
        return None
