"""Weights in the order in which the native library reads them, as they are or in few bits.

A panel holds 16 outputs, so that a vector's lanes are outputs (``csrc/interface.h`` shows the
layouts). Packing and unpacking move bits and change none. Weights in eight or four bits have groups
of `GROUP_SIZE` inputs, each with a scale and, in four bits, a least value of its own: the blocks of
GGUF's Q8_0, Q4_0 and Q4_1 are such groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from conflayers_cli.kernels.int4_linear import GROUP_SIZE, LEVELS
from conflayers_cli.kernels.native_library import (
    INT4,
    INT8,
    KINDS,
    CWeight,
    load_library,
    padded_float32,
    require_cpu,
    unit_number,
    usable_threads,
)

PANEL = 16
"""Outputs of a panel."""
MAX_INT8 = 127
_ROWS = 4096
"""Of a weight, quantised at a time: bounds what is held in float32."""
_MIN_HUGE = 4 << 20
"""Bytes from which on a weight is put into large pages."""


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight ``[rows, cols]`` in panels, for products ``x @ weight.T + bias``.

    Attributes:
        data: the panels: the weight's dtype, or bytes where it has `bits`.
        rows, cols: outputs and inputs.
        bits: 4, 8, or None: as it was.
        bias: float32, ``[rows rounded up to PANEL]``; None: there is none.
    """

    data: torch.Tensor
    rows: int
    cols: int
    bits: int | None = None
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def kind(self) -> int:
        """The library's number for it."""
        return {4: INT4, 8: INT8}[self.bits] if self.bits else KINDS[self.data.dtype]

    @cached_property
    def described(self) -> CWeight:
        """As the library takes it; valid while this lives."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return CWeight(self.data.data_ptr(), bias, self.rows, self.cols, self.kind, 0)

    def __call__(
        self, x: torch.Tensor, threads: int | None = None, unit: str | None = None
    ) -> torch.Tensor:
        """``[..., cols] → [..., rows]``, in the dtype of ``x``.

        Raises:
            ValueError: the inputs are of another size or kind.
            MemoryError: there is no memory.
        """
        if x.dtype not in KINDS or x.shape[-1] != self.cols:
            raise ValueError(f"inputs {x.dtype} {list(x.shape)} for a weight of {self.cols} inputs")
        if self.bits is None and x.dtype != self.data.dtype:
            raise ValueError(f"inputs are {x.dtype}, weights {self.data.dtype}")
        flat = require_cpu("inputs", x.reshape(-1, self.cols).contiguous())
        out = flat.new_empty((len(flat), self.rows))
        failed = load_library().cl_linear(
            unit_number(unit),
            ctypes.byref(self.described),
            KINDS[x.dtype],
            flat.data_ptr(),
            len(flat),
            out.data_ptr(),
            threads or usable_threads(),
        )
        if failed:
            raise MemoryError("no memory for a product")
        return out.view(*x.shape[:-1], self.rows)


def plain_table(weight: torch.Tensor) -> CWeight:
    """An embedding ``[V, d]`` as PyTorch has it, as the library takes it; valid while it lives."""
    require_cpu("an embedding", weight)
    return CWeight(weight.data_ptr(), None, *weight.shape, KINDS[weight.dtype], 1)


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NativeWeight:
    """A plain weight ``[rows, cols]`` of a supported dtype in panels.

    Raises:
        ValueError: another kind of weight.
    """
    if weight.ndim != 2 or weight.dtype not in KINDS or weight.device.type != "cpu":
        raise ValueError(f"a weight {weight.dtype} {list(weight.shape)} on {weight.device}")
    rows, cols = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    panels, steps = -(-rows // PANEL), -(-cols // pair)
    data = _empty((panels, steps, PANEL, pair), weight.dtype)
    full = rows // PANEL
    weight = weight.detach()
    if cols % pair:
        weight = torch.nn.functional.pad(weight, (0, 1))
    whole = weight[: full * PANEL].view(full, PANEL, steps, pair)
    data[:full] = whole.permute(0, 2, 1, 3)
    if full < panels:
        rest = weight.new_zeros((PANEL, steps * pair))
        rest[: rows - full * PANEL] = weight[full * PANEL :]
        data[full] = rest.view(PANEL, steps, pair).permute(1, 0, 2)
    return NativeWeight(data, rows, cols, bias=_padded(bias))


def unpack(weight: NativeWeight) -> torch.Tensor:
    """The plain weight ``[rows, cols]``: bit for bit the one that was packed; where it has few
    bits, in float32, the values that they stand for."""
    if weight.bits is not None:
        return _dequantize(weight)
    panels, steps, _, pair = weight.data.shape
    plain = weight.data.permute(0, 2, 1, 3).reshape(panels * PANEL, steps * pair)
    return plain[: weight.rows, : weight.cols].contiguous()


def read_rows(weight: NativeWeight, numbers: torch.Tensor) -> torch.Tensor:
    """Rows ``[n, cols]`` of a packed weight, as `unpack` gives them; ``numbers``: int64 ``[n]``."""
    panels = NativeWeight(
        weight.data[numbers // PANEL], len(numbers) * PANEL, weight.cols, weight.bits
    )
    return unpack(panels)[torch.arange(len(numbers)) * PANEL + numbers % PANEL]


def quantize(weight: torch.Tensor, bits: int, bias: torch.Tensor | None = None) -> NativeWeight:
    """A plain weight in ``bits`` 4 or 8.

    Four bits spread over the values between a group's extremes, as
    :func:`~conflayers_cli.kernels.int4_linear.quantize_int4` does; eight bits about zero.

    Raises:
        ValueError: the inputs are no multiple of `GROUP_SIZE`, or other bits.
    """
    if bits not in (4, 8) or weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        raise ValueError(f"{bits} bits for a weight {list(weight.shape)}")
    rows, cols = weight.shape
    panels, groups = -(-rows // PANEL), cols // GROUP_SIZE
    data = _empty((panels, groups, _group_bytes(bits)), torch.uint8)
    for begin in range(0, rows, _ROWS):
        block = weight.detach()[begin : begin + _ROWS].float().unflatten(1, (groups, GROUP_SIZE))
        codes, scale, least = _codes_int4(block) if bits == 4 else _codes_int8(block)
        first = begin // PANEL
        part = _blocks(codes, scale, least)
        data[first : first + len(part)] = part
    return NativeWeight(data, rows, cols, bits, _padded(bias))


def round_packed(
    weight: NativeWeight, threads: int | None = None, unit: str | None = None
) -> NativeWeight:
    """A packed weight in four bits, rounded as `quantize` does, by the library.

    Raises:
        ValueError: the inputs are no multiple of `GROUP_SIZE`.
        MemoryError: there is no memory.
    """
    if weight.cols % GROUP_SIZE:
        raise ValueError(f"4 bits for a weight {[weight.rows, weight.cols]}")
    shape = (-(-weight.rows // PANEL), weight.cols // GROUP_SIZE, _group_bytes(4))
    data = _empty(shape, torch.uint8)
    failed = load_library().cl_round(
        unit_number(unit),
        ctypes.byref(weight.described),
        data.data_ptr(),
        threads or usable_threads(),
    )
    if failed:
        raise MemoryError("no memory for rounding a weight")
    return NativeWeight(data, weight.rows, weight.cols, 4, weight.bias)


def from_groups(
    codes: torch.Tensor,
    scale: torch.Tensor,
    least: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> NativeWeight:
    """A weight whose codes are known, such as a GGUF file's: value = scale · code + least.

    Args:
        codes: ``[rows, groups, GROUP_SIZE]``: 0 … 15 with ``least``, -128 … 127 without.
        scale, least: ``[rows, groups]`` float16; no least: eight bits.
        bias: ``[rows]``.

    Raises:
        ValueError: other shapes or dtypes.
    """
    rows, groups, size = codes.shape
    given = (scale,) if least is None else (scale, least)
    if size != GROUP_SIZE or any(
        each.dtype != torch.float16 or each.shape != (rows, groups) for each in given
    ):
        raise ValueError(f"codes {list(codes.shape)} with scales {list(scale.shape)}")
    data = _blocks(codes.to(torch.int32), scale, least)
    bits = 8 if least is None else 4
    return NativeWeight(data, rows, groups * GROUP_SIZE, bits, _padded(bias))


def _codes_int4(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale, least of float32 ``[rows, groups, GROUP_SIZE]``."""
    low, high = block.aminmax(dim=-1)
    least = low.half()
    # Codes are found for the scale and least that will be read.
    scale = ((high - least.float()) / (LEVELS - 1)).clamp_(min=1e-7).half()
    codes = (block - least.float()[..., None]).div_(scale.float()[..., None]).round_()
    return codes.clamp_(0, LEVELS - 1).int(), scale, least


def _codes_int8(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    scale = (block.abs().amax(dim=-1) / MAX_INT8).clamp_(min=1e-7).half()
    codes = (block / scale.float()[..., None]).round_()
    return codes.clamp_(-MAX_INT8, MAX_INT8).int(), scale, None


def _blocks(codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor | None) -> torch.Tensor:
    """Bytes ``[panels, groups, …]`` of codes ``[rows, groups, GROUP_SIZE]``."""
    more = -len(codes) % PANEL
    if more:
        codes = torch.cat([codes, codes.new_zeros((more, *codes.shape[1:]))])
        scale = torch.cat([scale, scale.new_zeros((more, scale.shape[1]))])
        if least is not None:
            least = torch.cat([least, least.new_zeros((more, least.shape[1]))])
    panels, groups = len(codes) // PANEL, codes.shape[1]

    def numbers(each: torch.Tensor) -> torch.Tensor:
        return each.view(panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8)

    # [panels, 16 rows, groups, 8 quads of inputs, 4] → [panels, groups, 8, 16, 4]
    quads = codes.view(panels, PANEL, groups, GROUP_SIZE // 4, 4).permute(0, 2, 3, 1, 4)
    if least is None:
        packed = quads.to(torch.int8).contiguous().view(torch.uint8)
        return torch.cat([numbers(scale), packed.flatten(2)], dim=-1)
    packed = (quads[:, :, :4] | quads[:, :, 4:] << 4).to(torch.uint8)
    return torch.cat([numbers(scale), numbers(least), packed.flatten(2)], dim=-1)


def _dequantize(weight: NativeWeight) -> torch.Tensor:
    panels, groups, _ = weight.data.shape
    head = 2 * PANEL
    scale = weight.data[..., :head].contiguous().view(torch.float16).float()
    if weight.bits == 4:
        least = weight.data[..., head : 2 * head].contiguous().view(torch.float16).float()
        packed = weight.data[..., 2 * head :].view(panels, groups, 4, PANEL, 4)
        codes = torch.cat([packed & (LEVELS - 1), packed >> 4], dim=2).float()
    else:
        least = torch.zeros_like(scale)
        codes = weight.data[..., head:].contiguous().view(torch.int8).float()
        codes = codes.view(panels, groups, 8, PANEL, 4)
    values = codes * scale[:, :, None, :, None] + least[:, :, None, :, None]
    plain = values.permute(0, 3, 1, 2, 4).reshape(panels * PANEL, weight.cols)
    return plain[: weight.rows].contiguous()


def _group_bytes(bits: int) -> int:
    return 4 * PANEL + PANEL * GROUP_SIZE // 2 if bits == 4 else 2 * PANEL + PANEL * GROUP_SIZE


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a weight, in large pages where there are any."""
    memory = torch.empty(tuple(shape), dtype=dtype)
    if memory.nbytes >= _MIN_HUGE:
        load_library().cl_advise(memory.data_ptr(), memory.nbytes)
    return memory


def _padded(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else padded_float32(bias, PANEL)
