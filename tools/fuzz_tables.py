"""Readers of prompts for `fuzz` that Python's own readers, or pyarrow's tables, can be held to."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_rows import ROW_KEYS, file_rows, text_rows
from conflayers_cli.generation.prompts import parse_prompts, read_prompts
from conflayers_cli.utils.text_files import text_pieces
from conflayers_cli.utils.text_stream import TextStream
from tools.fuzz_corpus import MORE_LINES, PROMPT_LINES, PROMPT_TABLE, prompt_corpus
from tools.fuzz_reader import Reader

_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be", b"\xef\xbb\xbf": "utf-8"}
_Sound = Callable[[object, Path], str | None]


def readers(sound_prompts: _Sound) -> Iterator[Reader]:
    """All of them; Parquet where pyarrow is installed."""
    json_files = (".json", ".jsonl")
    forms = tuple(json.dumps(line).encode() for line in (*PROMPT_LINES, *MORE_LINES))
    yield Reader("json", _rows, _sound_json, json_files, _json_corpus(), refused=_refused_json)
    yield Reader("forms", read_prompts, sound_prompts, json_files, (*forms, b"\n".join(forms)))
    tables = (".csv", ".tsv")
    yield Reader("csv", _rows, _sound_csv, tables, _csv_corpus(), refused=_refused_csv)
    suffixes = (".txt", ".jsonl", ".csv", ".json")
    encoded = tuple(
        mark + text.decode().encode(encoding)
        for text in prompt_corpus()
        if not text.startswith(b"\xef")
        for mark, encoding in _MARKS.items()
    )
    yield Reader(
        "encodings", read_prompts, _sound_encoding, suffixes, encoded, refused=_refused_encoding
    )
    packed = tuple(gzip.compress(text, mtime=0) for text in prompt_corpus())
    yield Reader("gzip", read_prompts, _sound_gzip, (".jsonl.gz", ".txt.gz", ".csv.gz"), packed)
    if find_spec("pyarrow"):
        yield Reader("parquet", read_prompts, sound_prompts, (".parquet",), _parquet_corpus())


def _rows(path: Path) -> list[object]:
    """The rows of a file, which have to be the same however few bytes are given at once."""
    rows, error = _all(file_rows(path))
    data = path.read_bytes()
    size = 1 + len(data) % 7
    file = io.BytesIO(data)
    stream = TextStream(text_pieces(lambda _: file.read(size), str(path)), str(path))
    again, other = _all(text_rows(stream, path.suffix))
    # of two faults the one that is met first is told
    same = other is not None if error else other is None and json.dumps(rows) == json.dumps(again)
    if not same:
        raise ValueError(f"read {size} bytes at a time it is another file: {error}, {other}")
    if error is not None:
        raise error
    return rows


def _all(rows: Any) -> tuple[list[object], InputError | None]:
    found: list[object] = []
    try:
        found += (row.value for row in rows)
    except InputError as error:
        return found, error
    return found, None


def _text(path: Path) -> str | None:
    """The text of a file by its mark; None: it is none."""
    data = path.read_bytes()
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    try:
        text = data[len(mark) :].decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError:
        return None
    return None if "\0" in text or data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else text


def _by_python(text: str) -> list[list[object]]:
    """The rows that a text of JSON may have, by `json`."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return [[json.loads(line) for line in text.split("\n") if line.strip()]]
    inner = [whole[key] for key in ROW_KEYS & whole.keys()] if isinstance(whole, dict) else []
    lists = [each for each in (whole, *inner) if isinstance(each, list)]
    texts = [[{"prompt": v} if isinstance(v, str) else v for v in each] for each in lists]
    return texts if isinstance(whole, list) else [[whole], *texts]


def _sound_json(found: object, path: Path) -> str | None:
    text = _text(path)
    if text is None:
        return "it is no text, and is read"
    if not text.strip():
        return None if found == [] else "there is nothing, and rows are read"
    try:
        expected = _by_python(text)
    except (ValueError, RecursionError) as error:
        return f"Python's json does not read it: {error}"
    if json.dumps(found) not in map(json.dumps, expected):
        return "Python's json reads other rows"
    return None


def _refused_json(message: str, path: Path) -> str | None:
    text = _text(path)
    if text is None or not any(each in message for each in ("not valid JSON", "many digits")):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return f"Python's json reads it: {message[-200:]}"


def _records(path: Path) -> list[dict[str, object]] | None:
    """The rows of a table by `csv`, in whose header no name is twice; None: it is none."""
    text = _text(path)
    if text is None:
        return None
    first = next((line for line in text.split("\n") if line.strip()), "")
    mark = "\t" if path.suffix == ".tsv" else next((m for m in ",;\t" if m in first), ",")
    lines = io.StringIO(text, newline="\n")
    try:
        records = [r for r in csv.reader(lines, delimiter=mark, strict=True) if "".join(r).strip()]
    except csv.Error:
        return None
    header = [name.strip() for name in records[0]] if records else []
    rows: list[dict[str, object]] = []
    for record in records[1:]:
        if len(record) < len(header) or any(record[len(header) :]):
            return None
        rows.append(dict(zip(header, record[: len(header)], strict=True)))
    return rows


def _sound_csv(found: object, path: Path) -> str | None:
    records = _records(path)
    if records is None:
        return "Python's csv does not read it"
    names = ("id", "question_id", "category")
    for record in records:
        record.update({name: None for name in names if record.get(name) == ""})
    return None if found == records else "Python's csv reads other rows"


def _refused_csv(message: str, path: Path) -> str | None:
    if "CSV" not in message and "fields" not in message:
        return None
    return None if _records(path) is None else f"Python's csv reads it: {message[-200:]}"


def _sound_encoding(found: object, path: Path) -> str | None:
    text = _text(path)
    if text is None:
        return "it is no text, and is read"
    same = parse_prompts(text, str(path), path.suffix) == found
    return None if same else "decoded as a whole it has other prompts"


def _refused_encoding(message: str, path: Path) -> str | None:
    wrong = re.search(r": is not UTF-\S+ text|: has a NUL byte", message)
    return f"it is text: {message[-200:]}" if wrong and _text(path) is not None else None


def _sound_gzip(found: object, path: Path) -> str | None:
    plain = path.with_name(f"plain{path.with_suffix('').suffix}")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return None if read_prompts(plain) == found else "unpacked it has other prompts"


def _json_corpus() -> tuple[bytes, ...]:
    rows = [*PROMPT_LINES, *MORE_LINES]
    odd = {"n": [0.1, -1e-7, 1e30, 10**30, True, None, "🙂"], "prompt": '"\\/\b\n\u2028'}
    documents: tuple[Any, ...] = (rows, {"version": 1.5, "data": rows[:4]}, odd, [odd, "a", ""])
    texts = [
        json.dumps(document, indent=indent, ensure_ascii=indent is None)
        for document in (*documents, {"rows": [odd], "more": {"data": [1]}})
        for indent in (None, 1)
    ]
    return tuple(text.encode() for text in (*texts, "\n".join(map(json.dumps, rows))))


def _csv_corpus() -> tuple[bytes, ...]:
    wide = ",".join(f"c{n}" for n in range(20))
    return tuple(
        text.encode()
        for text in (
            PROMPT_TABLE,
            PROMPT_TABLE.replace("\n", "\r\n"),
            PROMPT_TABLE.replace(",", ";"),
            PROMPT_TABLE.replace(",", "\t"),
            f"prompt,{wide}\n" + ('"a, ""b""\n\nc"' + "," * 20 + "\n") * 5,
            "\ufeffprompt , id\r\n naïve 🙂 ,1\r\n\r\n,\r\n x ,2",
            "prompt\n" + "x" * 3000 + "\n\n'y'\n",
        )
    )


def _parquet_corpus() -> tuple[bytes, ...]:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": f"naïve {n % 3}", "id": n, "category": None} for n in range(40)]
    chats = [row for row in PROMPT_LINES if "conversations" in row] * 5
    tables = [pyarrow.Table.from_pylist(each) for each in (rows, chats)]
    tables.append(pyarrow.table({"turns": [["a", "b"], []], "x": [b"\xff", None]}))
    found = []
    for table in tables:
        for compression in ("none", "snappy", "gzip", "zstd"):
            file = io.BytesIO()
            kept = table.drop_columns([n for n in table.column_names if n in ("id", "other")])
            parquet.write_table(kept, file, compression=compression, row_group_size=16)
            found.append(file.getvalue())
    return tuple(found)
