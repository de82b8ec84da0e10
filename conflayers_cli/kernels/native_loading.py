"""Models whose weights are in few bits by the native library: rounded here, or a GGUF file's.

Products of such weights round their inputs to eight bits in groups of 32, as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from conflayers_cli.kernels.int4_linear import GROUP_SIZE
from conflayers_cli.kernels.native_layers import NativeLinear, merge_weights
from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.kernels.native_speed import int4_ratio, native_bfloat16_ratio
from conflayers_cli.kernels.native_weights import quantize
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.native_kernels import METHOD
from conflayers_cli.models.support import find_layers

_HEAD_BITS = 8
"""Of the output embedding: fewer bits of it cost more agreement than those of all layers."""


class NativeLibrary:
    """:class:`~conflayers_cli.models.native_kernels.NativeKernels` by the native library."""

    def reason(self) -> str | None:
        return unavailable_reason()

    def bfloat16_ratio(self, config: PreTrainedConfig) -> float | None:
        return native_bfloat16_ratio(config)

    def quantize(self, model: Any, bits: str) -> None:
        head, wanted = model.get_output_embeddings(), int(bits.removeprefix("int"))
        made: list[NativeLinear] = []

        def make(linears: Sequence[nn.Linear], keep: bool) -> NativeLinear:
            native = None
            if linears[0].in_features % GROUP_SIZE == 0:
                own = _HEAD_BITS if linears[0] is head else wanted
                weight, bias = merge_weights(linears)
                native = quantize(weight, own, bias)
            made.append(NativeLinear(linears, keep, native))
            return made[-1]

        packing = Packing(model, list(find_layers(model)), make)
        if not any(each.bits == wanted for each in made):
            packing.undo()
            raise ValueError(f"no layer of it has a multiple of {GROUP_SIZE} inputs")
        packing.settle()
        model.config.quantization_config = {"quant_method": METHOD, "bits": bits}

    def read_gguf(
        self, file: Path, config: PreTrainedConfig, dtype: torch.dtype, always: bool
    ) -> Any | str:
        # only now: with what it imports, it takes a while that other models need not wait
        from conflayers_cli.kernels.gguf_weights import GGUFWeights

        weights = GGUFWeights(file, config, dtype)
        reason = weights.reason()
        if reason is None and not always and (ratio := int4_ratio(config, dtype)) >= 1:
            reason = f"products in few bits take {ratio:.2f} of the others' time"
        if reason is not None:
            return reason
        model = weights.model()
        model.config.quantization_config = {"quant_method": METHOD, "bits": "GGUF"}
        return model
