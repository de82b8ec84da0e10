"""The section of a profile that identifies its model, and how two models are compared."""

from __future__ import annotations

from math import dist, hypot
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

from conflayers_cli.profile.sections import Section, Size, Text, list_to_tuple
from conflayers_cli.utils.yaml import format_value

SIZES: Final = (
    "architecture",
    "depth",
    "hidden_size",
    "attention_heads",
    "key_value_heads",
    "intermediate_size",
    "vocabulary",
)
"""What has to be equal, in the order of messages."""

MAX_DTYPE_DISTANCE = 0.0025
"""Of the same weights in two dtypes: 0.13–0.17 % between float32 and bfloat16, 0.02 % between
float32 and float16 (SmolLM2, tiny and normal weights; sketches 0.13–0.20 %)."""
SKETCH_SLACK = 1.5
"""How much larger than the true distance that of two sketches may be, which is within 12.5 % of it
(one standard deviation). So plain weights differ from 0.38 % on, and from those of Q8 from 0.9 %.
"""
MIN_ROUNDING_SHARE = 0.5
"""Plain weights nearer to rounded ones than this share of the known distance that rounding moves
them are not what was rounded: they were made from the rounded ones, and changed."""
MIN_UNRELATED_DISTANCE = 0.5
"""From this distance on, weights have nothing in common but their sizes (independent ones: √2)."""

Projection = Annotated[float, Field(ge=-1e3, le=1e3)]
Projections = Annotated[
    tuple[Projection, ...], Field(min_length=8, max_length=256), BeforeValidator(list_to_tuple)
]


class WeightSketchSection(Section):
    """What tells a fine-tune from the model it was made of (see `.models.weight_sketch`).

    ``rounding`` is how far the weights were moved by rounding them to few bits, relative to their
    norm: 0 for plain ones, about 0.005 for Q8 and 0.08 for Q4. ``projections`` are signed sums over
    a sample of the weights; the Euclidean distance of two sketches is about the relative one of the
    weights.
    """

    rounding: Annotated[float, Field(ge=0, le=1)]
    projections: Projections

    def distance(self, other: WeightSketchSection) -> float | None:
        """Relative distance of the weights behind two sketches; None: not to be compared."""
        if len(self.projections) != len(other.projections):
            return None
        return dist(self.projections, other.projections)

    def differs(self, other: WeightSketchSection) -> bool:
        """Whether dtypes and rounding to few bits can't explain the distance."""
        found = self.distance(other)
        if found is None:
            return False
        rounded = hypot(self.rounding, other.rounding)
        if found > SKETCH_SLACK * hypot(MAX_DTYPE_DISTANCE, rounded):
            return True
        one_plain = (self.rounding == 0) != (other.rounding == 0)
        least = SKETCH_SLACK * MAX_DTYPE_DISTANCE
        return one_plain and least < found < MIN_ROUNDING_SHARE * rounded


class ModelFingerprint(Section):
    """What tells one model from another, as far as a profile cares.

    Only ``name`` and ``depth`` are always known; null is what is not, and is not compared. (Beside
    known sizes, a null ``intermediate_size`` says that the model has none.)
    """

    name: Text
    architecture: Text | None
    depth: Size
    hidden_size: Size | None
    attention_heads: Size | None
    key_value_heads: Size | None
    intermediate_size: Size | None
    vocabulary: Size | None
    config_hash: Text | None = None
    sketch: WeightSketchSection | None = None

    @property
    def lacks_sizes(self) -> bool:
        """Whether too little is known to distinguish the model from others of its depth."""
        return self.hidden_size is None or self.vocabulary is None

    def difference(self, other: ModelFingerprint) -> str | None:
        """How this model differs from ``other``, the profile's, in one line; None if it doesn't.

        The first two differences are named. Names are not compared, since one model has many, nor
        is what the profile does not know; the hash of the configuration counts only where all else
        is equal. Weights are compared by :meth:`other_weights`.
        """
        found = []
        for name in SIZES:
            here, there = getattr(self, name), getattr(other, name)
            unknown = there is None and (name != "intermediate_size" or other.lacks_sizes)
            if here != there and not unknown:
                label = name.replace("_", " ")
                found.append(
                    f"{label} {format_value(here)} here, {format_value(there)} in the profile"
                )
        if found:
            return "; ".join(found[:2])
        here, there = self.config_hash, other.config_hash
        if here is not None and there is not None and here != there:
            return (
                "same sizes, but another configuration "
                f"(hash {here[:12]} here, {there[:12]} in the profile)"
            )
        return None

    def other_weights(self, other: ModelFingerprint) -> float | None:
        """Relative distance of the weights from the profile's, where these are other ones.

        None: they are the same but for dtype and rounding, or one of them is not known.
        """
        if self.sketch is None or other.sketch is None or not self.sketch.differs(other.sketch):
            return None
        return self.sketch.distance(other.sketch)
