"""What the native library's products take, for choosing what a model runs in."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedConfig

from conflayers_cli.kernels.fused_forward import FAMILIES
from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.kernels.native_weights import NativeWeight, pack

_WORKING_SET = 64 << 20
"""Bytes of weights read by turns: more than most caches hold."""
_BLOCK_ROWS = 4096
"""Most outputs of a weight that is timed."""
_ROUNDS = 6


@torch.inference_mode()
def native_bfloat16_ratio(config: PreTrainedConfig) -> float | None:
    """bfloat16's time over float32's for one token's products of a model's sizes.

    With the library, the threads and the order of weights that decoding will use. Compared is the
    least of several rounds, by turns. Takes a tenth of a second for SmolLM2.

    Returns:
        None: the library is not there, or doesn't know the family.
    """
    text = config.get_text_config()
    if unavailable_reason() is not None or text.model_type not in FAMILIES:
        return None
    hidden, inner = int(text.hidden_size), min(int(text.intermediate_size), _BLOCK_ROWS)
    dtypes = (torch.float32, torch.bfloat16)
    weights = {dtype: _weights(hidden, inner, dtype) for dtype in dtypes}
    inputs = {dtype: torch.full((1, hidden), 0.1, dtype=dtype) for dtype in dtypes}
    least = dict.fromkeys(dtypes, float("inf"))
    for round_ in range(_ROUNDS):
        for dtype in dtypes:
            begin = time.perf_counter()
            for weight in weights[dtype]:
                weight(inputs[dtype])
            seconds = (time.perf_counter() - begin) / len(weights[dtype])
            if round_:  # the first round warms up
                least[dtype] = min(least[dtype], seconds)
    return least[torch.bfloat16] / least[torch.float32]


def _weights(hidden: int, inner: int, dtype: torch.dtype) -> list[NativeWeight]:
    one = pack(torch.full((inner, hidden), 0.01, dtype=dtype))
    copies = max(1, _WORKING_SET // one.nbytes)
    return [NativeWeight(one.data.clone(), inner, hidden) for _ in range(copies)]
