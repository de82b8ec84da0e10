"""``--truncate``: prompts longer than the context, cut where it hurts least, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import Message, Prompt
from conflayers_cli.generation.truncation import GAP, prompt_texts, shorten, truncate_prompt
from conflayers_cli.models.tokenization import TooLongError
from tests.cli.conftest import Run, save_model

FAST = ("--device", "cpu", "--dtype", "float32", "--no-stream")
CONTEXT = 200


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    return save_model(folder, max_position_embeddings=CONTEXT)


def test_without_it_a_long_prompt_is_refused(run: Run, small: Path) -> None:
    for length in (300, 30_000):
        result = run("generate", "x" * length, "-m", small, "-n", "4", *FAST)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("conflayers: error: the prompt is too long: ")
        assert f"takes {CONTEXT}, the answer included (--truncate shortens it)" in result.err


def test_plain_text_keeps_its_end(run: Run, small: Path) -> None:
    arguments = ("-m", small, "-n", "20", "--raw", *FAST, "--json")
    text = "".join(chr(97 + i % 26) for i in range(500))
    kept = CONTEXT - 20
    result = run("generate", text, *arguments, "--truncate")
    expected = run("generate", text[-kept:], *arguments)
    assert result.document.pop("truncated") == 500 - kept
    assert expected.err == ""
    told = f"conflayers: note: {500 - kept} tokens of the prompt were left out, {kept} are kept\n"
    assert result.err == told
    assert result.document["token_ids"] == expected.document["token_ids"]
    assert result.document["prompt_tokens"] == kept
    assert "truncated" not in expected.document


def test_a_prompt_that_fits_is_left_alone(run: Run, small: Path) -> None:
    arguments = ("generate", "Hello", "-m", small, "-n", "9", *FAST)
    assert run(*arguments, "--truncate") == run(*arguments)


def test_half_of_the_context_is_the_most_kept_free(run: Run, small: Path) -> None:
    result = run("generate", "x" * 900, "-m", small, "-n", "999", *FAST, "--truncate", "--json")
    assert result.document["prompt_tokens"] == CONTEXT // 2
    assert "leaves room for 100 new tokens instead of 999" in result.err


def test_a_file_of_prompts(run: Run, small: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "A" + "b" * 700 + "C"}], "id": "chat"}
    data, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    data.write_text(f'{{"prompt": "short", "id": "s"}}\n{json.dumps(chat)}\n')
    arguments = ("generate", "-m", small, "-n", "4", "--data", data, "-o", output, *FAST)
    assert run(*arguments).code == 2
    output.unlink()
    result = run(*arguments, "--truncate")
    assert result.code == 0
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert "truncated" not in first
    assert second["truncated"] > 500
    assert f"note: {second['truncated']} tokens of prompt chat were left out" in result.err
    # another answer than without, so one can't go on with the other's
    assert "made with other settings" in run(*arguments, "--resume").err
    assert run(*arguments, "--resume", "--truncate").code == 0


def test_bench_and_calibrate_take_it(run: Run, small: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.txt"
    data.write_text("x" * 900 + "\nshort\nand another\n")
    draft = ("--draft", "none", "--runs", "1", "--warmup", "0", "--json")
    arguments = ("bench", "-m", small, "-n", "3", "--data", data, *FAST[:-1], *draft)
    assert run(*arguments).code == 2
    result = run(*arguments, "--truncate")
    assert result.document["settings"]["truncate"] is True
    search = ("--strategy", "unified", "--target-speedup", "1.3", "--json")
    calibration = ("calibrate", "-m", small, "-n", "8", "--data", data, *FAST[:-1], *search)
    assert run(*calibration).code == 2
    result = run(*calibration, "--truncate")
    assert result.code == 0, result.err
    assert result.document["profile"]["found_by"]["settings"]["truncate"] is True


def test_a_template_without_room(run: Run, small: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 20
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"messages": [*chat, chat[0]]}))
    result = run("generate", "-m", small, "--data", data, *FAST, "--truncate")
    assert result.code == 2
    assert "is too long: even without its text it has over 100 tokens" in result.err


def test_messages_lose_their_middle_the_longest_first() -> None:
    texts = {"system": "be brief", "user": "0123456789" * 3}
    prompt = Prompt("1", messages=tuple(Message(*each) for each in texts.items()))
    assert prompt_texts(shorten(prompt, 11)) == ["be brief", f"012345{GAP}56789"]
    assert prompt_texts(shorten(prompt, 1)) == [f"b{GAP}", f"0{GAP}"]
    assert shorten(prompt, 30) == prompt
    assert shorten(Prompt("1", text="abcdef"), 2) == Prompt("1", text="ef")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=5), st.integers(30, 800))
def test_as_much_is_kept_as_there_is_room_for(lengths: list[int], most: int) -> None:
    prompt = Prompt("1", messages=tuple(Message("user", "x" * length) for length in lengths))

    def encode(part: Prompt) -> list[int]:
        found = [0] * sum(map(len, prompt_texts(part)))
        if len(found) > 2 * most:
            raise TooLongError("is too long")
        return found

    fitted = truncate_prompt(prompt, encode, most)
    assert len(fitted.tokens) <= most
    if sum(lengths) <= most:
        assert fitted.prompt == prompt
    else:  # a character more of each, or some more for what stands in the gap
        assert len(fitted.tokens) > most - most // 256 - len(lengths) * (1 + len(GAP))
    with pytest.raises(InputError, match="even without"):
        truncate_prompt(prompt, lambda part: [0] * (most + 1), most)
