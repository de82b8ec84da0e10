"""Packing moves bits; products with packed and quantised weights are what their values say."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conflayers_cli.kernels.native_weights import (
    NativeWeight,
    from_groups,
    pack,
    quantize,
    round_packed,
    unpack,
)
from tests.kernels import native

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
SHAPES = [(16, 32), (100, 64), (7, 96), (81, 2080), (4, 6)]
WIDTHS = (1, 2, 3, 5, 6, 7, 8, 11, 16, 64)


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (33, 5)])
def test_packing_is_undone_bit_by_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = made(*shape, dtype=dtype)
    weight[0, 0], weight[-1, -1] = torch.nan, -0.0
    back = unpack(pack(weight))
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_packed_weights(shape: tuple[int, int], dtype: torch.dtype, unit: str) -> None:
    weight, bias = made(*shape, dtype=dtype), made(shape[0], dtype=dtype, seed=1)
    packed, x = pack(weight, bias), made(64, shape[1], dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T + bias.double()
    error = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    whole = packed(x, unit=unit)
    torch.testing.assert_close(whole.double(), expected, rtol=error, atol=20 * error)
    for width in WIDTHS:
        for threads in (1, 2, 3):
            assert torch.equal(packed(x[:width], threads, unit), whole[:width])
            assert torch.equal(packed(x[-width:], threads, unit), whole[-width:])


def reference(weight: NativeWeight, x: torch.Tensor) -> torch.Tensor:
    """The product of the values that a quantised weight and inputs in eight bits stand for."""
    groups = x.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = ((groups / scale).round() * scale).flatten(-2)
    return rounded @ unpack(weight).double().T


@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [each for each in SHAPES if each[1] % 32 == 0])
def test_products_in_few_bits(shape: tuple[int, int], bits: int, unit: str) -> None:
    weight = made(*shape)
    packed, x = quantize(weight, bits), made(64, shape[1], seed=3)
    x[3] = 0
    x[4, :32] = 127  # the largest sums
    error = (unpack(packed) - weight).norm() / weight.norm()
    assert error < {4: 0.1, 8: 0.01}[bits]
    whole = packed(x, unit=unit)
    torch.testing.assert_close(whole.double(), reference(packed, x), rtol=1e-3, atol=1e-3)
    for width in WIDTHS:
        for threads in (1, 2, 3):
            assert torch.equal(packed(x[:width], threads, unit), whole[:width])


@pytest.mark.parametrize("unit", native.UNITS)
def test_the_extremes_of_few_bits_are_exact(unit: str) -> None:
    """Sums that would not fit in 16 bits."""
    x = torch.tensor([[127.0], [-127.0]]).expand(2, 64)
    ones = torch.ones((16, 2), dtype=torch.float16)
    for code in (-128, 127):
        got = from_groups(torch.full((16, 2, 32), code), ones, None)(x, unit=unit)
        assert torch.equal(got[0], torch.full((16,), 64.0 * 127 * code))
    for code in (0, 15):
        got = from_groups(torch.full((16, 2, 32), code), ones, -8 * ones)(x, unit=unit)
        assert torch.equal(got[1], torch.full((16,), -64.0 * 127 * (code - 8)))


def test_blocks_of_gguf_are_kept_exactly() -> None:
    """Q4_0: d (code - 8); Q4_1: d code + m; Q8_0: d code."""
    generator = torch.Generator().manual_seed(0)
    scale, least = (made(20, 3, dtype=torch.float16, seed=seed) for seed in (1, 2))
    four = torch.randint(0, 16, (20, 3, 32), generator=generator)
    eight = torch.randint(-128, 128, (20, 3, 32), generator=generator)
    d, m = (each.float()[..., None] for each in (scale, least))
    assert torch.equal(unpack(from_groups(four, scale, least)), (d * four + m).flatten(1))
    assert torch.equal(unpack(from_groups(four, scale, -8 * scale)), (d * (four - 8)).flatten(1))
    assert torch.equal(unpack(from_groups(eight, scale, None)), (d * eight).flatten(1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_stay_so(bits: int, bad: float) -> None:
    packed, x = quantize(made(16, 64), bits), made(2, 64)
    x[1, 40] = bad
    out = packed(x)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


def test_what_does_not_fit_is_refused() -> None:
    packed = pack(made(16, 64))
    for x in (made(2, 32), made(2, 64).bfloat16(), made(2, 64).double()):
        with pytest.raises(ValueError):
            packed(x)
    for weight, bits in ((made(16, 40), 4), (made(16, 64), 3), (made(64), 4)):
        with pytest.raises(ValueError):
            quantize(weight, bits)
    with pytest.raises(ValueError):
        pack(made(4, 4).double())
    with pytest.raises(ValueError):
        from_groups(torch.zeros((2, 1, 32)), torch.ones((2, 1)), None)
    with pytest.raises(ValueError, match="does not run here"):
        packed(made(1, 64), unit="abacus")


def _product(seed: int) -> torch.Tensor:
    return pack(made(64, 64))(made(3, 64, seed=seed), threads=2)


def test_callers_may_be_many_threads_and_forked_processes() -> None:
    expected = [_product(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(_product, range(4)), expected))
    torch.set_num_threads(torch.get_num_threads())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert all(map(torch.equal, pool.map(_product, range(4)), expected))


@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [each for each in SHAPES if each[1] % 32 == 0])
def test_rounding_by_the_library(shape: tuple[int, int], dtype: torch.dtype, unit: str) -> None:
    """Bit for bit what PyTorch's operations give; groups of one value, and of very small ones."""
    weight, bias = made(*shape, dtype=dtype), made(shape[0], dtype=torch.float32, seed=1)
    weight[0, :32], weight[-1, -32:] = 0.5, 0.0
    weight[1, :32] *= 1e-6
    packed = pack(weight, bias)
    expected = quantize(weight, 4, bias)
    for threads in (1, 3):
        rounded = round_packed(packed, threads, unit)
        assert (rounded.bits, rounded.rows, rounded.cols) == (4, *shape)
        assert torch.equal(unpack(rounded), unpack(expected))
        assert rounded.bias is not None and torch.equal(rounded.bias[: shape[0]], bias)
    eight = quantize(weight, 8)
    again = quantize(unpack(eight), 4)
    assert torch.equal(unpack(round_packed(eight, unit=unit)), unpack(again))


def test_rounding_refuses_what_has_no_groups() -> None:
    with pytest.raises(ValueError, match="4 bits for a weight"):
        round_packed(pack(made(4, 6)))
