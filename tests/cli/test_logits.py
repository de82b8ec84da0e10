"""Models whose logits are not numbers, on the command line: one line, exit code 1, lines kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, save_model, write_prompts

TOKEN = "~"
FAST = ("--dtype", "float32", "-n", 6, "--raw")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has no numbers behind one character."""
    folder = save_model(tmp_path_factory.mktemp("damaged") / "model")
    weights = load_file(folder / "model.safetensors")
    (token,) = hf.AutoTokenizer.from_pretrained(folder)(TOKEN)["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_prompt(run: Run, damaged: Path) -> None:
    result = run("generate", f"ab{TOKEN}d", "-m", damaged, *FAST)
    assert result.code == 1
    assert result.err == (
        "conflayers: error: the logits of step 1 (position 3) are NaN or infinite, so there is no "
        "next token: the model's weights are damaged, or can't be run like this\n"
    )


@pytest.mark.parametrize("more", [(), ("--batch-size", 2)], ids=["alone", "together"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_prompt_of_a_file_is_named(
    run: Run, damaged: Path, tmp_path: Path, more: tuple[Any, ...], temperature: float
) -> None:
    data = write_prompts(tmp_path / "p.jsonl", "ab", "abc", "abcd", f"{TOKEN}e")
    arguments = ("generate", "-m", damaged, "--data", data, *FAST, *more, "-o", "out.jsonl")
    result = run(*arguments, "--temperature", temperature)
    assert result.code == 1
    assert result.err.startswith("conflayers: error: prompt p3: the logits of step 1 (position 1)")
    assert result.err.count("\n") == 1
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["p0", "p1", "p2"][: len(lines)]
    again = run(*arguments, "--temperature", temperature, "--resume")
    assert again.code == 1 and "prompt p3: the logits" in again.err


@pytest.mark.parametrize("command", ["generate", "bench", "calibrate"])
def test_a_model_without_numbers_at_all(run: Run, tmp_path: Path, command: str) -> None:
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    own = {"generate": ["hi"], "bench": ["--draft", "ngram"], "calibrate": ["--output", "x.yaml"]}
    result = run(command, *own[command], "-m", folder)
    assert (result.code, result.out) == (1, "")
    assert "LlamaForCausalLM gives logits that are NaN or infinite" in result.err
    assert result.err.count("\n") == 1


def test_a_text_that_calibrate_comes_to(run: Run, damaged: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "p.jsonl", *(f"{TOKEN} {i}" for i in range(4)))
    arguments = ("-m", damaged, "--data", data, "--raw", "--dtype", "float32")
    for command in (("calibrate", "--output", "x.yaml"), ("bench", "--draft", "ngram")):
        result = run(command[0], *arguments, *command[1:])
        assert result.code == 1
        assert "the logits of step 1 (position" in result.err.splitlines()[-1]
    assert not (tmp_path / "x.yaml").exists()
