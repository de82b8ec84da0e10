"""What reaches a terminal: nothing that steers it, wherever it comes from."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.cli import terminal
from conflayers_cli.cli.main import main
from conflayers_cli.utils.notices import LOGGER, notices_to_stderr, terminal_safe
from conflayers_cli.utils.progress import progress_bar
from tests.cli.conftest import save_profile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals are opened otherwise")

FAST = ("--device", "cpu", "--dtype", "float32")
# colours, clearing the screen, a title, going back, a C1 control, deleting, turning the line around
HARM = "\x1b[31m\x1b[2J\x1b]0;title\x07\r\x08\x9b2J\x7f\u202egnp.exe\u202c\u2066a\u2069[red]b[/red]"


class Terminal:
    """A pseudo-terminal in place of this process's standard streams, and what it is sent."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8", errors="backslashreplace")
        self._sent = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                return
            if not piece:
                return
            self._sent += piece

    def shown(self) -> str:
        """All that it was sent, with the line ends that a terminal adds taken off."""
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        return self._sent.decode().replace("\r\n", "\n")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs something with a terminal as standard output and error, and gives what it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")

    def show(work: Callable[[], object]) -> str:
        there = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", there.stream)
            patch.setattr(sys, "stderr", there.stream)
            try:
                work()
            finally:
                shown = there.shown()
        return shown

    yield show


def harmless(shown: str) -> bool:
    """Whether nothing of the harm is in it; Rich's own colours and bars are let pass."""
    return not any(
        part in shown
        for part in (
            "\x1b[31m",
            "\x1b[2J",
            "\x1b]",
            "\x07",
            "\x08",
            "\x9b",
            "\x7f",
            "\u202e",
            "\u2066",
        )
    )


def test_the_harm_is_harm() -> None:
    assert not harmless(HARM)
    assert harmless(terminal_safe(HARM))


def test_an_answer_in_pieces(screen: Callable[..., str]) -> None:
    def work() -> None:
        for character in HARM:
            terminal.emit(character)

    shown = screen(work)
    assert shown == terminal_safe(HARM)
    assert harmless(shown)
    assert "\r" not in shown


def test_texts_of_the_world_are_left_as_they_are(screen: Callable[..., str]) -> None:
    text = "שלום\u200f, \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🚀 é\tñ\n"
    assert screen(lambda: terminal.emit(text)) == text


def test_json_is_the_same_document(screen: Callable[..., str]) -> None:
    document = {HARM: [HARM, "é"]}
    shown = screen(lambda: terminal.emit_json(document))
    assert harmless(shown)
    assert json.loads(shown) == document
    assert "é" in shown


def test_json_in_a_pipe_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.emit_json({"a": "\x9b\u202e"}, indent=None)
    assert capsys.readouterr().out == '{"a": "\x9b\u202e"}\n'


def test_messages_are_one_line_of_some_length(screen: Callable[..., str]) -> None:
    with notices_to_stderr():
        shown = screen(lambda: logging.getLogger(LOGGER).info(f"a\n{HARM}\n{'x' * 5000}b"))
    assert harmless(shown)
    assert shown.count("\n") == 1
    assert len(shown) < 1100
    assert shown.endswith("xb\n")
    assert " … " in shown


def test_a_bar(screen: Callable[..., str]) -> None:
    def work() -> None:
        with progress_bar() as on_progress:
            on_progress(HARM, 0.5)

    shown = screen(work)
    assert "[red]b[/red]" in shown  # no markup is taken from it
    assert harmless(shown)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_names_of_files(screen: Callable[..., str], model: Path, debug: list[str]) -> None:
    name = HARM.replace("/", "")
    for arguments in (
        ["generate", "Hello", "-m", f"./{name}"],
        ["generate", "Hello", "-p", name],
        ["generate", "-m", str(model), "--data", name],
        ["generate", "-m", str(model), "--draft", name, "Hello"],
        ["bench", "-p", name, "--output", name],
        ["calibrate", "-m", str(model), "--strategy", name],
        [name],
    ):
        shown = screen(lambda arguments=arguments: main([*debug, *arguments]))
        assert "error: " in shown
        assert harmless(shown), arguments


def hostile_prompts(folder: Path) -> Path:
    lines = [{"id": f"{HARM}{n}", "category": HARM + "xy"[n], "prompt": HARM} for n in range(2)]
    path = folder / "p.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def run_quietly(*arguments: Any) -> Callable[[], int]:
    return lambda: main([str(argument) for argument in arguments])


def test_answers_to_a_file(screen: Callable[..., str], model: Path, tmp_path: Path) -> None:
    data = hostile_prompts(tmp_path)
    shown = screen(run_quietly("generate", "-m", model, "--data", data, "-n", "60", *FAST))
    # the bar that shows how far loading is stands before the first line
    parts = [line.partition('{"index"') for line in shown.split("\n")]
    lines = [json.loads(begin + rest) for _, begin, rest in parts if begin]
    assert [line["id"] for line in lines] == [f"{HARM}0", f"{HARM}1"]
    assert harmless(shown)


def test_tables(screen: Callable[..., str], model: Path, tmp_path: Path) -> None:
    data = hostile_prompts(tmp_path)
    arguments = ("bench", "-m", model, "--draft", "ngram", "--data", data, "-n", "6", *FAST)
    shown = screen(run_quietly(*arguments, "--runs", "1", "--warmup", "0"))
    assert "outputs identical" in shown
    assert shown.count("[red]b[/red]x") == 1
    assert harmless(shown)


def test_notes_about_prompts(screen: Callable[..., str], model: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    lines = ({"id": HARM + name, "prompt": "x" * 9999} for name in "ab")
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    arguments = ("generate", "-m", model, "--data", data, "-n", "3", *FAST)
    assert harmless(screen(run_quietly(*arguments)))
    shown = screen(run_quietly(*arguments, "--truncate", "--stats", "-o", tmp_path / "out.jsonl"))
    assert "tokens of prompt ␛[31m" in shown
    assert harmless(shown)


def test_the_name_of_a_model_in_a_profile(
    screen: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    path = save_profile(tmp_path / "p.yaml", model, name=HARM)
    shown = screen(run_quietly("generate", "Hello", "-p", path))
    assert "no such model" in shown
    assert harmless(shown)


def test_a_hostile_template_says_what_it_likes(
    screen: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(model, tmp_path / "m"))
    told = json.dumps(HARM)[1:-1]
    (folder / "chat_template.jinja").write_text(f"{{{{ raise_exception('{told}') }}}}")
    shown = screen(run_quietly("generate", "Hello", "-m", folder, *FAST))
    assert "refuses the messages: ␛[31m" in shown
    assert harmless(shown)
