"""What a model's files and its user say of texts, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.cli.conftest import END, Run, byte_tokenizer, save_model, write_prompts

THINKS = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    "{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}"
    "{% for each in documents or [] %}{{ each['text'] }}{% endfor %}"
)


@pytest.fixture
def thinking(tmp_path: Path) -> Path:
    return save_model(tmp_path / "thinking", template=THINKS)


def tokens_of(result: Any) -> int:
    assert result.code == 0, result.err
    return int(result.document["prompt_tokens"])


def test_arguments_of_the_template(run: Run, thinking: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "search"}]')
    (tmp_path / "texts.json").write_text('[{"text": "one"}, {"text": "two"}]')
    call = ("generate", "Hello", "-m", thinking, "-n", 2, "--dtype", "float32", "--json")
    plain = tokens_of(run(*call))
    assert tokens_of(run(*call, "--template-arg", "enable_thinking=false")) == plain + 5  # False
    assert tokens_of(run(*call, "--template-arg", "enable_thinking=off")) == plain + 3
    assert tokens_of(run(*call, "--tools", "tools.json")) == plain + 6
    assert tokens_of(run(*call, "--documents", "texts.json")) == plain + 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--template-arg", "enable_thinking"), "is not NAME=VALUE"),
        (("--template-arg", "a=1", "--template-arg", "a=2"), "a: is given twice"),
        (("--template-arg", "tokenize=true"), "tokenize: is given by other options"),
        (("--tools", "missing.json"), "there is no such file"),
        (("--tools", "object.json"), "takes a JSON list of objects"),
        (("--tools", "list.json", "--template-arg", "tools=[]"), "give one of the two"),
        (("--stop", ""), "an empty text would end every answer"),
        (("--stop-escape",), "--stop-escape goes with --stop"),
        (("--stop", "\\q", "--stop-escape"), "a backslash that means nothing"),
        (("--sampling", "mine"), "--sampling mine: there is model"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Run, thinking: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    result = run("generate", "Hello", "-m", thinking, *arguments)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


def test_a_chat_without_a_template_is_noted(run: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "plain", template=None)
    data = write_prompts(tmp_path / "p.jsonl", "Hello")
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    result = run("generate", "-m", model, "--data", data, "-n", 2)
    assert result.code == 0
    assert "has no chat template: chats are given to it as plain text" in result.err
    assert "no chat template" not in run("generate", "Hello", "-m", model, "-n", 2).err


def test_a_stop_with_a_line_end(run: Run, thinking: Path) -> None:
    call = ("generate", "Hello", "-m", thinking, "-n", 2)
    assert "--stop-escape takes them" in run(*call, "--stop", "\\n").err
    assert run(*call, "--stop", "\\n", "--stop-escape").err == ""


def test_a_generation_config_is_followed(run: Run, tmp_path: Path) -> None:
    """The text of a folder is that of transformers' generate on it, with drafts and in a file."""
    folder = save_model(tmp_path / "model", template=None)
    config = hf.GenerationConfig(
        eos_token_id=256,
        no_repeat_ngram_size=2,
        suppress_tokens=[5, 6, 7, 8],
        repetition_penalty=1.2,
        do_sample=True,
        temperature=0.7,
        top_k=20,
    )
    config.save_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = byte_tokenizer(None)("Hello", return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
    )
    expected = output[0, ids.shape[1] :].tolist()
    call = ("generate", "-m", folder, "-n", 40, "--dtype", "float32")
    assert run(*call, "Hello", "--json").document["token_ids"] == expected
    assert run(*call, "Hello", "--json", "--draft", "ngram").document["token_ids"] == expected
    data = write_prompts(tmp_path / "p.jsonl", "Hello", "world")
    several = run(*call, "--data", data, "--batch-size", 2)
    assert several.lines[0]["token_ids"] == expected
    assert several.err == ""
    sampled = run(*call, "Hello", "--sampling", "model", "--seed", 3, "--stats")
    assert "sampled with seed 3: temperature 0.7, top_k 20" in sampled.err


def test_special_tokens_in_texts(run: Run, tmp_path: Path) -> None:
    """A model that says nothing but one token, which is special, and ends with another."""
    folder = save_model(tmp_path / "model", template=None)
    config = hf.GenerationConfig(eos_token_id=3, suppress_tokens=[*range(256)])
    config.save_pretrained(folder)
    call = ("generate", "Hello", "-m", folder, "-n", 3, "--dtype", "float32")
    assert run(*call).out.strip() == ""
    assert run(*call, "--keep-special-tokens").out.strip() in (END * 3, "")
    stopped = run(*call, "--stop", END, "--json").document
    assert stopped["finish_reason"] == "stop" and len(stopped["token_ids"]) == 1


def test_final_messages_of_a_file_are_continued_where_that_is_asked_for(
    run: Run, tmp_path: Path
) -> None:
    """Otherwise they are reference answers, as data sets have them."""
    model = save_model(tmp_path / "model")
    asked = {"role": "user", "content": "Why?"}
    chats = [[asked, {"role": "assistant", "content": text}] for text in ("So ", "")]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    call = ("generate", "-m", model, "--data", data, "-n", 6, "--dtype", "float32")
    continued = run(*call, "--continue-final-message")
    assert continued.code == 0, continued.err
    begun, empty = continued.lines
    left_out = run(*call).lines[0]
    assert empty["token_ids"] == left_out["token_ids"]  # this template has nothing in between
    assert begun["prompt_tokens"] == left_out["prompt_tokens"] + len("So ")
    ids = hf.AutoTokenizer.from_pretrained(model).apply_chat_template(
        chats[0], continue_final_message=True, return_dict=False
    )
    plain = hf.AutoModelForCausalLM.from_pretrained(model).eval()
    given = torch.tensor([ids])
    output = plain.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6
    )
    assert begun["token_ids"] == output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("row", "arguments", "told"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, (), "chats.jsonl:1: the last is the us"),
        ({"prompt": "a"}, (), "chats.jsonl:1: this is a text, and --continue-final-message goes"),
        ({"turns": ["a"]}, (), "this is a text"),
        ({"prompt": "a"}, ("--raw",), "which --raw leaves out"),
        ({"prompt": "a"}, ("--template-arg", "continue_final_message=true"), "by other options"),
    ],
)
def test_what_can_not_be_continued_is_refused(
    run: Run, tmp_path: Path, row: dict[str, Any], arguments: tuple[str, ...], told: str
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(row) + "\n")
    result = run("generate", "-m", "none", "--data", data, "--continue-final-message", *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert told in result.err


def test_there_is_no_final_message_without_a_file(run: Run) -> None:
    result = run("generate", "Hello", "-m", "none", "--continue-final-message")
    assert (result.code, "goes with --data" in result.err) == (2, True)
