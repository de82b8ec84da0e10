"""Options of loading and running a model; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading and running a model.

    Attributes:
        device: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or
            ``mps``.
        dtype: ``auto`` (what is fast on the device), ``float32``, ``bfloat16`` or ``float16``.
        exact: half-precision passes give a token the same bits whatever is checked beside it.
        compiled: compile the layers where that makes passes faster, giving up ``exact``.
        device_map: ``auto`` spreads the layers over all devices, and the host's memory where those
            are too small; None: one device.
        quantize: load a plain model's weights as ``int8`` or ``int4``; None: as they are.
        keep_quantized: compute with a GGUF file's weights in the bits that they have there; False:
            with dequantised ones; None: where native kernels run the model, and measure quicker so.
        merge_adapter: add an adapter's weights to its base's; None: if the base is not quantised.
        trust_remote_code: run Python code that comes with the model.
    """

    device: str = "auto"
    dtype: str = "auto"
    exact: bool = True
    compiled: bool = False
    device_map: str | None = None
    quantize: str | None = None
    keep_quantized: bool | None = None
    merge_adapter: bool | None = None
    trust_remote_code: bool = False
