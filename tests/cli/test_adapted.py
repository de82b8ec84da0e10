"""Adapted and quantised models from the command line: calibrate, generate, bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from conflayers_cli.profile.schema import Profile
from tests.cli.conftest import Run, byte_tokenizer, quick_search, save_profile, write_prompts
from tests.models.test_quantization import save

QUICK = quick_search(2, 12, 4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("adapted") / "plain")


def adapter_of(base: Path, plain: Path, target: Path) -> Path:
    """A random LoRA of a model, made for the plain one and named as one of ``base``."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(plain), config)
    model.save_pretrained(target)
    path = target / "adapter_config.json"
    settings = {**json.loads(path.read_text()), "base_model_name_or_path": str(base)}
    path.write_text(json.dumps(settings))
    return target


def quantised(plain: Path, target: Path, config: Any) -> Path:
    """A model as transformers saves it once it is quantised."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    byte_tokenizer(None).save_pretrained(target)
    return target


def torchao(plain: Path, target: Path) -> Path:
    found = pytest.importorskip("torchao.quantization")
    return quantised(plain, target, hf.TorchAoConfig(found.Int8WeightOnlyConfig()))


def bitsandbytes(plain: Path, target: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return quantised(plain, target, config)


def adapter(plain: Path, target: Path) -> Path:
    return adapter_of(plain, plain, target)


def qlora(plain: Path, target: Path) -> Path:
    return adapter_of(bitsandbytes(plain, target.with_name("base")), plain, target)


@pytest.mark.parametrize(
    ("make", "flags", "told"),
    [
        (adapter, (), "adapter merged into the weights"),
        (adapter, ("--no-merge-adapter",), "adapter beside the weights"),
        (torchao, (), "weights quantised with torchao"),
        (bitsandbytes, (), "weights quantised with bitsandbytes"),
        (qlora, (), "weights quantised with bitsandbytes; adapter beside the weights"),
    ],
    ids=["adapter", "adapter-beside", "torchao", "bitsandbytes", "qlora"],
)
def test_the_whole_way(
    make: Callable[[Path, Path], Path],
    flags: tuple[str, ...],
    told: str,
    plain: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    folder = make(plain, tmp_path / "model")
    prompts = write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(4)))
    how = ("--dtype", "bfloat16", *flags)

    def done(*arguments: object) -> Any:
        result = run(*arguments, *how)
        assert result.code == 0, result.err
        assert "warning" not in result.err
        return result

    done("calibrate", "-m", folder, "--data", prompts, "-o", "found.yaml", *QUICK)
    found = Profile.load(tmp_path / "found.yaml")
    assert found.model.name == str(folder)
    done("generate", "Hello", "-p", "found.yaml", "-n", 4)

    # Drafts as long as the profile says: on a tiny model nothing ever pays. A profile of the plain
    # model goes with what was made of it.
    profile = save_profile(tmp_path / "plain.yaml", plain)
    plain_way = ("-m", folder, "--draft", "none")
    vanilla = done("generate", "Hello", *plain_way, "-n", 24, "--json").document
    fast = done("generate", "Hello", "-m", folder, "-p", profile, "-n", 24, "--json").document
    assert fast["token_ids"] == vanilla["token_ids"]
    assert fast["stats"]["drafted"] > 0 == vanilla["stats"]["drafted"]
    assert told in done("generate", "Hello", "-m", folder, "-n", 2, "--stats").err

    bench = ("bench", "-m", folder, "-p", profile, "--data", prompts, "-n", 6, "--runs", 1)
    document = done(*bench, "--json").document
    assert document["identical_outputs"]["matching"] == 4


def test_a_profile_of_the_base_is_told_to_be_of_other_weights(
    plain: Path, run: Run, tmp_path: Path
) -> None:
    folder = adapter(plain, tmp_path / "model")
    made = ("--strategy", "unified", "--target-speedup", 2, "--dtype", "float32")
    assert run("calibrate", "-m", plain, "-o", "p.yaml", *made).code == 0
    notes = []
    for merging in ((), ("--no-merge-adapter",)):
        how = ("-m", folder, "-p", "p.yaml", "-n", 2, "--dtype", "float32", *merging)
        result = run("generate", "Hello", *how)
        assert result.code == 0, result.err
        notes.append(next(line for line in result.err.splitlines() if "other weights than" in line))
    assert notes[0] == notes[1]
    assert "as a fine-tune is" in notes[0]


def test_a_quantised_base_is_not_merged_with(plain: Path, run: Run, tmp_path: Path) -> None:
    folder = qlora(plain, tmp_path / "model")
    result = run("generate", "Hello", "-m", folder, "--merge-adapter")
    assert result.code == 2
    assert "is quantised with bitsandbytes" in result.err


def test_a_base_that_is_not_there_is_told_in_a_line(plain: Path, run: Run, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "gone", plain, tmp_path / "model")
    result = run("generate", "Hello", "-m", folder)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"conflayers: error: {folder} is an adapter of ")
    assert "base_model_name_or_path" in result.err
