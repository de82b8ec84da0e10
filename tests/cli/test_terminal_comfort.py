"""What people see: hints for misspelt words, quiet, plain and narrow terminals, completion."""

from __future__ import annotations

import fcntl
import inspect
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conflayers_cli.bench.schema import BenchDocument
from conflayers_cli.bench.tables import bench_tables
from conflayers_cli.cli import completion, main
from conflayers_cli.cli.mistakes import with_hint
from conflayers_cli.cli.tables import fitting
from conflayers_cli.utils.error_text import did_you_mean
from conflayers_cli.utils.notices import quiet
from conflayers_cli.utils.progress import progress_bar
from tests.bench.test_serialize import document, result
from tests.cli.conftest import Run, start

COMMANDS = {command.name: command for command in main.app.registered_commands}
PAGES = {"": main.HELP} | {
    name or "": inspect.getdoc(command.callback) or "" for name, command in COMMANDS.items()
}


# --- help ---


def examples(page: str) -> list[list[str]]:
    """The arguments of every example on a help page, what is piped into it left out."""
    lines = [line.strip() for line in page.splitlines() if line.startswith("  ")]
    calls = [line[line.index("conflayers ") :] for line in lines if "conflayers " in line]
    return [shlex.split(call)[1:] for call in calls]


@pytest.mark.parametrize("command", PAGES)
def test_a_page_begins_with_a_sentence_and_has_a_few_examples(command: str) -> None:
    first = PAGES[command].splitlines()[0]
    assert first.endswith(".") or PAGES[command].split("\n\n")[0].endswith(".")
    assert 2 <= len(examples(PAGES[command])) <= 5
    fixed = PAGES[command].split("\n\n", 1)[1]  # what is not wrapped anew
    assert all(len(line) <= 78 for line in fixed.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [arguments for page in PAGES.values() for arguments in examples(page)],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_examples_are_true(arguments: list[str]) -> None:
    """The command line's own parser takes every one of them, and nothing else."""
    group: Any = typer.main.get_command(main.app)
    parent = group.make_context("conflayers", list(arguments))
    name, command, rest = group.resolve_command(parent, arguments)
    assert command.make_context(name, list(rest)).params
    with pytest.raises(Exception, match=r"(?i)no such option"):
        command.make_context(name, [*rest, "--no-such-flag"])


# --- wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generte"], "did you mean 'generate'?"),
        (["docter"], "did you mean 'doctor'?"),
        (["--qiet"], "did you mean --quiet?"),
        (["generate", "hi", "--profle", "x"], "no such option: --profle; did you mean --profile?"),
        (["chat", "--modl", "x"], "did you mean --model?"),
        (["generate", "hi", "--draft", "ngrm"], "'ngrm' is not one of"),
        (["generate", "hi", "--draft", "ngrm"], "did you mean ngram?"),
        (["bench", "-p", "x", "--against", "transformer"], "did you mean transformers?"),
        (["calibrate", "--strategy", "gredy"], "did you mean greedy?"),
        (["generate", "hi", "-m", "smollm2", "--dtype", "bf16"], "did you mean bfloat16?"),
        (["generate", "hi", "-m", "smolm2"], "did you mean smollm2?"),
    ],
)
def test_what_was_probably_meant(run: Run, arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1
    assert "Value error" not in result.err


def test_nothing_is_guessed_where_nothing_is_near(run: Run) -> None:
    assert "did you mean" not in run("generate", "hi", "--draft", "elephant").err
    assert "did you mean" not in run("xyzzy").err


def test_wording_that_is_not_known_stays() -> None:
    assert with_hint("missing argument 'X'") == "missing argument 'X'"
    near = "no such option: --sav (Possible options: --no-save, --save, --save-profile)"
    assert with_hint(near) == "no such option: --sav; did you mean --save?"


def test_hints() -> None:
    assert did_you_mean("Float32", ["float32", "float16"]) == "; did you mean float32?"
    assert did_you_mean("x", ["float32"]) == ""


# --- quiet, plain, narrow ---


@pytest.fixture
def notes(model: Path, tmp_path: Path) -> list[object]:
    """A command that says something."""
    return ["generate", "hi", "-m", model, "--dtype", "float32", "-n", 2, "--top-k", 3, "--stats"]


@pytest.mark.parametrize("before", [True, False])
def test_quiet(run: Run, notes: list[object], before: bool) -> None:
    loud = run(*notes)
    assert "changes nothing at --temperature 0" in loud.err
    quiet = run(*(["--quiet", *notes] if before else [*notes, "--quiet"]))
    assert (quiet.code, quiet.out, quiet.err) == (0, loud.out, "")
    assert run(*notes).err != ""  # for that one command
    failed = run("--quiet", "generate", "hi")
    assert failed.code == 2
    assert failed.err.startswith("conflayers: error: no model")


def test_quiet_and_interrupted(
    run: Run, notes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conflayers_cli.cli.generate.encode_prompts", interrupt)
    result = run("--quiet", *notes)
    assert (result.code, result.err) == (130, "conflayers: interrupted\n")


class Screen:
    """A stream that a person sits before."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("environment", "alive"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, False),
    ],
)
def test_bars_where_they_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], alive: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar() as on_progress:
        on_progress("working", 0.5)
    assert bool(screen.text) == alive
    if "NO_COLOR" in environment:
        assert not re.search("\x1b\\[[0-9;]*3[0-9]", screen.text)
    with quiet(True), progress_bar() as on_progress:
        before = screen.text
        on_progress("working", 0.7)
    assert screen.text == before


def test_forced_colour_draws_no_bar_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as on_progress:
        on_progress("working", 0.5)
    assert capsys.readouterr().err == ""


def on_terminal(*arguments: str, columns: int, **environment: str) -> str:
    """What the command shows on a terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", **environment}.items():
            patch.setenv(name, value)
        process = start(arguments, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)

    def read() -> Iterator[bytes]:
        while True:
            try:
                yield os.read(master, 65536)
            except OSError:  # the other end is closed
                return

    shown = b"".join(read())
    os.close(master)
    assert process.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


ESCAPE = re.compile("\x1b\\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize(
    ("environment", "columns"),
    [({}, 40), ({"NO_COLOR": "1"}, 40), ({"COLUMNS": "44"}, 200), ({"TERM": "dumb"}, 80)],
)
def test_models_on_a_terminal(environment: dict[str, str], columns: int) -> None:
    shown = on_terminal("models", columns=columns, **environment)
    assert "smollm2-deep" in shown
    if environment.get("TERM") == "dumb":
        assert not ESCAPE.search(shown)
    if "NO_COLOR" in environment:
        assert not re.search("\x1b\\[[0-9;]*3[0-9]", shown)
    width = int(environment.get("COLUMNS", columns))
    table = ESCAPE.sub("", shown).split("kept in")[0]
    assert max(map(len, table.splitlines())) <= width


def test_help_on_a_narrow_terminal() -> None:
    shown = ESCAPE.sub("", on_terminal("--help", columns=40))
    assert max(map(len, shown.splitlines())) <= 40
    assert "calibrate" in shown


def test_a_table_without_room_becomes_a_list() -> None:
    narrow, wide = Console(width=40), Console(width=120)
    parts = [
        part
        for part in bench_tables(BenchDocument.model_validate(document(result())))
        if isinstance(part, Table)
    ]
    assert parts
    for part in parts:
        assert fitting(part, wide) is part
        text = fitting(part, narrow)
        assert isinstance(text, Text)
        assert "…" not in text.plain
        heads = [str(column.header) for column in part.columns[1:]]
        assert all(f"  {head}: " in text.plain for head in heads)
        first = next(iter(part.columns[1].cells))
        assert f"{heads[0]}: {first}" in text.plain
    assert fitting("text", narrow) == "text"


def test_pipes_get_plain_text_whatever_is_forced() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "30"}
    command = [sys.executable, "-m", "conflayers_cli", "models"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout
    assert b"built in       layers" in done.stdout


# --- completion ---


def completed(words: str, folder: Path) -> list[str]:
    """What bash would offer behind these words."""
    variables = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_CONFLAYERS_COMPLETE": "complete_bash",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-X", "importtime", "-m", "conflayers_cli"]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, cwd=folder)
    loaded = {line.rsplit(b"|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {b"torch", b"transformers", b"numpy"}
    return done.stdout.decode().split()


def test_completion_in_a_shell(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").touch()
    (tmp_path / "notes.txt").touch()
    assert completed("conflayers gen", tmp_path) == ["generate"]
    assert completed("conflayers generate --model smollm2-", tmp_path) == ["smollm2-deep"]
    assert completed("conflayers generate --profile ", tmp_path) == ["deep.yaml"]
    assert completed("conflayers calibrate --strategy cl", tmp_path) == ["clasp"]
    assert completed("conflayers generate --draft n", tmp_path) == ["ngram", "none"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script(run: Run, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    # Typer asks which shell it was called from.
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    done = run("--show-completion")
    assert done.code == 0
    assert "_CONFLAYERS_COMPLETE" in done.out.upper()


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.GGUF").touch()
    (tmp_path / "more" / "y.bin").touch()
    (tmp_path / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completion.model("mo") == ["model", "more/"]
    assert completion.model("more/") == ["more/x.GGUF"]
    assert completion.model("sm") == ["smollm2", "smollm2-deep"]
    assert completion.model(".h") == [".hidden/"]
    assert completion.model(f"{tmp_path}/mod") == [f"{tmp_path}/model"]
    assert completion.model("no/such/") == []
    assert completion.files(".yaml")("") == ["model", "more/"]
    assert completion.model("~no-such-user-here/") == []
