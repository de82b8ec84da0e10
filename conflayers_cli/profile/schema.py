"""The profile, what `calibrate` found for a model: its schema, reading and writing as YAML."""

from __future__ import annotations

from itertools import pairwise
from math import floor, log10
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from conflayers_cli.errors import InputError
from conflayers_cli.profile.fingerprint import ModelFingerprint, WeightSketchSection
from conflayers_cli.profile.migrations import SCHEMA_VERSION, inner_layers, read_version, to_newest
from conflayers_cli.profile.sections import (
    DraftSettings,
    Environment,
    FoundBy,
    Measured,
    PromptsUsed,
    Ranges,
    RangeSection,
    Section,
    Sha256,
    SkipSection,
    Text,
)
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.files import check_target, write_atomically
from conflayers_cli.utils.text_files import read_text
from conflayers_cli.utils.yaml import (
    dump_mapping,
    entry_error,
    first_problem,
    format_value,
    parse_mapping,
)

__all__ = [
    "DraftSettings",
    "Environment",
    "FoundBy",
    "Measured",
    "ModelFingerprint",
    "Profile",
    "PromptsUsed",
    "RangeSection",
    "SkipSection",
    "WeightSketchSection",
]

MAX_BYTES = 200_000

_HEADER = """\
# A conflayers profile: the sub-layers that the model below leaves out while it drafts.
# Use it with `conflayers generate --profile FILE`. It may be edited; reading it checks every key.
"""


class Profile(Section):
    """A plan for one model with its draft settings, and how, where and with what gain it was found.

    ``ranges`` holds other plans for longer contexts, by rising ``from_context``; ``source`` says
    where a published plan is from; ``tensors`` is a file beside the profile, with what the search
    measured. Only ``model``, ``skip`` and ``draft`` are needed: a person can write a profile.

    Raises:
        pydantic.ValidationError: (a ValueError) on construction with values that don't fit.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelFingerprint
    skip: SkipSection
    draft: DraftSettings
    ranges: Ranges | None = None
    source: Text | None = None
    found_by: FoundBy | None = None
    measured: Measured | None = None
    environment: Environment | None = None
    tensors: str | None = None
    tensors_sha256: Sha256 | None = None

    @field_validator("skip", "ranges", mode="before")
    @classmethod
    def _layers_fit_the_model(cls, value: object, info: ValidationInfo) -> object:
        # before the sections sort their lists, so that the position named is the one in the file
        model = info.data.get("model")
        if not isinstance(model, ModelFingerprint):
            return value  # its own error is reported
        if info.field_name == "skip":
            _check_layers(value, model.depth)
        elif isinstance(value, list | tuple):
            for position, section in enumerate(value):
                _check_layers(_fields(section).get("skip"), model.depth, f"{position}.skip.")
        return value

    @field_validator("ranges", mode="after")
    @classmethod
    def _rising(cls, ranges: tuple[RangeSection, ...] | None) -> tuple[RangeSection, ...] | None:
        starts = [section.from_context for section in ranges or ()]
        for position, (before, start) in enumerate(pairwise(starts), 1):
            if start <= before:
                raise entry_error(
                    f"{position}.from_context",
                    f"{start} should be greater than {before}, which it follows",
                )
        return ranges or None  # an empty list says what none says

    @field_validator("tensors", mode="after")
    @classmethod
    def _beside_the_profile(cls, name: str | None) -> str | None:
        if name is not None and (
            not name.endswith(".safetensors") or name.startswith(".") or {"/", "\\"} & set(name)
        ):
            raise PydanticCustomError(
                "tensors", "should be the name of a .safetensors file in the profile's folder"
            )
        return name

    @field_validator("tensors_sha256", mode="after")
    @classmethod
    def _of_a_file(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if sha256 is not None and info.data.get("tensors", "") is None:
            raise PydanticCustomError("hash", "should be left out where tensors names no file")
        return sha256

    @property
    def drafts_with_int4(self) -> bool:
        """Whether drafts use weights rounded to four bits, at any length of the context."""
        skips = (self.skip, *(r.skip for r in self.ranges or ()))
        return any(skip.weights == "int4" for skip in skips)

    @property
    def plan(self) -> SkipPlan:
        """The sub-layers to leave out, as the engine takes them."""
        return self.skip.plan

    def plans(self) -> list[tuple[int, SkipPlan, DraftSettings]]:
        """(first context, plan, draft settings): the profile's own, from 0, and each range's."""
        ranges = ((r.from_context, r.skip.plan, r.draft) for r in self.ranges or ())
        return [(0, self.plan, self.draft), *ranges]

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read and check a profile of any schema version up to this one's.

        Raises:
            InputError: in one line that names the place: the file can't be read, is larger than
                `MAX_BYTES`, not plain YAML, or not what the schema allows.
        """
        return cls.load_versioned(path)[0]

    @classmethod
    def load_versioned(cls, path: Path) -> tuple[Profile, int]:
        """As `load`, with the schema version that the file is of."""
        data = parse_mapping(read_text(path, MAX_BYTES), path, "profile")
        try:
            return cls.model_validate(to_newest(data)), read_version(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except ValidationError as error:
            raise InputError(f"{path}: {first_problem(error, cls)}") from None

    def to_yaml(self) -> str:
        """The profile as YAML for people: keys in the order of the schema, lists on one line.

        Optional keys without a value are left out; what was not measured is written as null.
        Figures measured and the draft's probability are rounded to four significant digits; the
        settings of the search, which can be run again exactly, and the tree are not.
        """
        # only optional keys, and the version, have a default
        data = self.model_dump(mode="json", exclude_defaults=True)
        data = {"schema_version": self.schema_version, **data}
        drafts = [section["draft"] for section in (data, *data.get("ranges", ()))]
        for section in (*drafts, data.get("measured", {})):
            section.update({name: _rounded(value) for name, value in section.items()})
        return f"{_HEADER}{dump_mapping(data)}"

    def save(self, path: Path) -> None:
        """Write the profile as `to_yaml` gives it, wholly or, on failure, not at all.

        Raises:
            InputError, ConfLayersError: as `write_atomically`.
        """
        write_atomically(path, self.to_yaml())


def _fields(section: object) -> dict[str, object]:
    """The fields of a section or of its data; none where it is neither."""
    return dict(section) if isinstance(section, dict | Section) else {}


def _check_layers(skip: object, depth: int, where: str = "") -> None:
    """Raise an error at ``where`` unless a skip section's layers are ones that may be left out."""
    for name in ("attention", "mlp"):
        layers = _fields(skip).get(name)
        for position, layer in enumerate(layers if isinstance(layers, list | tuple) else ()):
            whole = isinstance(layer, int) and not isinstance(layer, bool)
            if whole and not 1 <= layer <= depth - 2:
                raise entry_error(
                    f"{where}{name}.{position}",
                    f"{format_value(layer)} is out of range, {inner_layers(depth)}",
                )


def _rounded(value: object) -> object:
    if not isinstance(value, float) or value == 0:
        return value
    return round(value, 3 - floor(log10(abs(value))))


def check_replaceable(path: Path, tensors: Path | None = None) -> None:
    """Refuse to replace files other than a profile, and tensors that it names.

    Raises:
        InputError: as `check_target`, or there is something else.
    """
    check_target(path)
    named: str | None = None
    if path.exists() and path.stat().st_size:
        try:
            named = Profile.load(path).tensors
        except InputError:
            raise InputError(f"{path}: is there already and is no profile; name another") from None
    if tensors is None:
        return
    check_target(tensors)
    if tensors.exists() and named != tensors.name:
        raise InputError(
            f"{tensors}: is there already and would be replaced by what belongs to {path.name}; "
            "name another"
        )
