"""Prompt files as people have them: formats, forms, encodings, rows skipped, and large ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.errors import InputError
from conflayers_cli.generation import prompt_tables
from conflayers_cli.generation.prompts import Message, Prompt, as_messages, read_prompts
from conflayers_cli.utils import text_files, text_stream
from conflayers_cli.utils.text_files import text_pieces

USER = Message("user", "Hi")
ASKED = [{"role": "user", "content": "Hi"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Hello"}]
SYSTEM_ITEM = {"role": "system", "content": "S"}
SYSTEM_FIRST = Prompt("1", messages=(Message("system", "S"), USER))
SYSTEM_FIRST_R = Prompt("r", messages=(Message("system", "S"), USER))
ASKED_ALONE = Prompt("1", messages=(USER,))


def write(folder: Path, content: str | bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, **options: Any) -> list[str | None]:
    return [prompt.text for prompt in read_prompts(path, **options)]


def refusal(path: Path, **options: Any) -> str:
    """The one line with which a file is refused, the path taken off."""
    with pytest.raises(InputError) as caught:
        read_prompts(path, **options)
    message = str(caught.value)
    assert message.startswith(path.as_posix())
    assert "\n" not in message
    return message.removeprefix(path.as_posix()).removeprefix(":")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "prompt_id": "x", "messages": ANSWERED}, Prompt("1", messages=(USER,))),
        ({"conversations": ANSWERED}, Prompt("1", messages=(USER,))),
        ({"messages": [{"from": "human", "value": "Hi"}]}, Prompt("1", messages=(USER,))),
        ({"prompt": ["Hi", "More"], "category": "c"}, Prompt("1", text="Hi", category="c")),
        ({"prompt": ASKED, "completion": ANSWERED[1:]}, Prompt("1", messages=(USER,))),
        ({"instruction": "Do", "input": "it", "output": "ok"}, Prompt("1", text="Do\n\nit")),
        ({"instruction": "Do", "input": "", "output": "ok"}, Prompt("1", text="Do")),
        ({"instruction": "Do", "input": None}, Prompt("1", text="Do")),
        ({"question": "2 + 2?", "answer": "4"}, Prompt("1", text="2 + 2?")),
        ({"article": "News", "highlights": "n", "id": "ab"}, Prompt("ab", text="News")),
        ({"prompt": "Hi", "question": "other"}, Prompt("1", text="Hi")),
        ({"custom_id": "r", "body": {"messages": ASKED}}, Prompt("r", messages=(USER,))),
        ({"custom_id": "r", "body": {"prompt": "Hi"}}, Prompt("r", text="Hi")),
        ({"custom_id": "r", "params": {"system": "S", "messages": ASKED}}, SYSTEM_FIRST_R),
        ({"prompt": "Hi", "system_prompt": "S"}, SYSTEM_FIRST),
        ({"conversations": ASKED, "system": "S", "tools": "[]"}, SYSTEM_FIRST),
        ({"messages": [SYSTEM_ITEM, *ASKED], "system": "other"}, SYSTEM_FIRST),
        (
            {"instruction": "Hi", "history": [["a", "b"]]},
            Prompt("1", messages=(Message("user", "a"), Message("assistant", "b"), USER)),
        ),
        ({"instruction": "Do", "context": "c"}, Prompt("1", text="Do\n\nc")),
        ({"question": "Why?", "context": "c"}, Prompt("1", text="c\n\nWhy?")),
        ({"question": "Why?", "context": {"title": ["c"]}}, Prompt("1", text="Why?")),
        ({"conversation": ANSWERED}, Prompt("1", messages=(USER,))),
        ({"messages": json.dumps(ANSWERED)}, Prompt("1", messages=(USER,))),
        ({"messages": [*ASKED, {"role": "assistant", "content": None}]}, ASKED_ALONE),
        ({"messages": [{"role": "developer", "content": "S"}, *ASKED]}, SYSTEM_FIRST),
        ({"prompt": None, "messages": None, "question": "Hi"}, Prompt("1", text="Hi")),
    ],
)
def test_forms(tmp_path: Path, row: dict[str, object], expected: Prompt) -> None:
    assert read_prompts(write(tmp_path, json.dumps(row), "p.jsonl"), strict=True) == [expected]


def test_a_row_with_two_forms_is_refused_until_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "q", "article": "a"}', "p.jsonl")
    assert refusal(path) == (
        "1: has question and article; keep one of them, or say which: column NAME"
    )
    assert texts(path, column="article") == ["a"]


@pytest.mark.parametrize("value", ["Hi", ["Hi", "More"], ASKED])
def test_a_column_is_the_prompt(tmp_path: Path, value: object) -> None:
    path = write(tmp_path, json.dumps({"prompt": "no", "mine": value}), "p.jsonl")
    (prompt,) = read_prompts(path, column="mine")
    assert as_messages(prompt) == ASKED


def test_a_column_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, '{"instruction": "Do", "input": "it"}', "p.jsonl")
    assert texts(path, column="instruction") == ["Do"]


def test_a_file_without_a_known_form_names_its_columns(tmp_path: Path) -> None:
    row = '{"text": "a", "label": 1}'
    for name, content in (("p.jsonl", row), ("p.csv", "text,label\na,1\n")):
        message = refusal(write(tmp_path, f'{content}\n{{"prompt": "fine"}}', name))
        assert 'is no known form (keys: "text", "label"); give column NAME' in message
        message = refusal(tmp_path / name, column="txt")
        assert 'has no column "txt"; give column NAME as one of its keys: "text", "label"' in (
            message
        )
    path = write(tmp_path, row, "p.jsonl")
    assert texts(path, column="text") == ["a"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "a", "image": "b.png"},
            "1: has image, and only text is read; give column NAME",
        ),
        ({"prompt": "a", "system": 3}, "1: system is a number, not a text"),
        ({"instruction": "a", "history": [["b"]]}, "1: turn 1 of history is not a list of a"),
        ({"instruction": "a", "history": "b"}, "1: history is a text, not a list of turns"),
        ({"messages": "[1"}, "1: messages is a text, not a list of messages"),
    ],
)
def test_what_is_beside_a_prompt_is_not_passed_over(
    tmp_path: Path, row: dict[str, object], problem: str
) -> None:
    path = write(tmp_path, json.dumps(row), "p.jsonl")
    assert refusal(path).startswith(problem)
    if "prompt" in row:
        assert texts(path, column="prompt") == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.yaml", b"- prompt: a\n", " is YAML, which is not read"),
        ("p.txt", b'[{"prompt": "a"}]', "1: opens JSON, and not with an object a line"),
        ("p.txt", b'\n[\n"a"\n]', "2: opens JSON, and not with an object a line"),
        ("p", b'{\n"prompt": "a"}', "1: opens JSON, and not with an object a line"),
        ("p.txt", b'{"prompt": "a",}', "1: is not valid JSON"),
        (
            "p.jsonl",
            gzip.compress(b"a", mtime=0),
            " is compressed by gzip: gunzip FILE, or name it .gz",
        ),
        ("p.zst", b"\x28\xb5\x2f\xfd\x04", " is compressed by zstd: zstd -d FILE"),
        ("p.xlsx", b"PK\x03\x04\x14", " is a ZIP archive or a workbook"),
        ("p.jsonl.gz", b'{"prompt": "a"}', " can't be decompressed: "),
        ("p.txt.gz", gzip.compress(b"a\n" * 999, mtime=0)[:-9], " can't be decompressed: "),
    ],
)
def test_what_is_no_prompt_file(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    assert refusal(write(tmp_path, content, name)).startswith(problem)


def test_addresses_and_the_dash_are_explained() -> None:
    assert "is an address, and files are not" in refusal(Path("https://example.org/p.jsonl"))
    assert refusal(Path("-")) == " there is no such file; standard input is /dev/stdin"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    known: dict[str, Any] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress = known[suffix]
    assert texts(write(tmp_path, compress(b'["a", "b"]'), f"p.json.{suffix}")) == ["a", "b"]
    assert texts(write(tmp_path, compress(b"prompt\na\n"), f"p.csv.{suffix}")) == ["a"]
    many = write(tmp_path, compress(b"a\n" * 100_000), f"p.txt.{suffix}")
    assert texts(many, limit=2) == ["a", "a"]


def test_the_command_line_names_its_flag(tmp_path: Path) -> None:
    from conflayers_cli.cli.flags import in_flags

    with pytest.raises(InputError) as caught:
        read_prompts(write(tmp_path, '{"text": "a"}', "p.jsonl"))
    assert "give --prompt-column NAME, the key" in in_flags(caught.value)


# JSON


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "prompt": "a",\n "id": "x"\n}\n', ["a"]),
        ('\n{"id": 3,\n\n "prompt": "a"}', ["a"]),
        ('{"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]}', ["a", "b"]),
        ('{\n "data": [\n  {"prompt": "a"},\n  {"prompt": "b"}],\n "more": [1]}', ["a", "b"]),
        ('{"rows": [{"question": "a"}]}', ["a"]),
        ('{"prompts": ["a", "b"]}', ["a", "b"]),
        ('{"train": [{"prompt": "a"}], "test": [{"prompt": "t"}]}', ["a"]),
        ('{"data": [1], "examples": [], "instances": [{"prompt": "a"}]}', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        # rows, not a file: prompts with a key of such a name
        ('{"data": [{"x": 1}], "prompt": "a"}\n{"data": [], "prompt": "b"}', ["a", "b"]),
        ('{"instruction": "a", "instances": [{"input": ""}]}', ["a"]),
        ('{\n"instruction": "a",\n"instances": [{"input": ""}]}', ["a"]),
    ],
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize("size", [1 << 16, 1])
def test_json_of_many_shapes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    expected: list[str],
    name: str,
    size: int,
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", size)
    path = write(tmp_path, content, name)
    assert texts(path, strict=True) == expected
    assert texts(path, limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{\n "prompt": "a",\n "id" "x"}', "3: is not valid JSON: expecting ':' delimiter (colum"),
        ('{\n "prompt": "a"', "2: is not valid JSON: expecting ',' delimiter (column 15)"),
        ('{\n "prompt": "a" "b"}', "2: is not valid JSON: expecting ',' delimiter (column 16)"),
        ('{\n "prompt": "a",}', "2: is not valid JSON: expecting property name enclosed in doub"),
        ('{\n "prompt": tru}', "2: is not valid JSON: expecting value (column 12)"),
        ('{\n "prompt": "a"}\n{\n"prompt": "b"}', "3: is not valid JSON: extra data (column 1)"),
        ('{\n "prompt": "a",\n "prompt": "b"}', '1: has the key "prompt" twice in one object'),
        ('{\n "prompt": "a", "x": {"k": 1,\n "k": 2}}', '2: has the key "k" twice in one object'),
        ('[{"prompt": "a"}] x', "1: is not valid JSON: extra data (column 19)"),
        ('[{"prompt": "a"},]', "1: is not valid JSON: expecting value (column 18)"),
        ('[{"prompt": "a"}', "1: is not valid JSON: expecting ',' delimiter (column 17)"),
        ('["a\nb"]', "1: is not valid JSON: invalid control character at (column 4)"),
        ('["abc', "1: is not valid JSON: unterminated string starting at (column 2)"),
        ('{"data": [{"prompt": "a"}], "rows": [{"prompt": "b"}]}', "1: has rows under data and u"),
        ('{"data": [{"prompt": "a"}],\n"prompt": "b"}', "1: has rows under data, and is a promp"),
        ("{}", "1: is no known form (keys: none)"),
        ("{\n}", "1: is no known form (keys: none)"),
        ('{"data": []}', '1: is no known form (keys: "data")'),
        ('{"data": [[1]]}', '1: is no known form (keys: "data")'),
    ],
)
@pytest.mark.parametrize("size", [1 << 16, 1])
def test_json_with_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str, size: int
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", size)
    assert refusal(write(tmp_path, content, "p.json")).startswith(problem)


def test_numbers_cut_in_the_midst_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "id": 10**n, "x": [-1.5e-7, True, None, 1e30]} for n in range(1, 9)]
    path = write(tmp_path, json.dumps({"n": 12.5e3, "data": rows}, indent=1), "p.json")
    for size in range(1, 9):
        monkeypatch.setattr(text_files, "_CHUNK", size)
        found = read_prompts(path)
        assert [prompt.id for prompt in found] == [str(10**n) for n in range(1, 9)]


# large files


class Counted:
    """A file of one endless array, which counts what is read of it."""

    def __init__(self, head: bytes, item: bytes) -> None:
        self._item = item
        self._held = head
        self.given = 0

    def read(self, size: int) -> bytes:
        while len(self._held) < size:
            self._held += self._item * 100
        given, self._held = self._held[:size], self._held[size:]
        self.given += len(given)
        return given


@pytest.mark.parametrize(
    ("suffix", "head", "item"),
    [
        (".json", b"[", b'{"prompt": "some text"},\n'),
        (".json", b"[", b'{"prompt": "some text"},'),
        (".json", b'{"version": 2, "data": [', b'{"prompt": "some text"},'),
        (".jsonl", b"", b'{"prompt": "some text"}\n'),
        (".csv", b"id,prompt\n", b',"some\ntext"\n'),
        (".txt", b"", b"some text\n"),
    ],
)
def test_no_more_is_read_than_the_limit_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, head: bytes, item: bytes
) -> None:
    source = Counted(head, item)
    path = write(tmp_path, "", f"p{suffix}")

    def pieces(read: object, name: str) -> Iterator[str]:
        return text_pieces(source.read, name)

    monkeypatch.setattr("conflayers_cli.generation.prompt_rows.text_pieces", pieces)
    assert len(read_prompts(path, limit=1000)) == 1000
    # the first line is looked at to its end, or for a MiB
    assert source.given < 1000 * len(item) + (1 << 21 if b'"data"' in head else 1 << 17)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    done = threading.Event()

    def writer() -> None:
        with path.open("wb", buffering=0) as file:
            file.write(b'[{"prompt": "a"}, {"prompt": "b"}, ')
            done.wait(30)

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        assert texts(path, limit=2) == ["a", "b"]
    finally:
        done.set()
        thread.join()


def test_the_bound_is_on_a_row_not_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (text_stream, prompt_tables):
        monkeypatch.setattr(module, "MAX_ROW", 1000)
    monkeypatch.setattr("conflayers_cli.generation.prompt_rows.MAX_ROW", 1000)
    monkeypatch.setattr(text_files, "_CHUNK", 64)
    row, long = json.dumps({"prompt": "x" * 900}), json.dumps({"prompt": "x" * 2000})
    for name, form in {"p.json": "[{}]", "q.json": '{{"data": [{}]}}'}.items():
        assert len(read_prompts(write(tmp_path, form.format(", ".join([row] * 20)), name))) == 20
        message = refusal(write(tmp_path, form.format(f"{row}, {long}, {row}"), name))
        assert "is the start of a row of more than 1,000 characters" in message
    many = "\n".join([row] * 20)
    assert len(read_prompts(write(tmp_path, many, "p.jsonl"))) == 20
    assert refusal(write(tmp_path, f"{row}\n{long}\n{row}", "p.jsonl")).startswith("2: is the st")
    assert refusal(write(tmp_path, long, "p.json")).startswith("1: is the start of a row")
    assert refusal(write(tmp_path, '{\n"a": 1,' + long[1:], "p.json")).startswith("2: is the st")
    assert len(read_prompts(write(tmp_path, "prompt\n" + f"{'x' * 900}\n" * 9, "p.csv"))) == 9
    unclosed = 'prompt\n"' + "x" * 90 + "\n" + "x\n" * 2000
    assert "1,000 characters ends here" in refusal(write(tmp_path, unclosed, "p.csv"))


def test_blank_space_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "MAX_ROW", 1000)
    monkeypatch.setattr(text_files, "_CHUNK", 64)
    blank = " \n" * 5000
    path = write(tmp_path, f'{blank}[{blank}{{"prompt": "a"}}{blank},{blank}"b"]{blank}', "p.json")
    assert texts(path) == ["a", "b"]


# tables


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.csv", "id,prompt\nx,Why?\ny,How?\n", [("x", "Why?"), ("y", "How?")]),
        ("p.CSV", "\ufeffprompt,other\r\nWhy?,1\r\n\r\nHow?,2", [("1", "Why?"), ("2", "How?")]),
        ("p.csv", 'prompt\n"a ""b"", c\nd"\n', [("1", 'a "b", c\nd')]),
        ("p.csv", "prompt;n\na, b;1\n", [("1", "a, b")]),
        ("p.csv", 'id,prompt\n,"a"\n,\n,b,\n', [("1", "a"), ("2", "b")]),
        ("p.csv", ",prompt\n0,a\n1,b\n", [("1", "a"), ("2", "b")]),
        ("p.csv", "\n\tprompt\tn\n0\ta\t\n", [("1", "a")]),
        ("p.csv", "instruction,input\nDo,it\nGo,\n", [("1", "Do\n\nit"), ("2", "Go")]),
        ("p.tsv", "id\tprompt\nx\ta, b\n", [("x", "a, b")]),
        ("p.tsv", '\tprompt\n0\t"a\tb"\n', [("1", "a\tb")]),
        ("p.csv", "prompt\na\u2028b\n", [("1", "a\u2028b")]),
    ],
)
@pytest.mark.parametrize("size", [1 << 16, 1])
def test_csv_and_tsv(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    expected: list[tuple[str, str]],
    size: int,
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", size)
    found = read_prompts(write(tmp_path, content, name), strict=True)
    assert [(prompt.id, prompt.text) for prompt in found] == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", " has no prompts"),
        ("prompt\n", " has no prompts"),
        ("prompt,prompt\na,b\n", ' has the column "prompt" twice'),
        ("prompt,n\na,1\nb, or c,2\n", "3: has 3 fields, and the header 2; a text with a comma"),
        ("n,prompt\n1,a\n2\n", "3: has 1 fields, and the header 2"),
        ('prompt\na\n"b\n\n', "3: is not valid CSV: unexpected end of data (is a quote not close"),
        ('prompt\n"a" b\n', "2: is not valid CSV: ',' expected after '\"'"),
        ("prompt\na\rb\n", "2: is not valid CSV: a carriage return without quotes"),
        ("id,prompt\nx,a\nx,b\n", '3: the id "x" is taken by'),
    ],
)
def test_csv_with_faults(tmp_path: Path, content: str, problem: str) -> None:
    assert refusal(write(tmp_path, content, "p.csv")).startswith(problem)


def test_fields_of_csv_may_be_long_and_pythons_limit_stays(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    text = "x" * (before + 1)
    assert texts(write(tmp_path, f"prompt\n{text}\n", "p.csv")) == [text]
    assert csv.field_size_limit() == before


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": str(n), "messages": ANSWERED, "n": n} for n in range(200)]
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert read_prompts(path)[150] == Prompt("150", messages=(USER,))
    assert len(read_prompts(path, limit=3)) == 3
    assert "can't be read by pyarrow" in refusal(write(tmp_path, b"PAR1 or not", "q.parquet"))


def test_parquet_reads_the_columns_that_it_needs(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    far = arrow.array([2**62, 0], arrow.timestamp("us"))  # which Python can't say
    text = arrow.array(["a", None]).dictionary_encode()
    parquet.write_table(arrow.table({"prompt": text, "when": far, "more": ["b", "c"]}), path)
    assert texts(path) == ["a"]
    assert texts(path, column="more") == ["b", "c"]
    assert 'keys: "prompt", "when", "more"' in refusal(path, column="x")
    twice = arrow.Table.from_arrays([text, text], names=["prompt", "prompt"])
    parquet.write_table(twice, path)
    assert refusal(path) == ' has the column "prompt" twice'
    parquet.write_table(arrow.table({"prompt": ["a"]}), path)
    damaged = bytearray(path.read_bytes())
    damaged[4:12] = b"\x0e" * 8  # the header of a page: pyarrow's error has two lines
    assert refusal(write(tmp_path, bytes(damaged), "q.parquet")).startswith(" can't be read by py")


def test_a_folder_is_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_list([{"conversations": ANSWERED, "id": "x"}])
    found.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": found}).save_to_disk(tmp_path / "more")
    for name in ("one", "more:test"):
        assert read_prompts(Path(f"hf:{tmp_path}/{name}")) == [Prompt("x", messages=(USER,))]
    assert "has no split train; it has test" in refusal(Path(f"hf:{tmp_path}/more"))
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain", '{"prompt": "a"}', "train.jsonl")
    assert texts(Path(f"hf:{tmp_path}/plain")) == ["a"]


class Rows:
    """Rows of another package, which may have a fault at the end."""

    def __init__(self, rows: Sequence[dict[str, Any]], fault: Exception | None = None) -> None:
        self.rows, self.fault, self.given = rows, fault, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.given += 1
            yield row
        if self.fault:
            raise self.fault


def test_parquet_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class File:
        def __init__(self, file: Any) -> None:
            if file.read() != b"PAR1":
                raise ValueError("no magic bytes.\nmore")
            self.schema_arrow = SimpleNamespace(names=["question", "picture"])

        def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
            assert columns == ["question"]
            for begin in range(0, 1000, batch_size):
                given.append(begin)
                rows = [{"question": str(begin + n)} for n in range(batch_size)]
                yield SimpleNamespace(to_pylist=lambda rows=rows: rows)

    package, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    vars(module)["ParquetFile"] = File
    vars(package)["parquet"] = module
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    path = write(tmp_path, b"PAR1", "p.parquet")
    assert texts(path, limit=70) == [str(n) for n in range(70)]
    assert len(given) == 2
    broken = write(tmp_path, b"text", "q.pq")
    assert refusal(broken) == " can't be read by pyarrow: no magic bytes. more"
    assert refusal(tmp_path / "none.parquet") == " there is no such file"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refusal(path) == (" Parquet is read by pyarrow, which is missing: pip install pyarrow")


def test_data_sets_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    rows = Rows([{"question": f"q{n}", "answer": "a"} for n in range(10)])

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if split == "none":
            raise ValueError('Bad split: none.\nAvailable splits: ["train"]')
        if split == "test":
            return Rows(rows.rows, OSError("the network is gone"))
        return rows

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = read_prompts(Path("hf:openai/gsm8k/main"), limit=3)
    assert found == [Prompt(str(n + 1), text=f"q{n}") for n in range(3)]
    assert rows.given == 3
    assert texts(Path("hf:squad:validation"), column="answer", limit=1) == ["a"]
    assert len(read_prompts(Path("hf:a/b:train[:10]"))) == 10
    assert asked == [
        ("openai/gsm8k", "main", "train", True),
        ("squad", None, "validation", True),
        ("a/b", None, "train[:10]", False),
    ]
    assert refusal(Path("hf:x:none")) == (
        ' can\'t be read by datasets: Bad split: none. Available splits: ["train"]'
    )
    assert refusal(Path("hf:x:test")) == " can't be read by datasets: the network is gone"
    assert refusal(Path("hf:x"), column="other").startswith(' row 1: has no column "other"')
    for bad in ("hf:", "hf:a//b", "hf::test"):
        if Path(bad).as_posix() == bad:
            assert refusal(Path(bad)) == " is no data set; hf:OWNER/NAME[/CONFIG][:SPLIT] is"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(Path("hf:openai/gsm8k")).endswith("missing: pip install datasets")


def test_a_file_comes_before_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a\n", "hf:notes")
    assert texts(Path("hf:notes")) == ["a"]


# rows that are no prompts


def test_skipped_rows_are_counted_by_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty: dict[str, Any] = {"conversations": []}
    alien = {"messages": [{"role": "tool", "content": "x"}]}
    silent = {"messages": ANSWERED[1:]}
    rows = [empty, {"prompt": "a"}, empty, alien, silent, {"prompt": " "}, {"x": 1}, [1]]
    path = write(tmp_path, "\n\n".join(map(json.dumps, rows)), "p.jsonl")
    assert texts(path) == ["a"]
    assert caplog.messages == [
        f"note: skipped 7 of 8 rows of {path}: 2 empty conversations (the first at line 1), 1 with "
        "an unknown speaker (line 7), 1 with nothing of the user to answer (line 9), 1 without "
        "usable text (line 11), 2 of no known form (the first at line 13)"
    ]
    assert refusal(path, strict=True) == "1: conversations is an empty list, not a list of messages"
    caplog.clear()
    assert texts(path, limit=1) == ["a"]
    assert caplog.messages == [
        f"note: skipped 1 of 2 rows of {path}: 1 empty conversation (line 1)"
    ]


def test_places_of_items_and_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_prompts(write(tmp_path, '["a", "", "b"]', "p.json"))
    read_prompts(write(tmp_path, 'id,prompt\n1,"a\nb"\n2,\n', "p.csv"))
    assert [message.partition(": 1 ")[2] for message in caplog.messages] == [
        "without usable text (item 2)",
        "without usable text (line 4)",
    ]


def test_a_file_of_nothing_but_skipped_rows_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, '{"prompt": ""}\n{"messages": []}\n{"prompt": null}', "p.jsonl")
    assert refusal(path) == (
        " none of its 3 rows is a prompt: 2 without usable text (the first at line 1), "
        "1 empty conversation (line 2)"
    )
    assert refusal(write(tmp_path, '\n{"prompt": ""}', "p.jsonl")) == "2: prompt is empty"
    assert caplog.messages == []


# encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("size", [1 << 16, 5, 1])
def test_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, size: int
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", size)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    content = mark + "naïve 🙂\r\n日本語\n".encode(encoding)
    assert texts(write(tmp_path, content, "p.txt")) == ["naïve 🙂", "日本語"]
    content = mark + '[{"prompt": "é🙂"}]'.encode(encoding)
    assert texts(write(tmp_path, content, "p.json")) == ["é🙂"]
    content = mark + "id,prompt\nx,é🙂\n".encode(encoding)
    assert texts(write(tmp_path, content, "p.csv")) == ["é🙂"]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a\ncafé\n".encode("latin-1"), "p.txt")
    assert refusal(path) == (
        "2: is not UTF-8 text; if it is Windows-1252: iconv -f cp1252 -t utf-8 FILE > NEW"
    )
    for encoding in ("utf-32", "utf-32-le", "utf-32-be"):
        mark = {"utf-32-le": b"\xff\xfe\0\0", "utf-32-be": b"\0\0\xfe\xff"}.get(encoding, b"")
        path = write(tmp_path, mark + "a".encode(encoding), "p.txt")
        assert "is UTF-32 text, which is not read" in refusal(path)
    odd = "a\nb".encode("utf-16") + b"\n"
    assert refusal(write(tmp_path, odd, "p.txt")) == "2: is not UTF-16-LE text"


def test_what_is_before_a_fault_is_given_first() -> None:
    for fault in (b"\xff", b"\0", b"\xe2\x82"):
        pieces = text_pieces(BytesIO("a🙂\nb".encode() + fault).read, "x")
        assert next(pieces) == "a🙂\nb"
        with pytest.raises(InputError, match=r"^x:2: "):
            next(pieces)


# anything


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["prompt", "messages", "role", "content", "user", "from", "value", "data", "turns"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")


def check_prompts_or_one_line(path: Path, **options: Any) -> None:
    try:
        prompts = read_prompts(path, **options)
    except InputError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        assert all(as_messages(prompt)[-1]["content"].strip() for prompt in prompts)


@settings(deadline=None, max_examples=60)  # files are written, and disks stall
@given(JSON, st.sampled_from([None, 1]), st.sampled_from([1, 7, 1 << 16]), st.booleans())
def test_any_json_is_prompts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    value: object,
    indent: int | None,
    size: int,
    strict: bool,
) -> None:
    folder = tmp_path_factory.mktemp("json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", size)
        for suffix in SUFFIXES[:3]:
            path = write(folder, json.dumps(value, indent=indent), f"p{suffix}")
            check_prompts_or_one_line(path, strict=strict)
            check_prompts_or_one_line(path, column="content", limit=1)


@settings(deadline=None, max_examples=60)  # files are written, and disks stall
@given(
    st.binary(max_size=60)
    | st.text(st.sampled_from('[]{}:,"\\ \r\n\tprompt1e-.;\ufeff\ud7ff'), max_size=60).map(
        lambda text: text.encode()
    )
)
def test_any_bytes_are_prompts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for suffix in SUFFIXES:
        check_prompts_or_one_line(write(folder, content, f"p{suffix}"))


@settings(deadline=None, max_examples=40)
@given(st.lists(JSON, min_size=1, max_size=4), st.integers(0, 10**6))
def test_an_array_is_read_as_python_reads_it(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], seed: int
) -> None:
    """However a file is cut into pieces, its rows are those of its text."""
    rows = [{"id": n, "prompt": json.dumps(value)} for n, value in enumerate(values)]
    path = write(tmp_path_factory.mktemp("array"), json.dumps({"data": rows}, indent=1), "p.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", random.Random(seed).randint(1, 40))
        assert texts(path) == [row["prompt"] for row in rows]


def test_answers_at_the_end_are_left_out_or_kept_to_be_continued(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"messages": ANSWERED, "system": "Be brief."}]
    rows.append({"conversations": [{"from": "gpt", "value": "Hello"}]})
    path = write(tmp_path, json.dumps(rows), "chats.json")
    answer = Message("assistant", "Hello")
    kept = read_prompts(path, keep_answer=True)
    system = Message("system", "Be brief.")
    assert [prompt.messages for prompt in kept] == [(system, USER, answer), (answer,)]
    assert [prompt.messages for prompt in read_prompts(path)] == [(system, USER)]
    with pytest.raises(InputError, match="continue_final_message goes on with a last message"):
        read_prompts(write(tmp_path, json.dumps([{"messages": ASKED}]), "a.json"), keep_answer=True)
