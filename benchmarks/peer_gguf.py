"""A Llama's weights as a GGUF file in bfloat16, for llama.cpp, and rounded by llama.cpp itself.

llama.cpp rotates neighbouring pairs of a head's numbers where transformers rotates halves, so the
rows of the query and key projections change places (as llama.cpp's own converter has it). Norms are
float32 there. The tokenizer is another file's, whole.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from safetensors import safe_open

from benchmarks.peer_worker import PeerError

FILE_TYPES = {"q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_1": LlamaFileType.MOSTLY_Q4_1}
_QUANTIZE = """
import sys, llama_cpp
source, target, kind, threads = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = int(kind), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))
"""


def interleave_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows ``[heads × size, n]`` of a projection so that pairs to be rotated are neighbours."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, target: Path, tokenizer: Path) -> None:
    """Write a folder's Llama, rounded to bfloat16 where it is not; ``tokenizer``: a GGUF file.

    Raises:
        PeerError: it is no plain Llama.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    temporary = target.with_suffix(".part")
    writer = GGUFWriter(temporary, "llama")
    _describe(writer, config, folder.name)
    _copy_tokenizer(writer, tokenizer)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _weights(folder):
        target_name = names.get_name(name, (".weight",))
        if target_name is None:
            raise PeerError(f"{folder.name} is no plain Llama: it has {name}")
        if (kind := name.split(".")[-2]) in heads:
            weight = interleave_pairs(weight, heads[kind])
        if weight.ndim == 1:
            writer.add_tensor(target_name, weight.float().numpy())
        else:
            data = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target_name, data, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(target)


def quantize(python: Path, source: Path, target: Path, file_type: str) -> None:
    """Round a GGUF file by llama.cpp, to one of `FILE_TYPES`; ``python``: of the peers.

    Raises:
        PeerError: it can't.
    """
    temporary = target.with_suffix(".part")
    kind, threads = int(FILE_TYPES[file_type]), os.cpu_count() or 1
    command = [python, "-c", _QUANTIZE, source, temporary, kind, threads]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"llama.cpp can't round {source.name}: {done.stderr[-500:]}")
    temporary.rename(target)


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_tensor(name)


def _describe(writer: GGUFWriter, config: dict[str, Any], name: str) -> None:
    """The sizes, by transformers' config."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])


def _copy_tokenizer(writer: GGUFWriter, source: Path) -> None:
    for key, field in GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            kind, *inner = field.types
            is_array = kind is GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), kind, inner[-1] if is_array else None)
