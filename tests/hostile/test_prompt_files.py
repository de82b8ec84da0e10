"""Prompt files, arguments and pipes that are broken or mean harm: one line, code 2, in bounds."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.generation import prompts
from conflayers_cli.generation.prompts import parse_prompts
from conflayers_cli.utils import text_files
from conflayers_cli.utils.text_files import read_stream, read_text
from tests.hostile.conftest import Refuse

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "latin-1": ("p.jsonl", b'{"prompt": "\xe9"}', "1: is not UTF-8 text"),
    "UTF-16": ("p.txt", b"\xff\xfeh\0i", "1: is not UTF-16-LE text"),
    "UTF-32": ("p.txt", "hello".encode("utf-32"), " is UTF-32 text"),
    "UTF-16 without a mark": ("p.txt", "hello".encode("utf-16-le"), "1: has a NUL byte"),
    "cut in a character": ("p.txt", b"a\ncaf\xc3", "2: is not UTF-8 text"),
    "NUL": ("p.txt", b"a\nb\0c", "2: has a NUL byte"),
    "nested arrays": ("p.json", b"[" * 10_000 + b"]" * 10_000, "1: is nested too deeply"),
    "nested objects": ("p.jsonl", b'{"prompt": ' + b'{"a": ' * 99_999, "1: is nested too deeply"),
    "empty": ("p.jsonl", b"", " has no prompts"),
    "blank": ("p.txt", b"\n \r\n\t\n", " has no prompts"),
    "lone CR between objects": ("p.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}', "1: is not valid"),
    "numbers": ("p.json", b"[" + b"1," * 99_999 + b"1]", " item 1: is a number"),
    "a number of 5,000 digits": ("p.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "1: has a number"),
    "an id of 4,000 digits": (
        "p.jsonl",
        b'{"prompt": "a", "id": ' + b"9" * 4000 + b"}",
        "1: id has 4,000 characters, allowed are 256",
    ),
    "a long id": (
        "p.jsonl",
        b'{"prompt": "a", "id": "' + b"x" * 200_000 + b'"}',
        "1: id has 200,000 characters",
    ),
    "a long category": (
        "p.jsonl",
        b'{"prompt": "a", "category": "' + b"x" * 257 + b'"}',
        "1: category has 257 characters",
    ),
    "infinite id": ("p.jsonl", b'{"prompt": "a", "id": Infinity}', "1: id is a number, not"),
    "half a pair": ("p.jsonl", b'{"prompt": "\\ud83d"}', "1: has \\ud83d, half a surrogate pair"),
    "half a pair as a key": ("p.jsonl", b'{"\\ud83d": 1}', '1: is no known form (keys: "\\ud83d")'),
    "repeated key": (
        "p.jsonl",
        b'{"prompt": "a", "prompt": "b"}',
        '1: has the key "prompt" twice in one object',
    ),
    "repeated key below": (
        "p.json",
        b'[{"prompt": "a"}, {"prompt": "b", "x": {"k": 1, "k": 1}}]',
        '1: has the key "k" twice',
    ),
    "many long keys": (
        "p.jsonl",
        json.dumps({f"k{i}" * 100: 1 for i in range(100)}).encode(),
        "1: is no known form",
    ),
    "escapes in a role": (
        "p.jsonl",
        json.dumps({"messages": [{"role": "\x1b[2J" * 99, "content": "a"}]}).encode(),
        "1: role of message 1 is",
    ),
    "escapes in an id": (
        "p.jsonl",
        b'{"prompt": "a", "id": "\\u001b[31m"}\n' * 2,
        '2: the id "\\u001b[31m" is taken',
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_is_refused(refused: Refuse, model: Path, tmp_path: Path, name: str) -> None:
    file, content, expected = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    told = refused("generate", "-m", model, "--data", path, "-o", tmp_path / "out.jsonl")
    assert told.removeprefix(str(path)).removeprefix(":").startswith(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".", "is a folder"),
        ("/dev/null", "has no prompts"),
        ("/dev/zero", "/dev/zero:1: has a NUL byte"),
        ("/dev/urandom", "/dev/urandom:"),
        ("no\nsuch\x1b[31m", "no such␛[31m: there is no such file"),
        ("x" * 300, "can't be read: File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_what_is_no_file(refused: Refuse, model: Path, path: str, expected: str) -> None:
    assert expected in refused("generate", "-m", model, "--data", path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(refused: Refuse, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a")
    path.chmod(0)
    assert "can't be read: Permission denied" in refused("generate", "-m", model, "--data", path)


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["a\udcff"], None, "the prompt is not UTF-8 text"),
        (["a", "--system", "\udcff"], None, "invalid value for '--system': is not UTF-8 text"),
        (["a", "--stop", "x", "--stop", "\udcff"], None, "'--stop': is not UTF-8 text"),
        (["-"], b"\xff", "standard input:1: is not UTF-8 text"),
        (["-"], b"a\n\0", "standard input:2: has a NUL byte"),
    ],
)
def test_arguments_and_pipes(
    refused: Refuse, model: Path, arguments: list[str], stdin: bytes | None, expected: str
) -> None:
    assert expected in refused("generate", "-m", model, *arguments, stdin=stdin)


def test_what_has_no_end_is_read_to_its_first_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def __init__(self, part: bytes) -> None:
            self.part = part

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            assert size >= 0, "it has no end"
            self.given += size
            return (self.part * size)[:size]

    for part, expected in ((b"\0", "NUL"), (b"\xff", "UTF-8"), (b"a\n", "is too large")):
        stream = Endless(part)
        with pytest.raises(InputError, match=expected):
            read_stream(stream, "x", 5_000_000)  # type: ignore[arg-type]
        assert stream.given <= 5_000_001


def test_characters_survive_the_pieces_that_a_file_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", 3)
    path = tmp_path / "p.txt"
    path.write_text("\ufeffnaïve 🙂 日本語\n" * 4, encoding="utf-8")
    assert read_text(path) == ("naïve 🙂 日本語\n\ufeff" * 4).removesuffix("\ufeff")
    path.write_bytes("🙂\n".encode() * 3 + "🙂".encode()[:3])
    with pytest.raises(InputError, match=":4: is not UTF-8"):
        read_text(path)
    path.write_bytes("🙂\n".encode() * 3 + b"\0")
    with pytest.raises(InputError, match=":4: has a NUL byte"):
        read_text(path)


def test_a_file_of_blank_lines_takes_no_more_memory_than_itself() -> None:
    text = "\n" * 200_000
    tracemalloc.start()
    with pytest.raises(InputError, match="has no prompts"):
        parse_prompts(text, "x", ".txt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


def test_there_may_be_so_many_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    assert len(parse_prompts("a\n\nb\nc\n\n", "x", ".txt")) == 3
    with pytest.raises(InputError, match=r"^x:5: is one prompt too many, allowed are 3$"):
        parse_prompts("a\n\nb\nc\nd\n", "x", ".txt")
