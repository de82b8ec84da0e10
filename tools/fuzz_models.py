"""Readers for `fuzz` of what a model's folder holds, and of what is cached about models."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, MistralConfig

from conflayers_cli.engine import cost_cache
from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.errors import InputError
from conflayers_cli.models.checkpoint import check_json
from conflayers_cli.models.generation_settings import GenerationSettings, check_settings
from conflayers_cli.models.gguf_settings import (
    apply_to_config,
    apply_to_model,
    read_gguf_settings,
)
from conflayers_cli.models.gguf_tokenizer import build_tokenizer
from conflayers_cli.models.loaded_model import end_tokens, wrap_model
from conflayers_cli.models.peft_loading import attach_adapter, find_adapter
from conflayers_cli.models.source import READ_ERRORS, ModelSource, unreadable
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.adaptive.proposer import Learnt
from conflayers_cli.search.adaptive.remembered import Memory
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tools.fuzz_reader import Reader

_LEARNT = Learnt(SkipPlan((1, 2), (2,), "int4"), 0.875, True, {1: 0.01, 5: 0.0125}, {1: 5e-3}, 0.25)
_COSTS = PassCosts({1: 0.01, 2: 0.011, 4: 0.012}, 0.001, 0.0004, 0.0006, 64)
_SUBJECT = {"model": "m", "depth": 5, "environment": {"torch": "2"}}
_PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def readers() -> Iterator[Reader]:
    """All of them; adapters where PEFT is installed."""
    configs = tuple(json.dumps(config, indent=1).encode() for config in _generation_configs())
    json_file = (".json",)
    yield Reader(
        "generation-config", _read_generation, _sound_any, json_file, configs, begins=False
    )
    yield Reader("gguf", _read_gguf, _sound_any, (".gguf",), _gguf_corpus(), begins=False)
    kept = json.dumps(asdict(_LEARNT)).encode()
    yield Reader("learnt", _read_learnt, _sound_learnt, json_file, (kept,))
    costs = {"format": cost_cache.FORMAT, **_SUBJECT, "by_batch": {"1": asdict(_COSTS)}}
    costs_of_two = {**costs, "by_batch": {"1": asdict(_COSTS), "4": asdict(_COSTS)}}
    corpus = tuple(json.dumps(each).encode() for each in (costs, costs_of_two))
    yield Reader("costs", _read_costs, _sound_costs, json_file, corpus)
    if find_spec("peft"):
        adapters = tuple(json.dumps(each, indent=1).encode() for each in _adapters())
        yield Reader("adapter", _read_adapter, _sound_any, json_file, adapters, begins=False)


def _sound_any(found: object, path: Path) -> str | None:
    return None


def _nothing(path: Path) -> InputError:
    return InputError(f"{path}: is passed over")


# what a generation config says


def _generation_configs() -> tuple[dict[str, Any], ...]:
    return (
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "eos_token_id": [2, 5],
            "pad_token_id": 0,
            "repetition_penalty": 1.1,
            "transformers_version": "5.0.0",
        },
        {
            "suppress_tokens": [3, 4],
            "begin_suppress_tokens": [5],
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[7], [8, 9]],
            "min_length": 4,
            "min_new_tokens": 2,
            "forced_bos_token_id": 6,
            "forced_eos_token_id": 2,
            "sequence_bias": [[[5], 4.0], [[7, 9], -3.0]],
            "exponential_decay_length_penalty": [3, 1.2],
            "stop_strings": ["x", "y"],
            "remove_invalid_values": True,
            "eos_token_id": 2,
        },
        {"num_beams": 4, "penalty_alpha": 0.6, "typical_p": 0.9, "top_h": 0.4, "min_p": 0.1},
    )


def _read_generation(path: Path) -> object:
    """As a model's folder is read, and a text begun."""
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "generation_config.json")
    source = str(folder)
    check_json(folder)
    try:
        config = GenerationConfig.from_pretrained(folder)
    except READ_ERRORS as error:
        raise unreadable(ModelSource(source, source), "weights", error) from error
    text = SimpleNamespace(vocab_size=tiny.VOCABULARY)
    model: Any = SimpleNamespace(
        generation_config=config, config=SimpleNamespace(get_text_config=lambda: text)
    )
    settings = GenerationSettings(config, end_tokens(model, SimpleNamespace(), source))
    check_settings(settings, tiny.VOCABULARY, source)
    try:
        settings.complete(SamplingParams(), own=True)
    except InputError as error:  # of --sampling model, which names no folder
        raise InputError(f"{source}: {error}") from error
    tokens, scores = torch.tensor([[4, 7, 8]]), torch.zeros(1, tiny.VOCABULARY)
    for processor in settings.processors([4, 7, 8], 9):
        scores = processor(tokens, scores)
    return settings.ignored


# headers of GGUF files


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf(entries: dict[str, tuple[int, bytes]], tensors: tuple[str, ...] = ()) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    for key, (kind, value) in entries.items():
        head += _gguf_text(key) + struct.pack("<I", kind) + value
    for number, name in enumerate(tensors):
        head += _gguf_text(name) + struct.pack("<IQIQ", 1, 4, 0, 32 * number)
    return head + bytes(-len(head) % 32) + struct.pack("<8f", *range(1, 9)) * len(tensors)


def _gguf_corpus() -> tuple[bytes, ...]:
    words = b"".join(map(_gguf_text, ("a", "n", "an", "<|im_end|>")))
    merges = b"".join(map(_gguf_text, ("a n", "n a")))
    common = {
        "general.architecture": (8, _gguf_text("llama")),
        "general.alignment": (4, struct.pack("<I", 32)),
        "llama.context_length": (4, struct.pack("<I", 128)),
        "tokenizer.ggml.model": (8, _gguf_text("gpt2")),
        "tokenizer.ggml.pre": (8, _gguf_text("llama-bpe")),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 4) + words),
        "tokenizer.ggml.eos_token_id": (4, struct.pack("<I", 2)),
        "tokenizer.ggml.eot_token_id": (4, struct.pack("<I", 3)),
    }
    more = {
        "tokenizer.ggml.merges": (9, struct.pack("<IQ", 8, 2) + merges),
        "tokenizer.ggml.token_type": (9, struct.pack("<IQ4i", 5, 4, 1, 1, 1, 3)),
        "tokenizer.ggml.add_bos_token": (7, b"\1"),
        "llama.rope.scaling.type": (8, _gguf_text("yarn")),
        "llama.rope.scaling.factor": (6, struct.pack("<f", 4)),
        "llama.rope.scaling.original_context_length": (4, struct.pack("<I", 32)),
        "llama.rope.scaling.yarn_attn_factor": (6, struct.pack("<f", 1.5)),
        "llama.rope.freq_base": (6, struct.pack("<f", 1e4)),
        "llama.attention.sliding_window": (4, struct.pack("<I", 16)),
        "general.sampling.temp": (6, struct.pack("<f", 0.5)),
        "llama.odd": (12, struct.pack("<d", 0.5)),
    }
    linear = {
        "llama.rope.scale_linear": (6, struct.pack("<f", 2)),
        "tokenizer.ggml.model": (8, _gguf_text("llama")),
        "tokenizer.ggml.scores": (9, struct.pack("<IQ4f", 6, 4, 0, 1, 2, 3)),
        "tokenizer.ggml.add_bos_token": (7, b"\0"),
    }
    return (
        _gguf({**common, **more}, ("rope_freqs.weight",)),
        _gguf({**common, **linear}, ("a.weight", "rope_freqs.weight")),
        _gguf(common),
    )


def _read_gguf(path: Path) -> object:
    source = str(path)
    known = read_gguf_settings(ModelSource(source, str(path.parent), gguf=path.name))
    if known is None:
        raise ValueError("there is no GGUF file")
    apply_to_config(MistralConfig(**tiny.LLAMA_LIKE), known, source)
    inner = SimpleNamespace(rotary_emb=SimpleNamespace(inv_freq=torch.ones(4)))
    model: Any = SimpleNamespace(generation_config=GenerationConfig(), get_decoder=lambda: inner)
    tokenizer = build_tokenizer(known, source)
    apply_to_model(model, known, tokenizer, source)
    tokenizer("a naïve")
    return known


# what is cached


def _read_learnt(path: Path) -> Learnt:
    """What `Memory` reads of a file of its own that holds these bytes as what was learnt."""
    decoder = tiny.decoder("llama")
    memory = Memory(wrap_model(decoder.model, None, "tiny", "float32"), decoder, path.parent / "l")
    memory.write(_LEARNT)
    (file,) = (path.parent / "l").iterdir()
    whole, data = file.read_bytes(), path.read_bytes()
    begin = whole.index(b'"learnt":') + len(b'"learnt":')
    file.write_bytes(whole[:begin] + data + b"}")
    found = memory.read()
    if found is None:
        raise _nothing(path)
    return found


def _sound_learnt(found: object, path: Path) -> str | None:
    if not isinstance(found, Learnt):
        return "nothing learnt"
    found.plan.check(tiny.DEPTH)
    numbers = [found.acceptance, found.rounding_seconds, *found.verify.values()]
    if not all(0 <= number < float("inf") for number in (*numbers, *found.draft.values())):
        return "no durations"
    json.dumps(asdict(found), allow_nan=False)
    return None


def _read_costs(path: Path) -> dict[int, PassCosts]:
    if not (found := cost_cache.read_costs(path, _SUBJECT)):
        raise _nothing(path)
    return found


def _sound_costs(found: object, path: Path) -> str | None:
    for costs in found.values() if isinstance(found, dict) else ():
        for width in (1, 3, 50):
            if not min(1e-300, costs.floor) <= costs.at(100, 5).verify_cost(width) < float("inf"):
                return "a pass that costs nothing, or no number"
    return None


# adapters


def _adapters() -> tuple[dict[str, Any], ...]:
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
        "auto_mapping": None,
        "peft_version": "0.18.0",
    }
    return (lora, {**lora, "use_rslora": True, "fan_in_fan_out": False, "revision": None})


@cache
def _base() -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny.build(LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": 1}))
    return model, {
        f"{_PREFIX}.lora_A.weight": torch.ones(2, 32),
        f"{_PREFIX}.lora_B.weight": torch.ones(32, 2),
    }


def _read_adapter(path: Path) -> object:
    from safetensors.torch import save_file

    folder = path.parent / "adapter"
    model, weights = _base()
    if not folder.exists():
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors")
    shutil.copy(path, folder / "adapter_config.json")
    adapter = find_adapter(str(folder), {})
    if adapter is None:
        raise ValueError("there is no adapter")
    found = attach_adapter(copy.deepcopy(model), adapter, str(folder), merge=True)
    with torch.inference_mode():
        return found(torch.tensor([[1, 2, 3]])).logits
