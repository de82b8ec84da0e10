"""The JSON document of a bench, read back: what tables, exports, pictures and comparisons use.

All of them work from the document alone, so that a stored one serves as well as one just measured.
torch is not needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from conflayers_cli.positions import Positions
from conflayers_cli.utils.statistics import Interval, Spread

SCHEMA_VERSION = 3
"""3: figures of every prompt and run, of every place in a draft, and of drafting and verifying.
2: peak memory is over the model's weights and by arm; in 1 it was the whole process's."""

VANILLA, SPECULATIVE, SKIP_ONLY = "vanilla", "speculative", "skip-only"
OWN = (VANILLA, SPECULATIVE, SKIP_ONLY)
"""The arms of this package's engine; the others are transformers'."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]
Speed = Annotated[float, Field(gt=1e-9, lt=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A part of the document; keys that nothing here reads may be there, too."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class IntervalPart(Part):
    """A median and its 95 % interval."""

    median: Speed | None
    low: Speed | None
    high: Speed | None

    @property
    def value(self) -> Interval:
        return Interval(self.median, self.low, self.high)


class SpreadPart(Part):
    """Tokens per second: median, least and greatest."""

    median: Speed | None
    min: Speed | None
    max: Speed | None

    @property
    def value(self) -> Spread:
        return Spread(self.median, self.min, self.max)


class PositionsPart(Part):
    """Tokens drafted and kept, by place in the draft."""

    drafted: list[Count]
    accepted: list[Count]

    @model_validator(mode="after")
    def _fit(self) -> PositionsPart:
        if len(self.drafted) != len(self.accepted):
            raise ValueError("drafted and accepted should have as many entries")
        if any(a > d for a, d in zip(self.accepted, self.drafted, strict=True)):
            raise ValueError("accepted should not be more than drafted")
        return self

    @property
    def value(self) -> Positions:
        return Positions(tuple(self.drafted), tuple(self.accepted))


class DrafterPart(Part):
    """What one drafter did."""

    drafted: Count
    accepted: Count


class DecodingPart(Part):
    """All runs of an arm together, without the passes over prompts."""

    tokens: Count
    steps: Count
    draft_seconds: Seconds
    verify_seconds: Seconds


class ArmPart(Part):
    """One arm's figures. Those of drafting are the speculative arm's alone."""

    tokens_per_second: SpreadPart
    time_to_first_token_s: Seconds
    tokens: Count
    tokens_per_step: float | None = None
    peak_memory_bytes: int | None = None
    decoding: DecodingPart | None = None
    acceptance_rate: Share | None = None
    drafted: Count = 0
    accepted: Count = 0
    by_drafter: dict[str, DrafterPart] = {}
    by_position: dict[str, PositionsPart] = {}


class DivergencePart(Part):
    """Where an output leaves vanilla's."""

    id: str
    position: Count
    gap: float
    vanilla: int | None
    other: int | None


class IdentityPart(Part):
    """How many outputs equal vanilla's."""

    matching: Count
    total: Count
    divergences: list[DivergencePart]


class AgreementPart(Part):
    """How far the lossy arm's outputs agree with vanilla's."""

    equal: Share
    rouge_2: float
    first_divergence: float | None
    identical: Count
    prompts: Count


class SkipOnlyPart(Part):
    """The lossy arm."""

    speedup: IntervalPart
    agreement: AgreementPart | None


class SpeedPart(Part):
    """An arm's speed in a category."""

    tokens_per_second: Speed | None


class CategoryPart(Part):
    """The prompts of one kind."""

    prompts: Count
    vanilla: SpeedPart
    speculative: SpeedPart
    speedup: Speed | None
    acceptance_rate: Share | None
    tokens_per_step: float | None


class PromptPart(Part):
    """One prompt: what the speculative arm's first run did, and the speeds of all runs by arm.

    ``tokens_per_second`` is empty where prompts were decoded together.
    """

    id: str
    category: str | None
    sha256: str
    prompt_tokens: Count
    tokens: Count
    steps: Count
    drafted: Count
    accepted: Count
    tokens_per_second: dict[str, list[Speed | None]]


class QueuePart(Part):
    """Prompts that were decoded together, and the speeds of their runs by arm."""

    prompts: str
    tokens_per_second: dict[str, list[Speed | None]]


class BenchDocument(Part):
    """A bench. What the keys mean is in docs/figures.md."""

    schema_version: Literal[3]
    model: str
    model_hash: str
    device: str
    dtype: str
    environment: dict[str, str | int | None]
    settings: dict[str, Any]
    engine: dict[str, Any]
    arms: dict[str, ArmPart]
    speedup: IntervalPart
    speedup_over: dict[str, IntervalPart]
    identical_outputs: IdentityPart | None
    identical_to: dict[str, IdentityPart | None] = {}
    skip_only: SkipOnlyPart | None = None
    categories: dict[str, CategoryPart]
    prompts: Annotated[list[PromptPart], Field(min_length=1)]
    peak_memory_bytes: int | None
    kv_cache_bytes: Count
    batch_size: Annotated[int, Field(ge=1)] = 1
    queues: list[QueuePart] = []

    @model_validator(mode="after")
    def _has_its_arms(self) -> BenchDocument:
        missing = [name for name in (VANILLA, SPECULATIVE) if name not in self.arms]
        if missing:
            raise ValueError(f"arms should hold {' and '.join(missing)}")
        return self

    @property
    def speculative(self) -> ArmPart:
        return self.arms[SPECULATIVE]

    @property
    def timed(self) -> Sequence[PromptPart | QueuePart]:
        """What speeds were measured of: prompts, or queues of prompts decoded together."""
        return self.queues or self.prompts

    def speedup_of(self, arm: str) -> Interval | None:
        """An arm of the engine over vanilla, where that was measured."""
        if arm == SPECULATIVE:
            return self.speedup.value
        if arm == SKIP_ONLY and self.skip_only:
            return self.skip_only.speedup.value
        return None
