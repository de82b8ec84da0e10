"""The pages of the docs: their command lines are parsed, their links and files exist."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from conflayers_cli.cli.main import ANYWHERE, app

ROOT = Path(__file__).parent.parent
COMMANDS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LINKED = (*COMMANDS, ROOT / "benchmarks/README.md", ROOT / "profiles/README.md")
DRAWINGS = sorted((ROOT / "docs/drawings").glob("*.svg"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SHELLS = ("sh", "bash", "shell", "console", "")
ENDS = frozenset({"|", "||", "&&", ";", ">", ">>", "<", "2>", "&"})
PROGRAMS = (["conflayers"], ["-m", "conflayers_cli"])
SVG = "{http://www.w3.org/2000/svg}"


def names(paths: tuple[Path, ...] | list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def shell_lines(page: str) -> Iterator[str]:
    """The lines of all shell blocks; of a console's those behind a prompt."""
    for language, block in FENCE.findall(page):
        if language not in SHELLS:
            continue
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what a command printed
            yield line.removeprefix("$ ")


def inline_lines(page: str) -> Iterator[str]:
    """Commands in the midst of a sentence; an ellipsis stands for what is left to the reader."""
    prose = FENCE.sub("", page)
    for code in re.findall(r"`([^`]+)`", prose):
        yield " ".join(code.split()).replace(" …", "")


def arguments_in(line: str) -> Iterator[list[str]]:
    """The arguments of every run of the program in a line of shell."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return  # no line of shell: a sentence with an apostrophe
    for program in PROGRAMS:
        size = len(program)
        for at in range(len(words)):
            begins = at == 0 or words[at - 1] in ENDS or program[0] == "-m"
            if words[at : at + size] != program or not begins:
                continue
            rest = words[at + size :]
            end = next((i for i, word in enumerate(rest) if word in ENDS), len(rest))
            yield rest[:end]


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str], *, whole: bool = True) -> None:
    """Have the command line's own parser read them, without running anything.

    Args:
        arguments: without the program's name.
        whole: whether nothing may be missing.

    Raises:
        Exception: the parser's, which says what is wrong.
    """
    command, words = program(), [word for word in arguments if word not in ANYWHERE]
    while hasattr(command, "commands"):
        if not words:
            return
        name, *words = words
        if name.startswith("-"):
            # not parsed: --install-completion would do it
            known = {option for each in command.params for option in each.opts}
            if name not in known | {"--help", "-h"}:
                raise ValueError(f"there is no option {name}")
            return
        if name not in command.commands:
            raise ValueError(f"there is no command {name}")
        command = command.commands[name]
    try:
        command.make_context(command.name, words)
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise


@pytest.mark.parametrize("page", COMMANDS, ids=names(COMMANDS))
def test_commands_are_parsed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    wrong = []
    lines = [*((line, True) for line in shell_lines(text))]
    lines += [(line, False) for line in inline_lines(text)]
    for line, whole in lines:
        for arguments in arguments_in(line):
            try:
                parse(arguments, whole=whole)
            except Exception as error:  # noqa: BLE001 - all of them are told at once
                told = error.format_message() if hasattr(error, "format_message") else error
                wrong.append(f"{line}: {told}")
    assert wrong == []


def test_the_commands_of_the_guide_are_found() -> None:
    text = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    found = [args for line in shell_lines(text) for args in arguments_in(line)]
    assert {"calibrate", "generate", "chat", "bench", "profile", "models", "doctor"} <= {
        args[0] for args in found
    }
    assert len(found) >= 20
    assert any("…" not in line and list(arguments_in(line)) for line in inline_lines(text))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("conflayers bench -p a.yaml  # measure", [["bench", "-p", "a.yaml"]]),
        ("git diff | conflayers generate 'Why?' - > out.txt", [["generate", "Why?", "-"]]),
        ("torchrun -m conflayers_cli chat -p a.yaml", [["chat", "-p", "a.yaml"]]),
        ("conflayers models && conflayers doctor", [["models"], ["doctor"]]),
        ("pip install conflayers", []),
    ],
)
def test_commands_are_found_in_lines(line: str, found: list[list[str]]) -> None:
    assert list(arguments_in(line)) == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench --no-such", "(?i)no such option"),
        ("generat x", "no command generat"),
        ("--no-such", "no option --no-such"),
        ("profile shew x", "no command shew"),
        ("bench --runs none", "(?i)valid integer"),
    ],
)
def test_a_command_that_there_is_not_is_noticed(line: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parse(line.split(), whole=False)


def test_what_a_block_lacks_is_noticed_and_in_a_sentence_it_may_lack() -> None:
    with pytest.raises(Exception, match=r"(?i)missing"):
        parse(["profile", "show"])
    parse(["profile", "show"], whole=False)


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.M)}


@pytest.mark.parametrize("page", LINKED, ids=names(LINKED))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", LINKED, ids=names(LINKED))
def test_files_that_are_named_exist(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:docs|benchmarks|profiles|tests)/[^`\s]*)`", prose)
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_anchors() -> None:
    assert slug("Why does my profile skip nothing?") == "why-does-my-profile-skip-nothing"
    assert "what-a-first-page-has" not in anchors_of(ROOT / "README.md")
    assert "try-it" in anchors_of(ROOT / "README.md")


@pytest.mark.parametrize("drawing", DRAWINGS, ids=names(DRAWINGS))
def test_drawings_are_shown_and_have_a_ground_of_their_own(drawing: Path) -> None:
    shown = [
        f"]({drawing.relative_to(page.parent)})" in page.read_text(encoding="utf-8")
        for page in COMMANDS
        if drawing.is_relative_to(page.parent)
    ]
    assert any(shown)
    root = ET.parse(drawing).getroot()
    assert root.find(f"{SVG}title") is not None and root.find(f"{SVG}desc") is not None
    ground = root.find(f"{SVG}rect")  # without one, dark ink would be lost on a dark page
    assert ground is not None and ground.get("fill") == "#ffffff"
    width, height = (float(root.get(name, "0")) for name in ("width", "height"))
    assert float(ground.get("width", "0")) >= width - 1
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x", "-1")) <= width
        assert 0 <= float(text.get("y", "-1")) <= height
