"""The sections of a profile: what each key may hold, checked strictly."""

from __future__ import annotations

from itertools import pairwise
from math import isfinite
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from conflayers_cli.skip_plan import SkipPlan, Weights
from conflayers_cli.utils.yaml import entry_error


def list_to_tuple(value: object) -> object:
    """A list as the tuple that strict mode asks for."""
    # only lists: strict mode then refuses what else could be a sequence, a YAML !!set for one
    return tuple(value) if isinstance(value, list) else value


def check_unique(layers: tuple[int, ...]) -> None:
    """Raise an error that names the first layer that is there twice."""
    for position, layer in enumerate(layers):
        if layer in layers[:position]:
            raise entry_error(str(position), f"{layer} is repeated, allowed is each layer once")


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError("pair", "should be a pair [over, leaves], as in [0.8, 5]")
    return tuple(value)


def _setting(value: object) -> int | float | bool | str | None:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    raise PydanticCustomError("setting", "should be a finite number, true, false, a text or null")


Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Share = Annotated[float, Field(ge=0, le=1)]
Figure = Annotated[float, Field(ge=0, le=1e12)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Layers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(list_to_tuple)]
Rung = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[int, Field(ge=0, le=32)]],
    BeforeValidator(_pair),
]
Rungs = Annotated[tuple[Rung, ...], BeforeValidator(list_to_tuple)]
Setting = Annotated[
    int | float | bool | str | None,
    PlainValidator(_setting, json_schema_input_type=int | float | bool | str | None),
]


class Section(BaseModel):
    """Keys and values, none beside those named, of exactly the types named; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SkipSection(Section):
    """The layers whose attention or MLP is left out; in any order on input, sorted here.

    ``weights`` are those that the other layers draft with where they are not the model's own: int4,
    made from them.
    """

    attention: Layers
    mlp: Layers
    weights: Weights | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_linear_maps(cls, section: object) -> object:
        if isinstance(section, dict) and "stand_ins" in section:
            raise entry_error(
                "stand_ins",
                "linear maps in place of layers are no longer supported: calibrate again, to a new "
                "file",
            )
        return section

    @field_validator("attention", "mlp", mode="after")
    @classmethod
    def _sorted_and_unique(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        check_unique(layers)
        return tuple(sorted(layers))

    @classmethod
    def of(cls, plan: SkipPlan) -> SkipSection:
        """The section that says what ``plan`` says."""
        return cls(attention=plan.attention, mlp=plan.mlp, weights=plan.weights)

    @property
    def plan(self) -> SkipPlan:
        """What the section says, as the engine takes it."""
        return SkipPlan(self.attention, self.mlp, self.weights)


class DraftSettings(Section):
    """How long a draft may get, below which confidence it ends early, and what grows beside it.

    ``tree`` is a list of rungs ``(over, leaves)`` by falling ``over``, the last one 0: beside a
    drafted token, ``leaves`` side candidates are verified too, by the first rung whose ``over`` the
    token's draft probability exceeds (ConfLayers and SWIFT: ``(0.95, 3), (0.8, 5), (0.5, 8),
    (0, 10)`` for greedy drafts). None is a chain, without side candidates.

    ``by`` says who drafts: the skipped layers, n-grams found in the text, both, or nobody; None is
    both where layers are skipped, else nobody. ``lookahead`` false makes drafts by skipping as long
    as ``max_tokens`` and ``stop_probability`` say; otherwise it is decided at every step what pays.
    """

    max_tokens: Annotated[int, Field(ge=0, le=64)]
    stop_probability: Share
    tree: Rungs | None = None
    by: Literal["skip", "ngram", "mixed", "none"] | None = None
    lookahead: bool | None = None

    @field_validator("tree", mode="after")
    @classmethod
    def _falling_to_zero(
        cls, rungs: tuple[tuple[float, int], ...] | None
    ) -> tuple[tuple[float, int], ...] | None:
        if rungs is None:
            return None
        if not rungs:
            raise PydanticCustomError("tree", "should be a list of pairs, as in [[0.8, 3], [0, 5]]")
        for position, ((before, _), (over, _)) in enumerate(pairwise(rungs), 1):
            if over >= before:
                raise entry_error(
                    f"{position}.0", f"{over} should be less than {before}, which it follows"
                )
        if rungs[-1][0] != 0:
            raise entry_error(
                f"{len(rungs) - 1}.0",
                f"{rungs[-1][0]} should be 0: the last entry is for all that are left",
            )
        return rungs


class RangeSection(Section):
    """The plan and draft settings from a context length (prompt and output, in tokens) on."""

    from_context: Size
    skip: SkipSection
    draft: DraftSettings


Ranges = Annotated[tuple[RangeSection, ...], BeforeValidator(list_to_tuple)]


class PromptsUsed(Section):
    """How many prompts a calibration used, and the SHA-256 of their content."""

    count: Count
    sha256: Sha256


class FoundBy(Section):
    """The search that found the plan, so that it can be run again."""

    strategy: Text
    refined: bool
    settings: dict[str, Setting]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    prompts: PromptsUsed


class Measured(Section):
    """What the plan reached when it was found; null is what was not measured."""

    acceptance_rate: Share | None
    tokens_per_step: Figure | None
    expected_speedup: Figure | None
    measured_speedup: Figure | None
    iterations: Count
    seconds: Figure
    conclusion: str


class Environment(Section):
    """Where the figures come from."""

    device: Text
    dtype: Text
    threads: Size | None
    python: Text
    torch: Text
    transformers: Text
    conflayers: Text
