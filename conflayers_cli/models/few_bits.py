"""Whether a model is loaded with weights in few bits that native kernels compute with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from conflayers_cli.errors import InputError
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.native_kernels import NativeKernels
from conflayers_cli.models.pretrained import finish_model
from conflayers_cli.models.quantization import quantization_method
from conflayers_cli.models.source import READ_ERRORS, ModelSource, unreadable
from conflayers_cli.utils.distributed import world


@dataclass
class FewBits:
    """What is to be done for one model.

    Attributes:
        rounds: plain weights are rounded after they are read.
        keeps: a GGUF file's weights are taken as they are, where that can be.
        always: not being able to is an error, and being slower no reason.
        note: why a GGUF file's weights were dequantised after all; None: they were not, or nobody
            wanted otherwise.
    """

    native: NativeKernels | None
    rounds: bool = False
    keeps: bool = False
    always: bool = False
    note: str | None = None

    @classmethod
    def choose(
        cls,
        origin: ModelSource,
        device: torch.device,
        options: LoadOptions,
        native: NativeKernels | None,
        *,
        adapted: bool,
    ) -> FewBits:
        """What the options and the machine say.

        Raises:
            InputError: ``keep_quantized`` can't be.
        """
        kept = options.keep_quantized
        if kept is not None and not origin.gguf:
            name = "keep_quantized" if kept else "keep_quantized=False"
            raise InputError(
                f"{name}: {origin.source} is no GGUF file: leave it out", names=(f"{name}:",)
            )
        if native is None or device.type != "cpu" or options.device_map or world().size > 1:
            reason: str | None = "they are for models on one CPU"
        elif adapted:
            reason = "an adapter is computed beside plain weights"
        else:
            reason = native.reason()
        if reason is not None:
            if kept:
                raise _cannot_keep(origin, reason)
            return cls(native)
        return cls(
            native, bool(options.quantize), bool(origin.gguf) and kept is not False, bool(kept)
        )

    def read(self, origin: ModelSource, config: PreTrainedConfig, dtype: torch.dtype) -> Any | None:
        """A model with a GGUF file's weights as they are; None: it is to be dequantised.

        Raises:
            InputError: it was to be read so in any case, and can't be; the file is broken.
        """
        if self.native is None or not self.keeps or origin.gguf is None:
            return None
        file = Path(origin.location) / origin.gguf
        try:
            found = self.native.read_gguf(file, config, dtype, self.always)
        except READ_ERRORS as error:
            raise unreadable(origin, "weights", error) from error
        if not isinstance(found, str):
            return finish_model(found)
        if self.always:
            raise _cannot_keep(origin, found)
        self.note = f"weights dequantised: {found}"
        return None

    def round(self, model: Any, source: str, bits: str | None) -> None:
        """Round a plain model's weights, where that is to be done.

        Raises:
            InputError: they can't be.
        """
        if self.native is None or not self.rounds or bits is None:
            return
        method = quantization_method(model.config)
        try:
            if method is not None:
                raise ValueError(f"they are quantised with {method} already")
            self.native.quantize(model, bits)
        except ValueError as error:
            raise InputError(
                f"the weights of {source} can't be rounded: {error}: leave quantize out",
                names=("quantize out",),
            ) from error


def _cannot_keep(origin: ModelSource, reason: str) -> InputError:
    return InputError(
        f"keep_quantized: native kernels can't take the weights of {origin.source}: {reason}",
        names=("keep_quantized:",),
    )
