"""Prompt files and data sets → their rows, read as far as they are asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_forms import ACCEPTED, FORMS
from conflayers_cli.generation.prompt_tables import csv_rows, dataset_rows, parquet_rows
from conflayers_cli.generation.prompt_types import Row
from conflayers_cli.utils.compressed import COMPRESSED, decompressed
from conflayers_cli.utils.json_stream import JsonReader, decode_json, quoted
from conflayers_cli.utils.text_files import open_file, text_pieces
from conflayers_cli.utils.text_stream import MAX_ROW, TextStream

HUB = "hf:"
"""Begins the name of a data set, in place of a file's."""
ROW_KEYS = frozenset({"data", "rows", "examples", "instances", "prompts", "train"})
"""Keys of an object under which a file's rows may be."""

_JSON_SUFFIXES = frozenset({".jsonl", ".json", ".jsonlines", ".ndjson"})
_CSV_SUFFIXES = {".csv": None, ".tsv": "\t", ".tab": "\t"}
_PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
_LINE_LOOKED_AT = 1 << 20
"""Characters of a first line that are looked at to tell JSON lines from one object."""
_BEGINS_ROW = '{"'
_BEGINS_OBJECT, _BEGINS_ARRAY = '{"', '[{"'
_YAML_SUFFIXES = frozenset({".yaml", ".yml"})
_ADDRESS = re.compile(r"(https?|s3|gs|ftp):/")
_HINT = f"; every line is one of {ACCEPTED}"


def file_rows(path: Path, column: str | None = None) -> Generator[Row]:
    """The rows of a file, or of a data set (``hf:NAME``).

    Args:
        column: the key of prompts' texts, if it is known: what has it is a row.

    Raises:
        InputError: from the first row on; it can't be read or is not what its name says.
    """
    if path.as_posix().startswith(HUB) and not path.exists():
        yield from dataset_rows(path.as_posix(), path.as_posix().removeprefix(HUB))
    elif path.suffix.lower() in _PARQUET_SUFFIXES:
        yield from parquet_rows(path, column)
    else:
        _check_name(path)
        plain, suffix = path, path.suffix.lower()
        if suffix in COMPRESSED:
            plain = path.with_suffix("")
        with open_file(path) as file:
            read = decompressed(file, str(path), suffix) if suffix in COMPRESSED else file.read
            stream = TextStream(text_pieces(read, str(path)), str(path))
            yield from text_rows(stream, plain.suffix.lower(), column)


def _check_name(path: Path) -> None:
    """Raise InputError for what can't be a prompt file by its name."""
    if path.suffix.lower() in _YAML_SUFFIXES:
        raise InputError(f"{path}: is YAML, which is not read as prompts: make it JSON or CSV")
    if os.path.exists(path):  # noqa: PTH110 - a name may be too long to ask Path
        return
    if _ADDRESS.match(path.as_posix()):
        raise InputError(
            f"{path}: is an address, and files are not fetched: download it first, or name a data "
            f"set as {HUB}OWNER/NAME"
        )
    if str(path) == "-":
        raise InputError("-: there is no such file; standard input is /dev/stdin")


def text_rows(stream: TextStream, suffix: str, column: str | None = None) -> Generator[Row]:
    """The rows in the text of a file with this suffix, in lower case."""
    if suffix in _CSV_SUFFIXES:
        yield from csv_rows(stream, _CSV_SUFFIXES[suffix])
    elif suffix in _JSON_SUFFIXES:
        yield from _json_rows(stream, column)
    else:
        yield from _line_rows(stream)


def _line_rows(stream: TextStream, as_json: bool | None = None) -> Generator[Row]:
    """A row for each line that is not blank; by default the first one says what they are."""
    while True:
        number = stream.line
        line = stream.take_line()
        if not line:
            return
        line = line.removesuffix("\n").removesuffix("\r")
        if not line.strip():
            continue
        if as_json is None:
            _check_first(line, f"{stream.name}:{number}")
            as_json = _is_json_object(line)
        value = decode_json(line, stream.name, number, _HINT) if as_json else {"prompt": line}
        yield _at_line(stream, number, value)


def _check_first(line: str, where: str) -> None:
    """Raise InputError where a text begins as JSON over several lines does, or as an array."""
    begin = line.strip()
    if begin in ("{", "[") or begin.startswith(_BEGINS_ARRAY):
        raise InputError(
            f"{where}: opens JSON, and not with an object a line: name the file .json, or put one "
            "object a line"
        )


def _json_rows(stream: TextStream, column: str | None) -> Generator[Row]:
    """The rows of JSON lines, of an array, or of an object over several lines."""
    reader = JsonReader(stream)
    begin = reader.peek()
    if begin == "[":
        yield from _array_rows(stream, reader)
        reader.end()
    elif begin == "{" and not _begins_lines(stream, column):
        yield from _object_rows(stream, reader, column)
    else:
        yield from _line_rows(stream, as_json=True)


def _begins_lines(stream: TextStream, column: str | None) -> bool:
    """Whether the first line is an object, and not one with the rows under a key."""
    line = stream.peek_line(min(_LINE_LOOKED_AT, MAX_ROW))
    if line is None:
        return False
    try:
        value = decode_json(line, stream.name, stream.line)
    except InputError:
        return False  # read as an object it says what is wrong, if anything is
    if not isinstance(value, dict) or _is_prompt(value, column):
        return True
    return not any(_are_rows(value.get(key)) for key in ROW_KEYS)


def _is_prompt(members: Mapping[str, object], column: str | None) -> bool:
    return column in members or not FORMS.isdisjoint(members)


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | str)


def _array_rows(stream: TextStream, reader: JsonReader) -> Generator[Row]:
    """The items of an array; a text is a prompt."""
    reader.take("[")
    number = 0
    if reader.peek() == "]":
        reader.take("]")
        return
    while True:
        number += 1
        value = reader.value()
        if isinstance(value, str):
            value = {"prompt": value}
        yield Row(number, f"{stream.name}: item {number}", f"item {number}", value)
        if reader.take(",]") == "]":
            return


def _object_rows(stream: TextStream, reader: JsonReader, column: str | None) -> Generator[Row]:
    """The rows under a key of an object; else the object is a row, as may be further lines."""
    line = stream.line
    where = f"{stream.name}:{line}"
    members: dict[str, object] = {}
    rows_under = None
    size = 0
    reader.take("{")
    empty = reader.peek() == "}"
    mark = reader.take("}") if empty else ","
    while mark == ",":
        key = reader.key()
        if key in members:
            raise InputError(f"{where}: has the key {quoted(key)} twice in one object")
        if key in ROW_KEYS and not _is_prompt(members, column) and reader.opens(_BEGINS_ROW):
            if rows_under is not None:
                raise InputError(
                    f"{where}: has rows under {rows_under} and under {key}; keep one of them"
                )
            rows_under, members[key] = key, None
            yield from _array_rows(stream, reader)
        else:
            members[key] = reader.value()
            size += len(key) + reader.size
            stream.check_size(size)
        mark = reader.take(",}")
    if rows_under is None:
        yield _at_line(stream, line, members)
        if stream.line == line and not (stream.peek_line(MAX_ROW) or "").strip():
            stream.take_line()
            yield from _line_rows(stream, as_json=True)
            return
    elif _is_prompt(members, column):
        raise InputError(f"{where}: has rows under {rows_under}, and is a prompt beside them")
    reader.end()


def _at_line(stream: TextStream, line: int, value: object) -> Row:
    return Row(line, f"{stream.name}:{line}", f"line {line}", value)


def _is_json_object(line: str) -> bool:
    if line.lstrip().startswith(_BEGINS_OBJECT):
        return True  # or meant to be; reading it will say what is wrong
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except RecursionError:
        return True  # JSON all the same; reading it will say what is wrong
    except ValueError:
        return False
