"""What tells a model's weights from others of the same shape, at next to no cost."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLED = 16
"""Values taken of every parameter; training changes them all."""


def sample_of(model: nn.Module) -> str:
    """A hash, in hex, of the first values of every parameter.

    Of a model that is shared among processes it is that of the first one's part. Weights that are
    not plain tensors, or not in any memory (packed by torchao, offloaded), play no part in it.
    """
    digest = hashlib.sha256()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            values = parameter.data
            if hasattr(values, "to_local"):
                values = values.to_local()
            if type(values) is not torch.Tensor or values.is_meta or not values.numel():
                continue
            while values.dim() > 1:
                values = values[0]
            digest.update(values.reshape(-1)[:SAMPLED].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
