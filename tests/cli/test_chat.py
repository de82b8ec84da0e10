"""`conflayers chat`: turns on one cache, whoever types them, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.cli import chat as command
from conflayers_cli.cli import chat_input, chat_session, terminal
from conflayers_cli.generation.prefix_cache import PrefixCache
from conflayers_cli.generation.prompts import as_messages, read_prompts
from tests.cli.conftest import END, Result, Run, byte_tokenizer, finished, save_model
from tests.processes import start

Type = Callable[..., Result]


@pytest.fixture
def typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Type:
    """The command with a person at the terminal, who types these lines and then Ctrl-D.

    A callable in their place is run as the line is asked for.
    """

    def go(*arguments: object, lines: list[Any]) -> Result:
        waiting = iter(lines)

        def line(prompt: str = "") -> str:
            while callable(entry := next(waiting, None)):
                entry()
            if entry is None:
                raise EOFError
            return str(entry)

        with monkeypatch.context() as patch:
            patch.setattr(command, "is_terminal", lambda stream: True)
            patch.setattr("builtins.input", line)
            return run("chat", "--dtype", "float32", *arguments)

    return go


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """All generations of the chat's conversation."""
    seen: list[Any] = []
    begin = PrefixCache.begin

    def spying(self: PrefixCache, *arguments: Any, **more: Any) -> Any:
        seen.append(begin(self, *arguments, **more))
        return seen[-1]

    monkeypatch.setattr(PrefixCache, "begin", spying)
    yield seen


def read(generation: Any) -> str:
    """The text that a generation was given."""
    tokens = generation.tokens[: generation.prompt_length]
    return str(byte_tokenizer(None).decode(tokens))


def answered(run: Run, model: Path, *messages: dict[str, str], folder: Path) -> str:
    """What generate gives for a whole conversation."""
    path = folder / "conversation.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    result = run("generate", "-m", model, "--dtype", "float32", "--data", path, "-n", 12)
    (line,) = result.lines
    return str(line["text"])


@pytest.mark.parametrize("drafts", [[], ["--draft", "ngram"], ["-p"]])
def test_piped_lines_are_turns_of_one_conversation(
    run: Run, model: Path, profile: Path, drafts: list[str], tmp_path: Path, generations: list[Any]
) -> None:
    more = [*drafts, str(profile)] if drafts == ["-p"] else drafts
    arguments = ("--dtype", "float32", "-n", 12, "--system", "Be brief.", *more)
    result = run("chat", "-m", model, *arguments, "--stats", stdin="hi\nand\\\nyou?\n\nwhy?")
    assert result.code == 0
    said: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    answers = []
    for text in ("hi", "and\nyou?", "why?"):
        said.append({"role": "user", "content": text})
        answers.append(answered(run, model, *said, folder=tmp_path))
        said.append({"role": "assistant", "content": answers[-1]})
    assert result.out == "".join(f"{answer}\n" for answer in answers)
    first, second, third = generations
    assert first.num_cached == 0
    assert second.num_cached >= first.prompt_length
    assert third.num_cached >= second.prompt_length
    assert f"of {third.prompt_length} prompt tokens {third.num_cached} were there" in result.err


def test_a_person_at_the_terminal(typed: Type, model: Path, tmp_path: Path) -> None:
    result = typed("-m", model, "-n", 4, lines=["hi", "/stats", "", "  ", "/exit", "never"])
    assert result.code == 0
    assert result.out.count("\n") == 1
    assert "/help lists" in result.err
    assert "prompt tokens 0 were there from before" in result.err


def test_quiet_says_nothing_but_answers(typed: Type, model: Path) -> None:
    result = typed("-m", model, "-n", 4, "--quiet", lines=["hi", "/reset", "/nope"])
    assert result.code == 0
    assert result.err.count("conflayers: ") == 1
    assert "conflayers: error: no such command: /nope" in result.err
    assert result.out


def test_commands(typed: Type, model: Path, tmp_path: Path, generations: list[Any]) -> None:
    saved = tmp_path / "chat.jsonl"
    lines = ["/retry", "/stats", "/help", "hi", "/retry", f"/save {saved}", "/system Be kind."]
    lines += [
        "//etc is a folder",
        "/system",
        "/reset",
        "hi",
        "/sav x",
        "/save",
        "/save /no/where/x",
    ]
    result = typed("-m", model, "-n", 5, lines=lines)
    assert result.code == 0
    (prompt,) = read_prompts(saved)
    assert as_messages(prompt) == [{"role": "user", "content": "hi"}]
    first, again, third, last = generations
    assert again.tokens == first.tokens
    assert read(third).startswith("<system>Be kind.\n<user>hi\n")
    assert "<user>/etc is a folder\n" in read(third)
    assert last.tokens == first.tokens
    for said in (
        "there is nothing to answer yet",
        "nothing was answered yet",
        "/retry           have the last message",
        "the answer is the same every time",
        "wrote 2 messages",
        "no such command: /sav; did you mean /save?",
        "/save needs a file",
        "the folder /no/where does not exist",
    ):
        assert " ".join(said.split()) in result.err


def test_sampled_answers_have_seeds_of_their_own(typed: Type, model: Path) -> None:
    sampled = ("-m", model, "-n", 12, "--temperature", 2, "--seed", 3)
    first = typed(*sampled, lines=["hi", "/retry"])
    assert typed(*sampled, lines=["hi", "/retry"]).out == first.out
    answer, other = first.out.encode().split(b"\n")[:2]
    assert answer != other


def pressing(monkeypatch: pytest.MonkeyPatch, times: int = 1, after: int = 3) -> None:
    """Ctrl-C while the first answer is written, at its so many-th piece."""
    pieces = 0
    emit = terminal.emit

    def emitting(text: str) -> None:
        nonlocal pieces
        emit(text)
        pieces += 1
        if pieces == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_session, "emit", emitting)


@pytest.mark.parametrize("drafts", [False, True])
def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    typed: Type,
    run: Run,
    model: Path,
    profile: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    generations: list[Any],
    drafts: bool,
) -> None:
    more = ("-p", profile) if drafts else ("-m", model)
    whole = typed(*more, "-n", 200, lines=["hi"]).out
    saved = tmp_path / "chat.jsonl"
    with monkeypatch.context() as patch:
        pressing(patch)
        result = typed(*more, "-n", 200, lines=["hi", f"/save {saved}", "go on"])
    assert result.code == 0
    said = json.loads(saved.read_text())["messages"]
    assert 0 < len(said[1]["content"]) < len(whole) / 2
    assert whole.startswith(said[1]["content"].rstrip("\ufffd"))  # perhaps half a character
    _, cut, after = generations
    assert cut.finish is None
    assert after.num_cached >= cut.prompt_length
    text = answered(run, model, *said, {"role": "user", "content": "go on"}, folder=tmp_path)
    assert result.out.endswith(after_text := result.out[len(said[1]["content"]) + 1 :])
    assert after_text.startswith(text)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_or_before_the_answer_takes_the_message_back(
    typed: Type, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        pressing(patch, times=2)
        result = typed("-m", model, "-n", 50, lines=["hi", f"/save {tmp_path / 'a.jsonl'}"])
    assert "taken back" in result.err
    assert json.loads((tmp_path / "a.jsonl").read_text())["messages"] == []
    decoder_prefill = "conflayers_cli.engine.decoder.Decoder.prefill"
    from conflayers_cli.engine.decoder import Decoder

    prefill, calls = Decoder.prefill, 0

    def interrupted(self: Decoder, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        # the checks at loading call it, too: the chat's own is the one with a long prompt
        if arguments[0].shape[1] > 8 and not calls and arguments[0].shape[1] != 16:
            calls += 1
            signal.raise_signal(signal.SIGINT)
        return prefill(self, *arguments, **more)

    monkeypatch.setattr(decoder_prefill, interrupted)
    result = typed("-m", model, "-n", 5, lines=["one two three", "hi", "/stats"])
    assert calls == 1
    assert result.code == 0
    assert "taken back" in result.err
    assert "prompt tokens 0 were there" in result.err


def test_ctrl_c_at_the_prompt_ends_the_chat_well(typed: Type, model: Path) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    result = typed("-m", model, "-n", 3, lines=["hi", press, "never"])
    assert result.code == 0
    assert len(result.out.splitlines()) == 1


def test_ctrl_c_in_a_script_ends_it(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressing(monkeypatch)
    result = run("chat", "-m", model, "--dtype", "float32", "-n", 50, stdin="hi\nyou\n")
    assert result.code == 130
    assert "interrupted" in result.err


def test_a_full_context_drops_the_oldest_turns(
    run: Run, tmp_path: Path, generations: list[Any]
) -> None:
    small = save_model(tmp_path / "small", max_position_embeddings=160)
    lines = "".join(f"this is the message number {i}\n" for i in range(8))
    more = ("--dtype", "float32", "-n", 10, "--system", "S")
    result = run("chat", "-m", small, *more, stdin=lines)
    assert result.code == 0
    assert "is full: the first" in result.err
    prompts = [read(generation) for generation in generations]
    assert len(prompts) == 8
    assert all(generation.prompt_length + 10 <= 160 for generation in generations)
    assert all(prompt.startswith("<system>S\n<user>") for prompt in prompts)
    assert prompts[-1].endswith("number 7\n<assistant>")
    assert "number 0" not in prompts[-1]
    # not at every turn, for each time all is read anew
    shared = len("<system>S\n<user>this is the message number ")
    again = [each for each in generations[1:] if each.num_cached <= shared]
    assert 0 < len(again) <= 3
    long = run("chat", "-m", small, *more, stdin="x" * 200)
    assert long.code == 2
    assert "the message is too long" in long.err


def test_what_a_template_leaves_out_is_read_anew(
    run: Run, tmp_path: Path, generations: list[Any]
) -> None:
    """It renders earlier answers otherwise than they were written."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] | upper if m['role'] == 'assistant' else m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = save_model(tmp_path / "upper", template=template)
    result = run("chat", "-m", folder, "--dtype", "float32", "-n", 20, stdin="hi\nyou\n")
    assert result.code == 0
    first, second = generations
    assert first.prompt_length <= second.num_cached < first.prompt_length + 20


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], "hi", "no model"),
        (["--stop", ""], "hi", "--stop: an empty text"),
        (["--draft", "skip"], "hi", "--profile FILE"),
        ([], b"\xff\n", "standard input is not UTF-8"),
        ([], "/nope\n", "no such command: /nope"),
    ],
)
def test_what_is_refused(
    run: Run, model: Path, arguments: list[str], stdin: str | bytes, said: str
) -> None:
    source = [] if said == "no model" else ["-m", str(model), "--dtype", "float32"]
    result = run("chat", *source, *arguments, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_a_model_without_a_template(run: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base", template=None)
    result = run("chat", "-m", folder, stdin="hi")
    assert result.code == 2
    assert "no chat template" in result.err


def test_chat_is_for_one_process(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "world", lambda: type("World", (), {"size": 2})())
    result = run("chat", "-m", model, stdin="hi")
    assert result.code == 2
    assert "one process" in result.err


def test_an_end_of_input_behind_a_backslash() -> None:
    lines = iter(["a\\", "b\\"])
    assert chat_input.read_message(lambda prompt: next(lines, None)) == "a\nb"
    assert chat_input.read_message(lambda prompt: None) is None


class Terminal:
    """A chat in a process of its own on a terminal."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        arguments = ("chat", *arguments)
        self.process = start("conflayers_cli", arguments, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = b""

    def until(self, wanted: bytes, count: int = 1) -> None:
        """Read on until this has been seen so often."""
        deadline = time.monotonic() + 90
        while self.seen.count(wanted) < count:
            assert time.monotonic() < deadline, self.seen
            ready, _, _ = select.select([self.master], [], [], 1.0)
            if ready:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:  # the process has ended
                    break
        assert self.seen.count(wanted) >= count, self.seen

    def write(self, data: bytes) -> None:
        os.write(self.master, data)


def test_on_a_real_terminal(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    terminal = Terminal("-m", model, "--dtype", "float32", "-n", 3000)
    try:
        terminal.until(b"> ")
        terminal.write(b"\x1b[200~hi\nyou\x1b[201~\r")  # a paste of two lines
        before = len(terminal.seen)
        while len(terminal.seen) < before + 60:
            terminal.seen += os.read(terminal.master, 4096)
        terminal.write(b"\x03")
        terminal.until(b"> ", terminal.seen.count(b"> ") + 1)
        terminal.write(f"/save {saved}\r".encode())
        prompts = terminal.seen.count(b"> ")
        terminal.until(b"wrote 2 messages")
        # at the prompt: what is typed before it is there is the terminal's own, not readline's
        terminal.until(b"> ", prompts + 1)
        terminal.write(b"\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    said = json.loads(saved.read_text())["messages"]
    assert said[0]["content"] == "hi\nyou"
    assert 0 < len(said[1]["content"]) < 3000
    assert END not in said[1]["content"]


def test_prompts_do_not_go_where_the_answers_go(model: Path) -> None:
    """On a terminal with standard output led elsewhere."""
    master, slave = pty.openpty()
    arguments = ["chat", "-m", model, "--dtype", "float32", "-n", "4"]
    pipe = subprocess.PIPE
    process = start("conflayers_cli", arguments, stdin=slave, stdout=pipe, stderr=pipe)
    os.close(slave)
    os.write(master, b"hi\n\x04")
    result = finished(process)
    os.close(master)
    assert result.code == 0
    assert "> " not in result.out.replace(">>", "")
    assert result.err.count("> ") == 2
