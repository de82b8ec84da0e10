"""The built-in models as converted from the real wheel."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from conflayers_cli.models import builtin
from conflayers_cli.models.builtin import BUILTIN, ensure_built
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tokenization import encode
from conflayers_cli.skip_plan import SkipPlan

PLANTED = (
    *(3, 4, 6, 8, 10, 11, 14, 15, 16, 18, 19, 21, 22, 23, 26),
    *(27, 28, 30, 33, 35, 36, 38, 42, 43, 46, 47, 48, 50, 52, 58),
)
PROMPTS = (
    "Explain photosynthesis to a ten year old.",
    "What is 17 times 23? Show your steps.",
    "Write a Python function that reverses a linked list.",
    "Draft a polite email asking my landlord to repair the heating.",
    "Who wrote Pride and Prejudice, and what is it about?",
    "List three differences between TCP and UDP.",
)
NEW_TOKENS = 32
END_TOKEN = 2


class _Identity(nn.Module):
    """A layer that passes the hidden states on, whatever else it is called with."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


@contextmanager
def _without(layers: nn.ModuleList, indices: tuple[int, ...]) -> Iterator[None]:
    originals = {i: layers[i] for i in indices}
    for i in indices:
        layers[i] = _Identity()
    try:
        yield
    finally:
        for i, layer in originals.items():
            layers[i] = layer


@dataclass(frozen=True)
class _Texts:
    """The model's own greedy answers, int64 [prompts, prompt + new], padded in front."""

    model: Any
    ids: torch.Tensor
    mask: torch.Tensor
    new: int

    @functools.cached_property
    def full(self) -> torch.Tensor:
        """The whole model's choices."""
        return self.choices()

    def choices(self) -> torch.Tensor:
        """The greedy choice at every answered position: int64 [prompts, new]."""
        with torch.inference_mode():
            logits = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=self.new + 1,
            ).logits
        return logits[:, :-1].argmax(-1)

    def agreement(self, skipped: tuple[int, ...]) -> float:
        """At which part of the positions the choice stays the same without these layers."""
        full = self.full
        with _without(self.model.model.layers, skipped):
            same = full == self.choices()
        # Up to the end token of each answer, that one included.
        ended = self.ids[:, -self.new :] == END_TOKEN
        counts = ended.cumsum(-1) - ended.long() == 0
        return same[counts].float().mean().item()


@pytest.fixture(scope="module")
def texts(smollm2_deep: LoadedModel) -> _Texts:
    prompts = [encode(smollm2_deep, [{"role": "user", "content": p}], None) for p in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[END_TOKEN] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        text = smollm2_deep.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=END_TOKEN,
        )
    new = text.shape[1] - width
    return _Texts(smollm2_deep.model, text, nn.functional.pad(mask, (0, new), value=1), new)


@pytest.mark.parametrize("name", ["smollm2", "smollm2-deep"])
def test_folder_holds_a_plain_float32_model(real_cache: Path, name: str) -> None:
    folder = ensure_built(name)
    assert folder.parent == real_cache
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == BUILTIN[name].depth
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(key).get_dtype() for key in names} == {"F32"}
    assert len(names) == 2 + 9 * BUILTIN[name].depth


def test_chat_format_and_end_token(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    ids = encode(smollm2, [{"role": "user", "content": "Hello"}], None)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.end_tokens == {tokenizer.convert_tokens_to_ids("<|im_end|>")} == {2}
    assert smollm2.model.generation_config.eos_token_id == 2
    assert smollm2.context_length == 8192


@pytest.mark.parametrize(
    "text", ["Hello , world !", "don 't\n\n  café 日本", "a   12 b", "\t1.5e3"]
)
def test_text_survives_the_tokenizer(smollm2: LoadedModel, text: str) -> None:
    ids = encode(smollm2, None, text)
    assert smollm2.tokenizer.decode(ids) == text


def test_digits_stand_alone(smollm2: LoadedModel) -> None:
    tokens = smollm2.tokenizer.convert_ids_to_tokens(encode(smollm2, None, "a   12"))
    assert tokens == ["a", "ĠĠĠ", "1", "2"]


def test_it_is_converted_once(
    real_cache: Path, smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path, progress: object) -> None:
        pytest.fail("it is converted again")

    known = {name: replace(model, make=make) for name, model in BUILTIN.items()}
    monkeypatch.setattr(builtin, "BUILTIN", known)
    again = load_model("smollm2", LoadOptions(device="cpu", dtype="float32"))
    assert torch.equal(again.model.lm_head.weight, smollm2.model.lm_head.weight)


def test_planted_layers(smollm2_deep: LoadedModel) -> None:
    config = smollm2_deep.model.config
    assert tuple(config.conflayers_planted) == PLANTED
    assert len(PLANTED) == 30
    # Neither of the sets that a search could start from is near the answer.
    assert len(set(PLANTED) & set(SkipPlan.balanced(60).layers)) < 15
    layers = smollm2_deep.model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(60))
    size = [layer.mlp.down_proj.weight.norm().item() for layer in layers]
    for i in PLANTED:
        original = max(j for j in range(i) if j not in PLANTED)
        assert 0.01 <= size[i] / size[original] <= 0.05
        assert torch.equal(layers[i].mlp.up_proj.weight, layers[original].mlp.up_proj.weight)


def test_originals_are_the_smaller_model(smollm2: LoadedModel, smollm2_deep: LoadedModel) -> None:
    ids = torch.tensor([encode(smollm2, None, "The capital of France is")])
    with torch.inference_mode():
        expected = smollm2.model(input_ids=ids, use_cache=False).logits
        with _without(smollm2_deep.model.model.layers, PLANTED):
            actual = smollm2_deep.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(actual, expected)


def test_leaving_out_the_planted_layers_agrees(texts: _Texts) -> None:
    assert texts.agreement(PLANTED) >= 0.95


def test_the_balanced_set_is_not_the_answer(texts: _Texts) -> None:
    assert texts.agreement(SkipPlan.balanced(60).layers) < 0.5


def test_fingerprints(smollm2: LoadedModel, smollm2_deep: LoadedModel) -> None:
    shape = config_fingerprint(smollm2.model.config)
    assert shape == {
        "architecture": "LlamaForCausalLM",
        "depth": 30,
        "hidden_size": 576,
        "attention_heads": 9,
        "key_value_heads": 3,
        "intermediate_size": 1536,
        "vocabulary": 49152,
        # Profiles carry this: it may change only on purpose.
        "config_hash": "be5bdb364a43bef2",
    }
    deep = config_fingerprint(smollm2_deep.model.config)
    assert deep["depth"] == 60
    assert deep["config_hash"] != shape["config_hash"]
