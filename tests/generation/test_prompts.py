"""Prompt files: every accepted form, and one line about everything else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import (
    Message,
    Prompt,
    as_messages,
    builtin_prompts,
    fingerprint,
    plain_text,
    read_prompts,
)

USER = Message("user", "Hi")
ASSISTANT = Message("assistant", "Hello")
SYSTEM = Message("system", "Be brief.")


def write(folder: Path, content: str | bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, strict: bool = False) -> str:
    """The one line with which a file is refused, the path taken off."""
    with pytest.raises(InputError) as caught:
        read_prompts(path, strict=strict)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).removeprefix(":")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": " Hi "}, Prompt("1", text=" Hi ")),
        ({"prompt": "Hi", "id": "a", "category": "qa"}, Prompt("a", text="Hi", category="qa")),
        ({"prompt": "Hi", "id": None, "question_id": 7}, Prompt("7", text="Hi")),
        ({"prompt": "Hi", "id": 0, "question_id": 7}, Prompt("0", text="Hi")),
        ({"prompt": "Hi", "category": "", "other": [1]}, Prompt("1", text="Hi")),
        (
            {"question_id": 81, "category": "writing", "turns": ["Hi", "More"], "reference": []},
            Prompt("81", text="Hi", category="writing"),
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, Prompt("1", messages=(USER,))),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": ""},
                ]
            },
            Prompt("1", messages=(SYSTEM, USER, ASSISTANT, USER)),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                    }
                ]
            },
            Prompt("1", messages=(USER,)),
        ),
        (
            {
                "id": "x_0",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "user", "value": "Hi"},
                    {"from": "chatgpt", "value": "One"},
                    {"from": "bot", "value": "Two"},
                ],
            },
            Prompt("x_0", messages=(SYSTEM, USER, ASSISTANT, USER)),
        ),
    ],
)
def test_accepted_forms(tmp_path: Path, line: dict[str, object], expected: Prompt) -> None:
    assert read_prompts(write(tmp_path, json.dumps(line))) == [expected]


FAULTS = [
    ('{"prompt": "a"', "is not valid JSON: expecting ',' delimiter (column 15)"),
    ("Hello", "is not valid JSON"),
    ('{"prompt": ' + "[" * 100_000, "is nested too deeply"),
    ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "too many digits"),
    (
        '{"prompt": "a", "turns": ["b"]}',
        "has prompt and turns; keep one of them, or say which: column NAME",
    ),
    ('{"prompt": "\\ud800"}', "has \\ud800, half a surrogate pair"),
    ('{"prompt": "a", "id": "\\udc00"}', "has \\udc00, half a surrogate pair"),
    ('{"prompt": "a", "id": true}', "id is true or false, not a text or a whole number"),
    ('{"prompt": "a", "id": 1.5}', "id is a number, not"),
    ('{"prompt": "a", "question_id": ""}', "question_id is an empty text"),
    ('{"prompt": "a", "category": 3}', "category is a number, not a text"),
]
UNUSABLE = [
    ('["a"]', 'is a list, not an object; accepted are {"prompt": TEXT}'),
    ('"a"', "is a text, not an object"),
    ('{"text": "a", "n\\n": 1}', 'is no known form (keys: "text", "n\\n"); give'),
    ("{}", "(keys: none)"),
    ('{"prompt": ""}', "prompt is empty"),
    ('{"prompt": " \\n"}', "prompt is empty"),
    ('{"prompt": null}', "prompt is null, not a text"),
    ('{"prompt": 3}', "prompt is a number, not a text"),
    ('{"turns": "a"}', "turns is a text, not a list of texts"),
    ('{"turns": []}', "turns is an empty list"),
    ('{"turns": ["a", {}]}', "turn 2 is an object"),
    ('{"turns": ["", "a"]}', "turn 1 is empty"),
    ('{"messages": {}}', "messages is an object, not a list of messages"),
    ('{"messages": ["a"]}', "message 1 is a text, not an object"),
    ('{"messages": [{"content": "a"}]}', 'message 1 has no "role"; it needs role and content'),
    (
        '{"messages": [{"role": "tool", "content": "a"}]}',
        'role of message 1 is "tool", allowed are system, user, assistant',
    ),
    ('{"messages": [{"role": [], "content": "a"}]}', "role of message 1 is an empty list"),
    ('{"messages": [{"role": "user", "content": ""}]}', "content of message 1 is empty"),
    (
        '{"messages": [{"role": "user", "content": []}]}',
        "content of message 1 is an empty list",
    ),
    ('{"messages": [{"role": "user", "content": null}]}', "content of message 1 is null"),
    (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "only text is supported",
    ),
    (
        '{"messages": [{"role": "system", "content": "a"}]}',
        "must end with a message of the user",
    ),
    (
        '{"conversations": [{"from": "gpt", "value": "a"}]}',
        "must end with a message of the user",
    ),
    (
        '{"conversations": [{"from": "alien", "value": "a"}]}',
        'from of message 1 is "alien", allowed are system, human, user, gpt',
    ),
    ('{"conversations": [{"role": "user"}]}', 'message 1 has no "from"'),
    ('{"prompt": []}', "prompt is an empty list, not a list of texts"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}', "prompt must end with a message of"),
    ('{"prompt": ["a", 1]}', "turn 2 is a number"),
    ('{"instruction": "a", "input": 3}', "input is a number, not a text"),
    ('{"question": {"text": "a"}}', "question is an object, not a text"),
    ('{"article": null}', "article is null, not a text"),
]


@pytest.mark.parametrize(("line", "problem"), [*FAULTS, *UNUSABLE])
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path, f'{{"prompt": "fine"}}\n\n{line}\n')
    message = refusal(path, strict=True)
    assert message.startswith("3: ")
    assert problem in message
    if (line, problem) in FAULTS:
        assert refusal(path) == message


@pytest.mark.parametrize("line", [line for line, _ in UNUSABLE])
def test_a_line_that_is_no_prompt_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    path = write(tmp_path, f'{{"prompt": "fine"}}\n\n{line}\n{{"prompt": "too"}}\n')
    assert read_prompts(path) == [Prompt("1", text="fine"), Prompt("4", text="too")]
    (said,) = caplog.messages
    assert said.startswith(f"note: skipped 1 of 3 rows of {path}: 1 ")
    assert said.endswith("(line 3)")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", " has no prompts"),
        (b"\n \r\n\t\n", " has no prompts"),
        (b"\xef\xbb\xbf", " has no prompts"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "2: is not UTF-8 text"),
        (b'\xef\xbb\xbf{"prompt": "a"}\n\n\xff', "3: is not UTF-8 text"),
        ('{"prompt": "a"}\n\n'.encode("utf-16") + b"\0\xd8", "3: is not UTF-16-LE text"),
        ("a".encode("utf-32"), " is UTF-32 text, which is not read; UTF-8 is: iconv -f utf-32"),
        ("a\nb".encode("utf-16-le"), "1: has a NUL byte"),
        (b'{"prompt": "a"}\n{"prompt": "\0"}', "2: has a NUL byte"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p.json"])
def test_bytes_that_are_no_prompts(tmp_path: Path, content: bytes, problem: str, name: str) -> None:
    assert refusal(write(tmp_path, content, name)).startswith(problem)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == " there is no such file"
    assert refusal(tmp_path) == " is a folder, a file is needed"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "can't be read" in refusal(loop)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert read_prompts(path) == [Prompt("1", text="a"), Prompt("3", text="b")]
    path = write(tmp_path, b"\xef\xbb\xbfa\r\n\r\nb\r\n", "p.txt")
    assert read_prompts(path) == [Prompt("1", text="a"), Prompt("3", text="b")]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c", "\r"])
def test_only_line_feeds_end_a_line(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, f"a{separator}b", "p.txt")
    assert [prompt.text for prompt in read_prompts(path)] == [f"a{separator}b"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("p.txt", "One\n\n {odd} \n[1]\n", ["One", " {odd} ", "[1]"]),
        ("p.txt", '\n{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("p", '{"prompt": "a"}', ["a"]),
        ("p.md", "{not json}\nmore", ["{not json}", "more"]),
        ("p.NDJSON", '{"prompt": "a"}', ["a"]),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("p.json", ' \n[{"prompt": "a"},\n {"turns": ["b"]}]\n', ["a", "b"]),
    ],
)
def test_the_kind_of_a_file(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    assert [prompt.text for prompt in read_prompts(write(tmp_path, content, name))] == texts


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"prompt": "a"},\n {"x": 1}]', " item 2: is no known form"),
        ('[{"prompt": "a"},\n\n {"prompt": ]', "3: is not valid JSON"),
        ("[" * 100_000, "1: is nested too deeply"),
        ("[]", " has no prompts"),
    ],
)
def test_a_bad_array(tmp_path: Path, content: str, problem: str) -> None:
    assert refusal(write(tmp_path, content, "p.json"), strict=True).startswith(problem)


def test_text_that_opens_like_json_but_never_ends_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, '{"a":' * 100_000, "p.txt")) == "1: is nested too deeply"


@pytest.mark.parametrize(
    "lines",
    [
        ['{"prompt": "a", "id": "x"}', '{"prompt": "b", "id": "x"}'],
        ['{"prompt": "a", "id": 7}', '{"prompt": "b", "question_id": "7"}'],
        ['{"prompt": "a", "id": "2"}', '{"prompt": "b"}'],
    ],
)
def test_repeated_ids_name_both_lines(tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path, "\n".join(lines))
    message = refusal(path)
    assert message.startswith("2: the id ")
    assert f"is taken by {path}:1 already" in message


def test_prompt_has_one_form() -> None:
    with pytest.raises(ValueError, match="either"):
        Prompt("1")
    with pytest.raises(ValueError, match="either"):
        Prompt("1", messages=(USER,), text="a")


@pytest.mark.parametrize(
    ("prompt", "system", "chat", "plain"),
    [
        (Prompt("1", text="Hi"), None, [USER], "Hi"),
        (Prompt("1", text="Hi"), "S", [Message("system", "S"), USER], "S\n\nHi"),
        (Prompt("1", messages=(SYSTEM, USER)), None, [SYSTEM, USER], "Be brief.\n\nHi"),
        (Prompt("1", messages=(SYSTEM, USER)), "S", [Message("system", "S"), USER], "S\n\nHi"),
        (Prompt("1", messages=(USER,)), "", [Message("system", ""), USER], "\n\nHi"),
        (
            Prompt("1", messages=(USER, ASSISTANT, USER)),
            "S",
            [Message("system", "S"), USER, ASSISTANT, USER],
            "S\n\nHi\n\nHello\n\nHi",
        ),
    ],
)
def test_system_text_goes_first_and_wins(
    prompt: Prompt, system: str | None, chat: list[Message], plain: str
) -> None:
    assert as_messages(prompt, system) == [
        {"role": message.role, "content": message.content} for message in chat
    ]
    assert plain_text(prompt, system) == plain


def test_fingerprint_is_of_the_content_in_order() -> None:
    a, b = Prompt("1", text="a"), Prompt("2", messages=(USER,))
    # a fixed value: profiles written earlier must keep matching
    assert (
        fingerprint([Prompt("1", text="é")])
        == "0b657be394b1d432f8d1942406ed09c213604cbcd87b299641cf994bcaf84b11"
    )
    assert fingerprint([a, b]) == fingerprint([Prompt("x", text="a", category="c"), b])
    others = [[a], [b, a], [a, b, b], [Prompt("1", text="a "), b], [a, Prompt("2", text="Hi")], []]
    assert fingerprint([a, b]) not in [fingerprint(other) for other in others]


def test_builtin_prompts_are_mixed_and_readable() -> None:
    prompts = builtin_prompts()
    categories = [prompt.category for prompt in prompts]
    assert len(prompts) == 30
    assert Counter(categories) == dict.fromkeys(categories[:6], 5)
    for start in range(0, 30, 6):
        assert categories[start : start + 6] == categories[:6]
    assert len({prompt.text for prompt in prompts}) == 30
    for prompt in prompts:
        if prompt.category == "summarization" and prompt.text is not None:
            article = prompt.text.split("\n\n", 1)[1]
            assert 120 <= len(article.split()) <= 200


def test_prompts_import_without_the_heavy_packages() -> None:
    code = (
        "import sys, conflayers_cli.generation.prompts as p; p.builtin_prompts();"
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None)  # files are written, and disks stall
@given(st.lists(TEXTS, min_size=1, max_size=5), st.booleans())
def test_any_text_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool
) -> None:
    lines = [json.dumps({"prompt": text}, ensure_ascii=ascii_only) for text in texts]
    path = write(tmp_path_factory.mktemp("jsonl"), "\n".join(lines))
    assert [prompt.text for prompt in read_prompts(path)] == texts


@settings(deadline=None)  # files are written, and disks stall
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes_are_prompts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    for name in ("p.jsonl", "p.json", "p.txt"):
        path = write(tmp_path_factory.mktemp("bytes"), content, name)
        try:
            prompts = read_prompts(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(prompt.text and prompt.text.strip() for prompt in prompts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)  # files are written, and disks stall
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "turns", "conversations", "id", "category"]), JSON
    )
)
def test_any_object_is_a_prompt_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]
) -> None:
    path = write(tmp_path_factory.mktemp("objects"), json.dumps(value))
    try:
        prompts = read_prompts(path)
    except InputError as error:
        assert str(error).startswith(f"{path}:1: ")
        assert "\n" not in str(error)
    else:
        assert as_messages(prompts[0])[-1]["role"] == "user"


CHATS = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=4
).map(lambda messages: (*messages, USER))
NAMES = st.none() | TEXTS.map(lambda name: name[:20]).filter(str.strip)


@settings(deadline=None)  # files are written, and disks stall
@given(st.lists(st.tuples(TEXTS | CHATS, NAMES), min_size=1, max_size=4))
def test_any_prompt_survives_every_form_that_can_say_it(
    tmp_path_factory: pytest.TempPathFactory,
    bodies: list[tuple[str | tuple[Message, ...], str | None]],
) -> None:
    prompts = [
        Prompt(str(i), text=body, category=name)
        if isinstance(body, str)
        else Prompt(str(i), messages=body, category=name)
        for i, (body, name) in enumerate(bodies)
    ]
    folder = tmp_path_factory.mktemp("forms")
    for form in range(2):
        lines: list[dict[str, object]] = []
        for prompt in prompts:
            line: dict[str, object] = {"id": prompt.id, "category": prompt.category}
            if prompt.text is not None:
                line |= {"prompt": prompt.text} if form else {"turns": [prompt.text, "more"]}
            else:
                keys = ("role", "content") if form else ("from", "value")
                line["messages" if form else "conversations"] = [
                    dict(zip(keys, (message.role, message.content), strict=True))
                    for message in prompt.messages or ()
                ]
            lines.append(line)
        jsonl = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        assert read_prompts(write(folder, jsonl)) == prompts
        assert read_prompts(write(folder, jsonl.replace("\n", "\r\n\r\n"))) == prompts
        assert read_prompts(write(folder, json.dumps(lines, indent=1), "p.json")) == prompts
