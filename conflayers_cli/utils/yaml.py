"""YAML read strictly and written for people.

Reading refuses what our files don't need and a hostile or mistyped one could hold: repeated and
merge keys, keys that are not strings, anchors, tags that make objects, and YAML 1.1's other
notations of numbers, in which ``010`` is 8 and ``1:30`` is 90. Errors are one line that names the
position, the value and what is allowed.
"""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from conflayers_cli.errors import InputError

_MAX_MESSAGE = 200
"""Characters of PyYAML's message about an error, which may quote the file."""
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I)


def parse_mapping(text: str, path: Path, kind: str) -> dict[Any, Any]:
    """The keys and values of a YAML text, as plain dictionaries, lists and scalars.

    Args:
        text: the whole file.
        path: its path, for errors.
        kind: what the file should be ("profile"), for errors.

    Raises:
        InputError: it is not YAML, uses more of YAML than is allowed here, is nested too deeply,
            holds an impossible number or date, or is no mapping.
    """
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader, made stricter
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: has a character that YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = _short(error.problem or error.context)
        raise InputError(f"{position}: is not a valid {kind}: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except (ValueError, ArithmeticError) as error:
        problem = _short(error)
        raise InputError(f"{path}: has a value that can't be read: {problem}") from None
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: is not a {kind}: it holds {format_value(data)}, not keys and values"
        )
    return data


def dump_mapping(data: dict[str, Any]) -> str:
    """YAML with the keys in the order given; a list of values takes one line, however long."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def entry_error(where: str, problem: str) -> PydanticCustomError:
    """What a validator raises about the entry ``where`` of its field, as in ``mlp.3``."""
    return PydanticCustomError("entry", "{where}: {problem}", {"where": where, "problem": problem})


def first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first validation error of ``schema`` in one line: key, value, and what is allowed."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _problem(details[0], schema) + more


def format_value(value: object) -> str:
    """A value as YAML would have it, short and in one line."""
    if isinstance(value, set):
        return "a set"
    if isinstance(value, dict | list | tuple):
        kind = "keys and values" if isinstance(value, dict) else "a list"
        return kind if value else f"nothing ({kind} without entries)"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = ascii(value) if isinstance(value, str) else str(value)
    except ValueError:  # Python's limit on the digits of a number
        return "a number with too many digits"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _short(problem: object) -> str:
    """PyYAML's message in one line of at most `_MAX_MESSAGE` characters."""
    text = " ".join(str(problem).split())
    return text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE - 1]}…"


def _problem(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, message = detail["type"], detail["msg"]
    key = ".".join(_key(part) for part in detail["loc"])
    if kind == "entry":
        return f"{key}.{message}"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "extra_forbidden":
        names = list(_section_at(detail["loc"][:-1], schema).model_fields)
        close = get_close_matches(str(detail["loc"][-1]), names, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        return f"{key}: is no known key, {meant}allowed are {', '.join(names)}"
    value = format_value(detail["input"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: {value} should be keys and values"
    if kind == "tuple_type":
        return f"{key}: {value} should be a list"
    # pydantic says "Input should be …" or, of a text, "String should have …"
    _, should, allowed = message.partition("should")
    return f"{key}: {value} {should}{allowed}" if should else f"{key}: {value}: {message}"


def _section_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str):  # a number is a position in a list, all of one kind
            schema = _section_in(schema.model_fields[part].annotation) or schema
    return schema


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section type in a field's annotation, which may be optional or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _key(part: int | str) -> str:
    plain = str(part)
    short = len(plain) <= 60 and plain.isascii()
    return plain if short and (plain.isidentifier() or plain.isdigit()) else format_value(plain)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses more, see the module."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:  # aliases carry the anchor they refer to
            raise yaml.constructor.ConstructorError(
                None, None, "anchors and aliases are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        # a tag such as !!set can be on a list: PyYAML, below, refuses it
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            problem = None
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are not allowed"
            elif not isinstance(key, yaml.ScalarNode):
                problem = "a key should be a text, not keys and values or a list"
            elif key.value in seen:
                problem = f"the key {format_value(key.value)} is repeated"
            elif key.tag != "tag:yaml.org,2002:str" and node.tag == "tag:yaml.org,2002:map":
                problem = f"the key {format_value(key.value)} should be a text: put it in quotes"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.constructor.ConstructorError:
            raise
        # PyYAML trusts tags: a value that does not fit its tag raises any of these
        except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            problem = f"{format_value(node.value)} can't be read: {error}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self._check_number(node, _INTEGER))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._check_number(node, _FLOAT)
        return float(super().construct_yaml_float(node))

    def _check_number(self, node: yaml.ScalarNode, form: re.Pattern[str]) -> str:
        text = str(self.construct_scalar(node))
        if not form.fullmatch(text):
            problem = f"{format_value(text)} is no plain decimal number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return text


# PyYAML's table holds functions, not names
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Block style, but lists of values on one line, and never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # a list of sections goes below its key, indented


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    values = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=values)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML leaves some line breaks, U+0085 for one, unescaped in other styles and so loses them
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)
