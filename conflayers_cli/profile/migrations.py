"""Older forms of a profile, and how each is turned into the next.

`MIGRATIONS` has one pure function per version, from its data to the next version's. So only this
module knows any form but the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from conflayers_cli.errors import InputError
from conflayers_cli.profile.sections import Section, Share, Size, Text, check_unique, list_to_tuple
from conflayers_cli.utils.yaml import entry_error, first_problem, format_value

SCHEMA_VERSION: Final = 1

Data = dict[Any, Any]

LayerList = Annotated[tuple[int, ...], BeforeValidator(list_to_tuple)]


def read_version(data: Mapping[Any, Any]) -> int:
    """The schema version that a profile's data names.

    Raises:
        InputError: it names none, or one that this version can't read.
    """
    key = "schema_version" if "schema_version" in data else "version"
    if key not in data:
        raise InputError(f"schema_version is missing, supported is {SCHEMA_VERSION}")
    version = data[key]
    if type(version) is not int or version < 0:
        raise InputError(
            f"{key}: {format_value(version)} is not supported, supported are 0–{SCHEMA_VERSION}"
        )
    if version > SCHEMA_VERSION:
        raise InputError(
            f"written by a newer conflayers (schema {format_value(version)}; "
            f"this one reads up to {SCHEMA_VERSION})"
        )
    return version


def to_newest(data: Data) -> Data:
    """A profile's data in the newest form; what it is given stays as it is.

    Raises:
        InputError: as `read_version`, or the data does not fit its version.
    """
    for version in range(read_version(data), SCHEMA_VERSION):
        data = MIGRATIONS[version](data)
    return data


class FlatProfile(Section):
    """Version 0: flat keys, and the layers as the papers' code bases keep their sets.

    Draft & Verify, SWIFT and ConfLayers hold a set as two lists of layer numbers, from 0, of the
    attention and the MLP sub-layers left out, beside the draft's length and the probability that
    ends it::

        version: 0
        model: meta-llama/Llama-2-13b-hf
        num_layers: 40
        skip_attn_layers: [2, 4, 6]
        skip_mlp_layers: [2, 4, 7]
        draft_len: 25        # may be left out: the papers' 25
        threshold: 0.8       # may be left out: the papers' 0.8
        source: where it is from, in words; may be left out

    Nothing is said of the model but its name and depth.
    """

    version: Literal[0]
    model: Text
    num_layers: Size
    skip_attn_layers: LayerList
    skip_mlp_layers: LayerList
    draft_len: Annotated[int, Field(ge=0, le=64)] = 25
    threshold: Share = 0.8
    source: Text | None = None

    @field_validator("skip_attn_layers", "skip_mlp_layers", mode="after")
    @classmethod
    def _inner(cls, layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        depth = info.data.get("num_layers")
        check_unique(layers)
        for position, layer in enumerate(layers):
            if depth is not None and not 1 <= layer <= depth - 2:
                raise entry_error(str(position), f"{layer} is out of range, {inner_layers(depth)}")
        return layers


def inner_layers(depth: int) -> str:
    """Which layers of a model may be left out, for an error."""
    if depth < 3:
        return f"a model of {depth} layers has none to leave out, allowed is an empty list"
    return f"allowed are 1–{depth - 2} (never the first and the last layer)"


def from_flat(data: Data) -> Data:
    """Version 0 → 1. The model's sizes are null: not known.

    Raises:
        InputError: the data does not fit version 0.
    """
    try:
        flat = FlatProfile.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{first_problem(error, FlatProfile)} (schema 0)") from None
    sizes = ("hidden_size", "attention_heads", "key_value_heads", "intermediate_size", "vocabulary")
    model = {"name": flat.model, "architecture": None, "depth": flat.num_layers}
    migrated: Data = {
        "schema_version": 1,
        "model": {**model, **dict.fromkeys(sizes)},
        "skip": {"attention": list(flat.skip_attn_layers), "mlp": list(flat.skip_mlp_layers)},
        "draft": {"max_tokens": flat.draft_len, "stop_probability": flat.threshold},
    }
    if flat.source is not None:
        migrated["source"] = flat.source
    return migrated


MIGRATIONS: Mapping[int, Callable[[Data], Data]] = MappingProxyType({0: from_flat})
