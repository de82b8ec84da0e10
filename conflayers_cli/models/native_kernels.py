"""What loading a model asks of the native kernels, which are a layer above."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

METHOD = "conflayers"
"""In the ``quantization_config`` of a model whose weights these kernels hold in few bits."""


class NativeKernels(Protocol):
    """Kernels of our own for a CPU."""

    def reason(self) -> str | None:
        """Why there are none here, one phrase; None: there are."""

    def bfloat16_ratio(self, config: PreTrainedConfig) -> float | None:
        """bfloat16's time over float32's for a model's products; None: they don't run it."""

    def quantize(self, model: Any, bits: str) -> None:
        """Round a plain model's weights, in place, to ``int8`` or ``int4``.

        Raises:
            ValueError: they can't be.
        """

    def read_gguf(
        self, file: Path, config: PreTrainedConfig, dtype: torch.dtype, always: bool
    ) -> Any | str:
        """A model with the weights of a GGUF file in the bits that they have there, or else why
        not, in one phrase.

        Args:
            file, config: of the model.
            dtype: what it computes in.
            always: also where that is slower than dequantised weights.

        Raises:
            ValueError: a weight is missing, or has another shape.
        """
