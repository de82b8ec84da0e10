"""The profile, what `calibrate` found for a model: its schema, reading and writing as YAML."""

from __future__ import annotations

from math import floor, isfinite, log10
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.errors import InputError
from conflayers_cli.outputs import write_atomically
from conflayers_cli.prompts import read_text

SCHEMA_VERSION: Final = 1
MAX_BYTES = 1_000_000

_HEADER = """\
# A conflayers profile: the sub-layers that the model below leaves out while it drafts.
# Use it with `conflayers generate --profile FILE`. It may be edited; reading it checks every key.
"""


def _list_to_tuple(value: object) -> object:
    # only lists: strict mode then refuses what else could be a sequence, a YAML !!set for one
    return tuple(value) if isinstance(value, list) else value


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
Layers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_list_to_tuple)]
Setting = Annotated[int | float | bool | str | None, PlainValidator(_setting)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelFingerprint(_Section):
    """What tells one model from another, as far as a profile cares."""

    name: Text
    architecture: Text
    depth: Size
    hidden_size: Size
    attention_heads: Size
    key_value_heads: Size
    intermediate_size: Size | None
    vocabulary: Size
    config_hash: Text

    def difference(self, other: ModelFingerprint) -> str | None:
        """How this model differs from ``other``, the profile's, in one line; None if it doesn't.

        The two differences that matter most are named. The name is not compared, for one model has
        many; the hash of the configuration counts only where all else is equal.
        """
        names = ("architecture", "depth", "hidden_size", "attention_heads", "key_value_heads")
        found = []
        for name in (*names, "intermediate_size", "vocabulary"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                label = name.replace("_", " ")
                found.append(f"{label} {_shown(here)} here, {_shown(there)} in the profile")
        if found:
            return "; ".join(found[:2])
        if self.config_hash != other.config_hash:
            return (
                "same sizes, but another configuration "
                f"(hash {self.config_hash[:12]} here, {other.config_hash[:12]} in the profile)"
            )
        return None


class SkipSection(_Section):
    """The layers whose attention or MLP is left out; in any order on input, sorted here."""

    attention: Layers
    mlp: Layers

    @field_validator("attention", "mlp", mode="after")
    @classmethod
    def _sorted_and_unique(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        for position, layer in enumerate(layers):
            if layer in layers[:position]:
                raise _layer_error(
                    str(position), f"{layer} is repeated, allowed is each layer once"
                )
        return tuple(sorted(layers))

    @classmethod
    def of(cls, plan: SkipPlan) -> SkipSection:
        """The section that says what ``plan`` says."""
        return cls(attention=plan.attention, mlp=plan.mlp)


class DraftSettings(_Section):
    """How long a draft may get, and below which confidence it ends early."""

    max_tokens: Annotated[int, Field(ge=0, le=64)]
    stop_probability: Share


class PromptsUsed(_Section):
    """How many prompts a calibration used, and their `conflayers_cli.prompts.fingerprint`."""

    count: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FoundBy(_Section):
    """The search that found the plan, so that it can be run again."""

    strategy: Text
    refined: bool
    settings: dict[str, Setting]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    prompts: PromptsUsed


class Measured(_Section):
    """What the plan reached when it was found; null is what was not measured."""

    acceptance_rate: Share | None
    tokens_per_step: Figure | None
    expected_speedup: Figure | None
    measured_speedup: Figure | None
    iterations: Count
    seconds: Figure
    conclusion: str


class Environment(_Section):
    """Where the figures come from."""

    device: Text
    dtype: Text
    threads: Size | None
    python: Text
    torch: Text
    transformers: Text
    conflayers: Text


class Profile(_Section):
    """A plan for one model with its draft settings, and how, where and with what gain it was found.

    What only a search can know, ``found_by``, ``measured``, ``environment`` and ``tensors``, may be
    left out: a person can write a profile.

    Raises:
        pydantic.ValidationError: (a ValueError) on construction with values that don't fit.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelFingerprint
    skip: SkipSection
    draft: DraftSettings
    found_by: FoundBy | None = None
    measured: Measured | None = None
    environment: Environment | None = None
    tensors: str | None = None

    @field_validator("skip", mode="before")
    @classmethod
    def _skip_fits_the_model(cls, value: object, info: ValidationInfo) -> object:
        # before the section sorts its lists, so that the position named is the one in the file
        model = info.data.get("model")
        if not isinstance(model, ModelFingerprint):
            return value  # its own error is reported
        lists = dict(value) if isinstance(value, dict | SkipSection) else {}
        for name in ("attention", "mlp"):
            layers = lists.get(name)
            for position, layer in enumerate(layers if isinstance(layers, list | tuple) else ()):
                whole = isinstance(layer, int) and not isinstance(layer, bool)
                if whole and not 1 <= layer <= model.depth - 2:
                    problem = f"{layer} is out of range, {_allowed_layers(model.depth)}"
                    raise _layer_error(f"{name}.{position}", problem)
        return value

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

    @property
    def plan(self) -> SkipPlan:
        """The sub-layers to leave out, as the engine takes them."""
        return SkipPlan(self.skip.attention, self.skip.mlp)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read and check a profile.

        Raises:
            InputError: the file can't be read or is larger than `MAX_BYTES`, is not plain YAML
                (repeated keys, anchors and tags that make objects are refused), has another schema
                version, or a key or value that the schema does not allow. One line, which names
                the place.
        """
        data = _parse_yaml(read_text(path, MAX_BYTES), path)
        if "schema_version" not in data:
            raise InputError(f"{path}: schema_version is missing, supported is {SCHEMA_VERSION}")
        version = data["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise InputError(
                f"{path}: schema_version: {_shown(version)} is not supported, "
                f"supported is {SCHEMA_VERSION}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{path}: {_first_problem(error)}") from None

    def to_yaml(self) -> str:
        """The profile as YAML for people: keys in the order of the schema, lists on one line.

        Figures measured and the draft's probability are rounded to four significant digits; the
        settings of the search are not, so that it can be run again exactly.
        """
        sections = self.model_dump(mode="json")
        data = {key: value for key, value in sections.items() if value is not None}
        for key in {"draft", "measured"} & data.keys():
            data[key] = {name: _rounded(value) for name, value in data[key].items()}
        body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=MAX_BYTES)
        return f"{_HEADER}{body}"

    def save(self, path: Path) -> None:
        """Write the profile as `to_yaml` gives it: all of it or, on failure, nothing.

        Raises:
            InputError: the folder does not exist, or ``path`` is a folder or a device.
            ConfLayersError: the file can't be written.
        """
        write_atomically(path, self.to_yaml())


def _layer_error(where: str, problem: str) -> PydanticCustomError:
    """An error at ``where`` below the field that is validated."""
    return PydanticCustomError("layer", "{where}: {problem}", {"where": where, "problem": problem})


def _allowed_layers(depth: int) -> str:
    if depth < 3:
        return f"a model of {depth} layers has none to leave out, allowed is an empty list"
    return f"allowed are 1–{depth - 2} (never the first and the last layer)"


class _Loader(yaml.SafeLoader):
    """Safe YAML without what no profile needs and a hostile file could use."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # aliases carry the anchor they refer to
            raise yaml.constructor.ConstructorError(
                None, None, "anchors and aliases are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are not allowed"
            elif isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {_shown(key.value)} is repeated"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Block style, but lists on one line, and never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML leaves some line breaks, U+0085 for one, unescaped in other styles and so loses them
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def _parse_yaml(text: str, path: Path) -> dict[Any, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader, made stricter
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: has a character that YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(error.problem or error.context).split())
        raise InputError(f"{place}: is not a valid profile: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except (ValueError, ArithmeticError) as error:  # a date or a number that there can't be
        raise InputError(f"{path}: has a value that can't be read: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: is not a profile: it holds {_shown(data)}, not keys and values")
    return data


def _first_problem(error: ValidationError) -> str:
    """The first validation error in one line: key, value, and what is allowed."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _problem(details[0]) + more


def _problem(detail: ErrorDetails) -> str:
    kind, message = detail["type"], detail["msg"]
    key = ".".join(_key(part) for part in detail["loc"])
    if kind == "layer":
        return f"{key}.{message}"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "extra_forbidden":
        return f"{key}: is no known key, allowed are {_allowed_keys(detail['loc'][:-1])}"
    value = _shown(detail["input"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: {value} should be keys and values"
    if kind == "tuple_type":
        return f"{key}: {value} should be a list"
    # pydantic says "Input should be …" or, of a text, "String should have …"
    _, should, allowed = message.partition("should")
    return f"{key}: {value} {should}{allowed}" if should else f"{key}: {value}: {message}"


def _allowed_keys(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Profile
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return ", ".join(section.model_fields)


def _key(part: int | str) -> str:
    plain = str(part)
    return plain if plain.isidentifier() or plain.isdigit() else _shown(plain)


def _shown(value: object) -> str:
    """A value as YAML would have it, short and in one line."""
    if isinstance(value, set):
        return "a set"
    if isinstance(value, dict | list | tuple):
        kind = "keys and values" if isinstance(value, dict) else "a list"
        return kind if value else f"nothing ({kind} without entries)"
    names: dict[object, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    shown = ascii(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _rounded(value: object) -> object:
    if not isinstance(value, float) or value == 0:
        return value
    return round(value, 3 - floor(log10(abs(value))))
