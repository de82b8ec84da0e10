"""What a GGUF file says beyond what transformers reads is followed, refused or named."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import pre_tokenizers

from conflayers_cli.errors import InputError
from conflayers_cli.models.gguf_metadata import GGUFMetadata, read_metadata
from conflayers_cli.models.gguf_settings import FACTORS, apply_to_config, apply_to_model
from conflayers_cli.models.gguf_splits import PRE_TOKENIZERS, pre_tokenizer
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.utils.notices import collect_notices
from tests.models.test_few_bits import tiny_model, write_gguf
from tests.models.test_quantization import SIZES

Writes = Callable[[gguf.GGUFWriter], None]


def loaded(path: Path, more: Writes, family: str = "llama", **config: Any) -> LoadedModel:
    file = path / "model.gguf"
    write_gguf(file, tiny_model(family, **config), {}, more=more)
    return load_model(str(file), LoadOptions(device="cpu", dtype="float32"))


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[7, 20, 33, 46, 59, 72, 85, 98, 111, 124]])
    with torch.inference_mode():
        return model(tokens).logits


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


@pytest.mark.parametrize(
    ("more", "scaling", "context"),
    [
        (linear, {"rope_type": "linear", "factor": 4.0}, 4 * SIZES["max_position_embeddings"]),
        (
            yarn,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            max(64, SIZES["max_position_embeddings"]),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, more: Writes, scaling: dict[str, Any], context: int) -> None:
    found = loaded(tmp_path, more)
    config = hf.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **scaling})
    expected = hf.LlamaForCausalLM(config).eval()
    expected.load_state_dict(tiny_model().state_dict())
    torch.testing.assert_close(logits_of(found.model), logits_of(expected), rtol=1e-4, atol=1e-4)
    plain = logits_of(tiny_model())
    assert float((logits_of(found.model) - plain).abs().max()) > 1e-3
    assert found.context_length == context


def test_factors_of_the_frequencies(tmp_path: Path) -> None:
    model = tiny_model()
    size = len(model.model.rotary_emb.inv_freq)
    factors = np.linspace(1, 8, size, dtype=np.float32)
    found = loaded(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    torch.testing.assert_close(logits_of(found.model), logits_of(model), rtol=1e-4, atol=1e-4)


def test_a_scaling_that_can_not_be_had_is_refused(tmp_path: Path) -> None:
    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(4.0)

    with pytest.raises(InputError, match="longrope, which is not read from GGUF files"):
        loaded(tmp_path, longrope)


def test_ends_of_turns_end_a_text(tmp_path: Path) -> None:
    def ends(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(7)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 9)

    assert loaded(tmp_path, ends).end_tokens == {256, 7, 9}


@pytest.mark.parametrize(("begins", "first"), [(True, [256]), (False, [])])
def test_what_a_text_begins_with(tmp_path: Path, begins: bool, first: list[int]) -> None:
    found = loaded(tmp_path, lambda writer: writer.add_add_bos_token(begins))
    ids = found.tokenizer("ab")["input_ids"]
    assert ids[:-1] == first and ids[-1] != 256


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["in", " 1999", ",", " it", "'s"]),
        ("smollm", ["in", " ", "1", "9", "9", "9", ",", " it", "'s"]),
        ("llama-bpe", ["in", " ", "199", "9", ",", " it", "'s"]),
        ("qwen2", ["in", " ", "1", "9", "9", "9", ",", " it", "'s"]),
    ],
)
def test_how_text_is_split(name: str, pieces: list[str]) -> None:
    split = pre_tokenizer(PRE_TOKENIZERS[name]).pre_tokenize_str("in 1999, it's")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == pieces


def test_the_files_way_of_splitting_is_taken(tmp_path: Path) -> None:
    found = loaded(tmp_path, lambda writer: writer.add_tokenizer_pre("smollm"))
    kinds = found.tokenizer.backend_tokenizer.pre_tokenizer
    assert isinstance(kinds, pre_tokenizers.Sequence)


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    def odd(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_pre("another")
        writer.add_float32("llama.final_logit_softcapping", 30.0)

    notes: list[str] = []
    with collect_notices(notes):
        loaded(tmp_path, odd)
    assert any("llama.final_logit_softcapping in" in n and "not followed" in n for n in notes)
    assert any("splits text as 'another' does" in note for note in notes)
    notes.clear()
    with collect_notices(notes):
        loaded(tmp_path, lambda writer: None)
    assert not notes


def test_headers_that_are_broken(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model(), {})
    whole = file.read_bytes()
    assert read_metadata(file).architecture == "llama"
    draw = random.Random(0)
    for number in range(400):
        data = bytearray(whole[: 40 + draw.randrange(3000)])
        for _ in range(number % 4):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            read_metadata(file)
        except ValueError:
            continue


def header(architecture: str, tensors: dict[str, Any] | None = None, **keys: Any) -> GGUFMetadata:
    values = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return GGUFMetadata(
        {"general.architecture": architecture, **values}, {}, tensors or {}, Path("none")
    )


@pytest.mark.parametrize(
    ("config", "known", "expected"),
    [
        (  # 27B: no key says how its queries are scaled
            hf.Gemma2Config(num_hidden_layers=46, hidden_size=4608, num_attention_heads=32),
            header("gemma2", attention__key_length=128, final_logit_softcapping=20.0),
            {"head_dim": 128, "query_pre_attn_scalar": 144.0, "final_logit_softcapping": 20.0},
        ),
        (
            hf.Gemma2Config(num_hidden_layers=2),
            header("gemma2", attention__key_length=64),
            {"query_pre_attn_scalar": 64},
        ),
        (
            hf.Phi3Config(),
            header("phi3", rope__dimension_count=72, attention__sliding_window=2047),
            {"sliding_window": 2047, "rope_parameters": {"partial_rotary_factor": 0.75}},
        ),
        (  # its config's own default is a window
            hf.MistralConfig(),
            header("llama", context_length=8192, rope__freq_base=1e6),
            {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}},
        ),
        (
            hf.StableLmConfig(),
            header("stablelm", rope__dimension_count=80, rope__freq_base=5e5),
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        ),
        (
            hf.LlamaConfig(),
            header("llama", {"token_embd.weight": (0, (32, 77), 0), "blk.0.attn_q.bias": None}),
            {"vocab_size": 77, "attention_bias": True, "mlp_bias": False},
        ),
        (
            hf.Qwen3MoeConfig(head_dim=32),
            header("qwen3moe", expert_feed_forward_length=1536, attention__key_length=64),
            {"moe_intermediate_size": 1536, "head_dim": 64},
        ),
    ],
    ids=["gemma2-27b", "gemma2", "phi3", "mistral", "stablelm", "llama", "qwen3moe"],
)
def test_what_changes_a_layers_computation(
    config: Any, known: GGUFMetadata, expected: dict[str, Any]
) -> None:
    notes: list[str] = []
    with collect_notices(notes):
        apply_to_config(config, known, "m")
    assert not notes
    for name, value in expected.items():
        found = getattr(config, name)
        assert (found if not isinstance(value, dict) else {k: found[k] for k in value}) == value


def test_scaling_of_layers_with_and_without_a_window() -> None:
    """It is for the layers that see everything."""
    config = hf.Gemma3TextConfig()
    keys: dict[str, Any] = {
        "rope__scaling__type": "linear",
        "rope__scaling__factor": 8.0,
        "rope__freq_base": 2e6,
    }
    known = header("gemma3", None, **keys, rope__freq_base_swa=5e3)
    apply_to_config(config, known, "m")
    full, windowed = (config.rope_parameters[f"{name}_attention"] for name in ("full", "sliding"))
    assert full == {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    assert windowed == {"rope_type": "default", "rope_theta": 5e3}


def test_metadata_of_the_wrong_type() -> None:
    with pytest.raises(InputError, match="the metadata of m is broken"):
        apply_to_config(hf.LlamaConfig(), header("llama", attention__key_length="wide"), "m")


def test_heads_that_turn_in_part_are_refused_where_they_can_not() -> None:
    known = header("llama", attention__key_length=128, rope__dimension_count=64)
    with pytest.raises(InputError, match="turns 64 of the 128 numbers of a head"):
        apply_to_config(hf.LlamaConfig(), known, "m")


def test_sampling_and_named_ends(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.penalty_repeat", 1.5)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        writer.add_token_list([*letters[:254], "<|im_end|>", "ab", "<end>"])

    notes: list[str] = []
    with collect_notices(notes):
        found = loaded(tmp_path, more)
    assert found.settings.sampling["temperature"] == 0.5 and found.settings.sampling["top_k"] == 20
    assert found.settings.repetition_penalty == 1
    assert any("general.sampling.penalty_repeat in" in note for note in notes)
    assert found.end_tokens == {254, 256}


def test_files_that_are_no_whole_model(tmp_path: Path) -> None:
    def refusal(more: Writes = lambda writer: None, change: Any = lambda data: data) -> str:
        file = tmp_path / "model.gguf"
        write_gguf(file, tiny_model(), {}, more=more)
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(InputError) as error:
            load_model(str(file), LoadOptions(device="cpu", dtype="float32"))
        return str(error.value)

    assert "one of 3 parts" in refusal(lambda w: w.add_uint16("split.count", 3))
    assert "general.type is 'adapter'" in refusal(lambda w: w.add_type("adapter"))
    assert "it ends too early, before " in refusal(change=lambda data: data[:-4000])
    assert "big-endian" in refusal(change=lambda data: data[:4] + data[7:3:-1] + data[8:])
    odd = b"token_embd.weight" + (2).to_bytes(4, "little")
    at = len(odd) + 16

    def unknown(data: bytes) -> bytes:
        begin = data.index(odd) + at
        return data[:begin] + (99).to_bytes(4, "little") + data[begin + 4 :]

    assert "token_embd.weight is of type 99, which is not known" in refusal(change=unknown)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Once as an array and once as a number, it would be read as a bit of both."""
    once = b"".join(
        [struct.pack("<Q", 1), b"k", struct.pack("<I", 9), struct.pack("<IQB", 0, 1, 7)]
    )
    again = struct.pack("<Q", 1) + b"k" + struct.pack("<If", 6, 0.5)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + once + again)
    with pytest.raises(ValueError, match="it has 'k' twice"):
        read_metadata(file)


def test_factors_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    known = GGUFMetadata({}, {}, {FACTORS: (0, (2**40,), 0)}, tmp_path / "x")
    (tmp_path / "x").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"cannot read m: rope_freqs.weight is cut off"):
        apply_to_model(SimpleNamespace(generation_config=None), known, None, "m")


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), -2.0])
@pytest.mark.parametrize(
    "key",
    [
        *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.freq_base"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_attn_factor"),
        *("rope.dimension_count", "attention.sliding_window", "attention.key_length"),
    ],
)
def test_what_should_be_a_number_and_is_none_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    values: dict[str, Any] = {"general.architecture": "llama", "llama.rope.scaling.type": "yarn"}
    values["llama.rope.scaling.factor"] = 4.0
    known = GGUFMetadata({**values, f"llama.{key}": value}, {}, {}, tmp_path)
    with pytest.raises(
        InputError, match=f"metadata of m is broken: llama.{key} is .*, which can't be"
    ):
        apply_to_config(hf.LlamaConfig(**SIZES), known, "m")
