"""Weights in few bits by native kernels: rounded while a model is loaded, or as a GGUF file's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import pre_tokenizers

from conflayers_cli.cli.main import main
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.kernels.native_loading import NativeLibrary
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.quantization import quantization_method
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.cli.conftest import byte_tokenizer
from tests.kernels import native
from tests.models.test_quantization import SIZES, assert_drafts_change_nothing, save

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
TOKENS = torch.tensor([tiny.prompt(24, 3, SIZES["vocab_size"])])
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}


def options(**more: Any) -> LoadOptions:
    return LoadOptions(**{"device": "cpu", "dtype": "bfloat16", **more})


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS).logits
    return logits.float()


def assert_same_bits(decoder: Decoder) -> None:
    """Of a token's logits, whatever the width of passes."""
    at, whole = torch.arange(TOKENS.shape[1])[None], None
    for width in (TOKENS.shape[1], 1, 3, 5, 8):
        cache = decoder.new_cache(TOKENS.shape[1])
        parts = [
            decoder.forward(TOKENS[:, i : i + width], at[:, i : i + width], cache)
            for i in range(0, TOKENS.shape[1], width)
        ]
        logits = torch.cat(parts, dim=1)
        whole = logits if whole is None else whole
        assert torch.equal(logits, whole)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("few") / "plain", tie_word_embeddings=request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_models_decode_exactly(folder: Path, bits: str, dtype: str) -> None:
    loaded, decoder = open_model(str(folder), options(quantize=bits, dtype=dtype))
    assert isinstance(decoder.passes.fused, NativeForward) and not decoder.inexact
    assert f"rounded to {bits}" in loaded.dtype_reason
    assert quantization_method(loaded.model.config) == "conflayers"
    assert_same_bits(decoder)
    if not loaded.model.config.tie_word_embeddings:  # else it repeats one token
        assert_drafts_change_nothing(decoder)
    assert (decoder.stack.int4.reason is None) == (bits == "int8")


def test_rounding_moves_logits_as_little_as_it_must(folder: Path) -> None:
    plain = logits_of(hf.AutoModelForCausalLM.from_pretrained(folder))
    moved = []
    for bits in ("int8", "int4"):
        loaded = load_model(str(folder), options(quantize=bits), native=NativeLibrary())
        moved.append(float((logits_of(loaded.model) - plain).norm() / plain.norm()))
        held = sum(w.nbytes for w in loaded.model.parameters())
        assert held < SIZES["vocab_size"] * SIZES["hidden_size"] * 2 + 20_000
    assert moved[0] < 0.05 and moved[0] < moved[1] / 2 and moved[1] < 0.5


def test_drafts_of_an_int8_model_may_have_four_bits(folder: Path) -> None:
    _, decoder = open_model(str(folder), options(quantize="int8"))
    cache, plan = decoder.new_cache(32), SkipPlan(weights="int4")
    at = torch.arange(TOKENS.shape[1])[None]
    full = decoder.forward(TOKENS, at, cache).float()
    drafted = decoder.forward(TOKENS, at, cache, plan).float()
    assert 0 < float((full - drafted).norm() / full.norm()) < 0.5


def test_models_of_other_families_are_rounded_too(tmp_path: Path) -> None:
    config = hf.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    )
    tiny.build(config, gain=0.5).save_pretrained(tmp_path)
    byte_tokenizer(None).save_pretrained(tmp_path)
    _, decoder = open_model(str(tmp_path), options(quantize="int8"))
    assert decoder.passes.fused is None and not decoder.inexact
    assert_drafts_change_nothing(decoder)


def test_an_adapters_base_is_not_rounded_here(folder: Path) -> None:
    """PEFT puts adapters beside linear layers, and knows none of ours."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("torchao")
    adapter = folder.parent / f"{folder.name}-lora"
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    loaded = load_model(str(adapter), options(quantize="int8"), native=NativeLibrary())
    assert quantization_method(loaded.model.config) == "torchao"


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    odd = save(tmp_path / "odd", hidden_size=72, intermediate_size=100)
    with pytest.raises(InputError, match="multiple of 32 inputs: leave quantize out"):
        load_model(str(odd), options(quantize="int4"), native=NativeLibrary())


def write_gguf(
    path: Path,
    model: Any,
    kinds: dict[str, str],
    default: str = "F32",
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """A model as llama.cpp's converter writes it; ``kinds``: a type by a part of the name;
    ``more`` adds what else the file says."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*letters[:255], "ab", "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    arch = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        numbers = weight.float()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_" in name else config.num_key_value_heads
            halves = numbers.view(heads, 2, -1, numbers.shape[-1])
            numbers = halves.transpose(1, 2).reshape(numbers.shape)
        wanted = next((kinds[part] for part in kinds if part in name), default)
        type_ = gguf.GGMLQuantizationType[wanted if weight.dim() == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(numbers.numpy()), type_)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data, raw_dtype=type_)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_model(family: str = "llama", **more: Any) -> Any:
    kind = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[family]
    return tiny.build(kind(**{**SIZES, **more}), gain=0.5)


FILES = {
    "Q4_0": ({}, "Q4_0"),
    "Q4_1, head in eight bits": ({"embed_tokens": "Q8_0"}, "Q4_1"),
    "Q8_0": ({}, "Q8_0"),
    "mixed": ({"v_proj": "Q8_0", "embed_tokens": "F16", "down": "F32"}, "Q4_0"),
    "half unknown": ({"down": "Q5_1", "o_proj": "F16"}, "Q4_1"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", FILES)
def test_a_gguf_files_weights_are_kept(tmp_path: Path, family: str, name: str) -> None:
    """Their values are those that transformers reads, which dequantises them."""
    tied = name != "Q8_0"
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model(family, tie_word_embeddings=tied), *FILES[name])
    wanted = options(dtype="float32", keep_quantized=True)
    loaded, decoder = open_model(str(file), wanted)
    assert isinstance(decoder.passes.fused, NativeForward)
    assert "in the bits of the GGUF file" in loaded.dtype_reason
    plain = load_model(str(file), options(dtype="float32")).model
    expected, found = logits_of(plain), logits_of(loaded.model)
    # Inputs of products are rounded to eight bits, and nothing else is.
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert_same_bits(decoder)
    assert loaded.end_tokens == load_model(str(file), options(dtype="float32")).end_tokens


@pytest.mark.parametrize("kind", TYPES)
def test_every_weight_is_exactly_the_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model(tie_word_embeddings=True), {}, kind)
    kept = load_model(str(file), options(keep_quantized=True), native=NativeLibrary()).model
    plain = load_model(str(file), options(dtype="float32", keep_quantized=False)).model
    assert torch.equal(kept.lm_head.merged.dense(), plain.lm_head.weight.bfloat16())
    for mine, other in zip(kept.model.layers, plain.model.layers, strict=True):
        product = mine.self_attn.q_proj.merged
        parts = (other.self_attn.q_proj, other.self_attn.k_proj, other.self_attn.v_proj)
        together = torch.cat([part.weight for part in parts])
        assert product.bits == (8 if kind == "Q8_0" else 4)
        assert torch.equal(product.dense(), together.bfloat16())


def test_a_file_whose_weights_cannot_be_kept_is_dequantised(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model(), {}, "Q5_1")
    loaded = load_model(str(file), options(), native=NativeLibrary())
    assert "dequantised: its weights are F32, Q5_1, and only Q4_0" in loaded.dtype_reason
    assert quantization_method(loaded.model.config) is None
    with pytest.raises(InputError, match="keep_quantized: native kernels can't take"):
        load_model(str(file), options(keep_quantized=True), native=NativeLibrary())


def test_the_quicker_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model(), {}, "Q4_0")
    for ratio, method in ((0.4, "conflayers"), (1.2, None)):
        monkeypatch.setattr(
            "conflayers_cli.kernels.native_loading.int4_ratio", lambda *_, at=ratio: at
        )
        loaded = load_model(str(file), options(), native=NativeLibrary())
        assert quantization_method(loaded.model.config) == method
    assert "take 1.20 of the others' time" in loaded.dtype_reason


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    file = tmp_path / "model.gguf"
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(128, 64))
    write_gguf(file, model, {}, "Q4_0")
    with pytest.raises(InputError, match=r"down_proj.weight is \[128, 64\], not \[128, 256\]"):
        load_model(str(file), options(keep_quantized=True), native=NativeLibrary())


def test_the_option_is_for_gguf_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hello", "-m", str(folder), "--keep-quantized"]) == 2
    assert "--keep-quantized:" in capsys.readouterr().err
    assert main(["generate", "Hello", "-m", str(folder), "--no-keep-quantized"]) == 2
    assert "is no GGUF file: leave it out" in capsys.readouterr().err


def test_a_copied_model_is_the_same(folder: Path) -> None:
    model = load_model(str(folder), options(quantize="int4"), native=NativeLibrary()).model
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    Decoder(copy.deepcopy(model))
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
