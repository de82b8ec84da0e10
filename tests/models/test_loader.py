"""Loading a model from a folder, what is refused and how, encoding, the fingerprint."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import models, pre_tokenizers
from transformers.utils import logging as transformers_logging

from conflayers_cli.errors import InputError
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tokenization import encode

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<unk>", "<end>", "<user>", "<assistant>", "hello", "world"]


def _tokenizer(template: str | None = TEMPLATE) -> Any:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _config(**more: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": [3, 99],
    }
    return hf.LlamaConfig(**{**sizes, **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    torch.manual_seed(0)
    hf.LlamaForCausalLM(_config()).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _refusal(source: str | Path, **options: Any) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(InputError) as caught:
        load_model(str(source), LoadOptions(**options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loads_a_folder(folder: Path) -> None:
    told: list[float] = []
    loaded = load_model(
        str(folder),
        LoadOptions(device="cpu", dtype="float32"),
        progress=lambda _, done: told.append(done),
    )
    assert loaded.name == str(folder)
    assert loaded.device == torch.device("cpu")
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    # From the config (99 is no token) and from the tokenizer.
    assert loaded.end_tokens == {1, 3}
    assert loaded.context_length == 64
    assert loaded.has_chat_template
    assert told == [0.0, 1.0]


def test_loading_is_silent_and_restores_settings(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    load_model(str(folder), LoadOptions(dtype="float32"))
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled() == bars


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_as_asked(folder: Path, name: str) -> None:
    loaded = load_model(str(folder), LoadOptions(device="cpu", dtype=name))
    assert loaded.dtype == loaded.model.dtype == getattr(torch, name)
    assert name in loaded.dtype_reason


def test_dtype_is_chosen_for_the_models_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    seen: list[int] = []

    def measure(config: Any) -> float:
        seen.append(config.hidden_size)
        return 0.5

    monkeypatch.setattr("conflayers_cli.models.dtype.measure_bfloat16_ratio", measure)
    loaded = load_model(str(folder), LoadOptions(device="cpu"))
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16
    assert loaded.dtype_reason.startswith("bfloat16: the processor has amx_bf16")
    assert seen == [16]


def test_wrong_dtype_and_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert load_model(str(folder)).device == torch.device("cpu")
    assert "bfloat16" in _refusal(folder, dtype="int8")
    assert "cuda" in _refusal(folder, device="gpu")
    assert "cuda" in _refusal(folder, device="meta")
    assert "CUDA" in _refusal(folder, device="cuda:1")
    assert "MPS" in _refusal(folder, device="mps")


@pytest.mark.parametrize("source", ["./none", "/no/such", "a/b/c", "none.gguf", "~/none", "a b"])
def test_no_such_path(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = _refusal(source)
    assert message.startswith("no such model")
    assert "smollm2-deep" in message


def test_misspelt_builtin_is_guessed() -> None:
    assert "did you mean smollm2-deep?" in _refusal("smolm2-deep")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = _refusal("nobody/no-such-model")
    assert "nobody/no-such-model" in message
    assert "smollm2" in message


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = _refusal(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_incomplete_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:50], b"", b"x" * 500):
        weights.write_bytes(broken)
        assert "weights" in _refusal(folder)
    weights.unlink()
    assert "no weights" in _refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in _refusal(folder)
    assert "give a folder" in _refusal(folder / "tokenizer.json")


def test_broken_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"hello", b"GGUF\x03\x00\x00\x00" + b"\x01" * 40):
        path.write_bytes(content)
        assert "model.gguf" in _refusal(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 4}, "9 missing"),
        ({"hidden_size": 32}, "of another shape"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 3}, "attention heads"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["LlamaModel"]}, "not a causal language model"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "trust_remote_code lets it run"),
    ],
)
def test_refused_configs(folder: Path, changes: dict[str, Any], expected: str) -> None:
    _edit_config(folder, **changes)
    assert expected in _refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_malformed_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config" in _refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "None"}}'])
def test_malformed_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer" in _refusal(folder)


def test_encode(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert encode(loaded, None, "hello world what") == [4, 5, 0]
    assert encode(loaded, [{"role": "user", "content": "hello"}], None) == [2, 4, 1, 3]
    with pytest.raises(InputError, match="only user and assistant"):
        encode(loaded, [{"role": "system", "content": "hello"}], None)
    with pytest.raises(InputError, match="empty"):
        encode(loaded, None, "")
    with pytest.raises(ValueError, match="either"):
        encode(loaded, None, None)


def test_encode_without_template(folder: Path) -> None:
    loaded = load_model(str(folder))
    bare = dataclasses.replace(loaded, tokenizer=_tokenizer(None), has_chat_template=False)
    assert encode(bare, None, "hello") == [4]
    with pytest.raises(InputError, match=r"\(raw\)"):
        encode(bare, [{"role": "user", "content": "hello"}], None)


def test_fingerprint_names_the_shape(folder: Path) -> None:
    shape = config_fingerprint(load_model(str(folder)).model.config)
    digest = str(shape.pop("config_hash"))
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert shape == {
        "architecture": "LlamaForCausalLM",
        "depth": 3,
        "hidden_size": 16,
        "attention_heads": 4,
        "key_value_heads": 2,
        "intermediate_size": 32,
        "vocabulary": 8,
    }


def test_fingerprint_is_about_what_is_computed(folder: Path) -> None:
    def digest(loaded: LoadedModel) -> object:
        return config_fingerprint(loaded.model.config)["config_hash"]

    whole = digest(load_model(str(folder), LoadOptions(dtype="float32")))
    assert digest(load_model(str(folder), LoadOptions(dtype="bfloat16"))) == whole
    _edit_config(
        folder,
        transformers_version="5.0.0",
        torch_dtype="float16",
        _name_or_path="elsewhere",
        use_cache=False,
        eos_token_id=2,
        conflayers_planted=[1],
        temperature=0.3,
        # As GGUF stores 1e-06, a float32.
        rms_norm_eps=9.999999974752427e-07,
    )
    assert digest(load_model(str(folder))) == whole
    _edit_config(folder, rms_norm_eps=1e-5)
    assert digest(load_model(str(folder))) != whole


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"num_hidden_layers": 4},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
    ],
)
def test_fingerprint_sees_every_change(change: dict[str, Any]) -> None:
    assert (
        config_fingerprint(_config(**change))["config_hash"]
        != config_fingerprint(_config())["config_hash"]
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: hf.GPT2Config(n_layer=3, n_embd=32, n_head=4), (3, 32, 4, 4, None)),
        (lambda: hf.GPT2Config(n_layer=3, n_embd=32, n_head=4, n_inner=64), (3, 32, 4, 4, 64)),
        (
            lambda: hf.OPTConfig(
                num_hidden_layers=3, hidden_size=32, num_attention_heads=4, ffn_dim=64
            ),
            (3, 32, 4, 4, 64),
        ),
        (
            lambda: hf.Gemma3Config(
                text_config={
                    "num_hidden_layers": 3,
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 1,
                    "intermediate_size": 64,
                }
            ),
            (3, 32, 4, 1, 64),
        ),
    ],
)
def test_fingerprint_of_families(make: Callable[[], Any], expected: tuple[int | None, ...]) -> None:
    shape = config_fingerprint(make())
    names = ("depth", "hidden_size", "attention_heads", "key_value_heads", "intermediate_size")
    assert tuple(shape[name] for name in names) == expected
