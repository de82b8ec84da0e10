"""What the native library's products take, for choosing what a model runs in."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from conflayers_cli.kernels.fused_forward import FAMILIES
from conflayers_cli.kernels.int4_linear import GROUP_SIZE
from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.kernels.native_weights import NativeWeight, pack, quantize

_WORKING_SET = 64 << 20
"""Bytes of weights read by turns: more than most caches hold."""
_BLOCK_ROWS = 4096
"""Most outputs of a weight that is timed."""
_ROUNDS = 6


@torch.inference_mode()
def native_bfloat16_ratio(config: PreTrainedConfig) -> float | None:
    """bfloat16's time over float32's for one token's products of a model's sizes.

    With the library, the threads and the order of weights that decoding will use, by turns. Takes
    a tenth of a second for SmolLM2.

    Returns:
        None: the library is not there, or doesn't know the family.
    """
    text = config.get_text_config()
    if unavailable_reason() is not None or text.model_type not in FAMILIES:
        return None
    dtypes = (torch.float32, torch.bfloat16)
    single, half = _seconds(*((pack(_plain(text, dtype)), dtype) for dtype in dtypes))
    return half / single


@torch.inference_mode()
def int4_ratio(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """The time of one token's products with weights in four bits over that with weights in
    ``dtype``, measured as above. The library must be there."""
    plain = _plain(config.get_text_config(), dtype)
    kept, few = _seconds((pack(plain), dtype), (quantize(plain, 4), dtype))
    return few / kept


def _plain(config: Any, dtype: torch.dtype) -> torch.Tensor:
    """A weight of a model's sizes; the number of inputs is one that groups take."""
    inner = min(int(config.intermediate_size), _BLOCK_ROWS)
    inputs = -(-int(config.hidden_size) // GROUP_SIZE) * GROUP_SIZE
    return torch.full((inner, inputs), 0.01, dtype=dtype)


def _seconds(*kinds: tuple[NativeWeight, torch.dtype]) -> list[float]:
    """Seconds of a product of one token with each of the weights, read from memory.

    The lower decile of single products: other work on the machine spoils whole rounds of them.
    """
    copies = [_copies(weight) for weight, _ in kinds]
    times: list[list[float]] = [[] for _ in kinds]
    for round_ in range(_ROUNDS):
        for found, (weight, dtype), several in zip(times, kinds, copies, strict=True):
            inputs = torch.full((1, weight.cols), 0.1, dtype=dtype)
            for each in several:
                begin = time.perf_counter()
                each(inputs)
                if round_:  # the first round warms up
                    found.append(time.perf_counter() - begin)
    return [sorted(found)[len(found) // 10] for found in times]


def _copies(one: NativeWeight) -> list[NativeWeight]:
    copies = max(1, _WORKING_SET // one.nbytes)
    return [replace(one, data=one.data.clone()) for _ in range(copies)]
