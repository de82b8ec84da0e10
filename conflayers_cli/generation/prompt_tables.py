"""Rows of tables: CSV and TSV, Parquet, and data sets of Hugging Face."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_forms import KEYS, NAMES
from conflayers_cli.generation.prompt_types import Row
from conflayers_cli.utils.json_stream import quoted
from conflayers_cli.utils.text_files import open_file
from conflayers_cli.utils.text_stream import MAX_ROW, TextStream

DEFAULT_SPLIT = "train"
_SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that ``save_to_disk`` has written."""

_HEADER_LOOKED_AT = 1 << 16
_BATCH = 64
"""Rows of a Parquet file that are decoded at once."""
_MAX_CAUSE = 200
"""Characters of another package's error."""


def csv_rows(stream: TextStream, delimiter: str | None) -> Generator[Row]:
    """A row for each record behind the header, which names the columns.

    Args:
        delimiter: None: a comma, or what spreadsheets write in its place where it is a decimal
            mark, by the header.

    Raises:
        InputError: it is not CSV, or a record has more or fewer fields than the header.
    """
    if delimiter is None:
        # by lines: a tab in front is a column without a name, as pandas writes its index
        while (first := stream.peek_line(_HEADER_LOOKED_AT)) and not first.strip():
            stream.take_line()
        delimiter = _delimiter(first or "")
    records = _records(stream, delimiter)
    _, header = next(records, (0, []))
    header = [name.strip() for name in header]
    _check_columns(stream.name, header)
    for number, (line, fields) in enumerate(records, 1):
        where = f"{stream.name}:{line}"
        while len(fields) > len(header) and not fields[-1]:
            fields.pop()
        if len(fields) != len(header):
            raise InputError(
                f"{where}: has {len(fields)} fields, and the header {len(header)}; a text with "
                f"{_SAID.get(delimiter, quoted(delimiter))} or a line end in it needs quotes"
            )
        value = {
            name: None if name in NAMES and not field else field
            for name, field in zip(header, fields, strict=True)
        }
        yield Row(number, where, f"line {line}", value)


def _check_columns(name: str, columns: Sequence[str]) -> None:
    for column, count in Counter(columns).items():
        if column and count > 1:
            raise InputError(f"{name}: has the column {quoted(column)} twice")


_SAID: Mapping[str, str] = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}


def _delimiter(header: str) -> str:
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


class _Lines:
    """Lines for `csv.reader`, which asks for as many as a record has."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._size = 0

    def begin_record(self) -> None:
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.take_line()
        if not line:
            raise StopIteration
        self._size += len(line)
        if self._size > MAX_ROW:
            raise InputError(
                f"{self._stream.name}:{self._stream.line - 1}: a row of more than {MAX_ROW:,} "
                "characters ends here, which are allowed (is a quote not closed?)"
            )
        return line


def _records(stream: TextStream, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every record that has any text."""
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = stream.line
        lines.begin_record()
        # The limit is the process's; that of rows is `MAX_ROW`, which `_Lines` holds to.
        before = csv.field_size_limit(MAX_ROW + 1)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problem = f"{error} (is a quote not closed?)"
            if str(error).startswith("new-line character"):  # Python's own advice is about open()
                problem = "a carriage return without quotes (lines end in \\n or \\r\\n)"
            raise InputError(f"{stream.name}:{line}: is not valid CSV: {problem}") from None
        finally:
            csv.field_size_limit(before)
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield line, fields


def parquet_rows(path: Path, column: str | None = None) -> Generator[Row]:
    """The rows of a Parquet file.

    Columns that no form has are not read, they may be pictures or dates out of range: they are
    None. InputError: pyarrow, which reads it, is missing or can't.
    """
    name = str(path)
    wanted = KEYS if column is None else NAMES | {column}

    def load() -> Iterator[Mapping[str, object]]:
        opened = _parquet(name).ParquetFile(file)
        columns = opened.schema_arrow.names
        _check_columns(name, columns)
        read = [each for each in columns if each in wanted]
        for batch in opened.iter_batches(batch_size=_BATCH, columns=read):
            for row in batch.to_pylist():
                yield {**dict.fromkeys(columns), **row}

    with open_file(path) as file:
        yield from _package_rows(name, "pyarrow", load)


def _parquet(name: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name}: Parquet is read by pyarrow, which is missing: pip install pyarrow"
        ) from None
    return pyarrow.parquet


def dataset_rows(name: str, data_set: str) -> Generator[Row]:
    """The rows of a data set of Hugging Face, fetched as they are asked for.

    Args:
        name: for errors.
        data_set: ``OWNER/NAME``, with ``/CONFIG`` if it has several and ``:SPLIT`` if it is not
            `DEFAULT_SPLIT`; or a folder, as one that ``save_to_disk`` has written, for them.

    Raises:
        InputError: the package datasets, which reads it, is missing or can't.
    """
    source, _, split = data_set.partition(":")
    folder = Path(source).expanduser() if source else None
    is_folder = folder is not None and folder.is_dir()
    parts = [str(folder)] if is_folder else source.split("/", 2)
    if not all(parts):
        raise InputError(f"{name}: is no data set; hf:OWNER/NAME[/CONFIG][:SPLIT] is")
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None

    def load() -> Iterable[Mapping[str, object]]:
        try:
            import datasets
        except ImportError:
            raise InputError(
                f"{name}: is read by Hugging Face's datasets, which is missing: "
                "pip install datasets"
            ) from None
        if folder is not None and any((folder / each).is_file() for each in _SAVED):
            return _saved(datasets.load_from_disk(str(folder)), name, split)
        split_name = split or DEFAULT_SPLIT
        # a part of a split, train[:10], has to be there as a whole
        streaming = "[" not in split_name
        loaded: Iterable[Mapping[str, object]] = datasets.load_dataset(
            repository, config, split=split_name, streaming=streaming
        )
        return loaded

    return _package_rows(name, "datasets", load)


def _saved(found: Any, name: str, split: str) -> Iterable[Mapping[str, object]]:
    """The rows of what ``save_to_disk`` has written: a data set, or several by their splits."""
    splits = list(found) if isinstance(found, dict) else []
    if not splits and not split:
        rows: Iterable[Mapping[str, object]] = found
        return rows
    wanted = split or DEFAULT_SPLIT
    if wanted not in splits:
        there = f"it has {', '.join(splits)}" if splits else "it has none, leave it out"
        raise InputError(f"{name}: has no split {wanted}; {there}")
    return found[wanted]


def _package_rows(
    name: str, package: str, load: Callable[[], Iterable[Mapping[str, object]]]
) -> Generator[Row]:
    """The rows that another package gives; whatever it raises becomes an `InputError`."""
    try:
        for number, value in enumerate(load(), 1):
            yield Row(number, f"{name}: row {number}", f"row {number}", dict(value))
    except InputError:
        raise
    except Exception as error:  # a broken file or network may raise anything
        cause = " ".join(str(error).split())[:_MAX_CAUSE].rstrip(".") or type(error).__name__
        raise InputError(f"{name}: can't be read by {package}: {cause}") from error
