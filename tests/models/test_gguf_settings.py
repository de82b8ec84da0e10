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
