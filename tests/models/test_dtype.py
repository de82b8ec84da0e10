"""The dtype a model runs in, and why."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from conflayers_cli.errors import InputError
from conflayers_cli.models import dtype as dtype_module
from conflayers_cli.models.dtype import choose_dtype, measure_bfloat16_ratio
from tests import tiny

CPU = torch.device("cpu")
CONFIG = tiny.CONFIGS["llama"]()


def _able(monkeypatch: pytest.MonkeyPatch, **abilities: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)


@pytest.mark.parametrize(
    ("abilities", "ratio", "expected", "because"),
    [
        ({"avx512_bf16": True}, 0.48, torch.bfloat16, "take 0.48 of float32's time (measured)"),
        ({"avx512_bf16": False, "amx_bf16": True}, 1.09, torch.bfloat16, "amx_bf16"),
        ({"avx512_bf16": True}, 1.1, torch.float32, "take 1.10 of float32's time (measured)"),
        ({"sve_bf16": True}, 3.0, torch.float32, "despite sve_bf16"),
    ],
)
def test_auto_measures_where_there_are_instructions(
    monkeypatch: pytest.MonkeyPatch,
    abilities: dict[str, bool],
    ratio: float,
    expected: torch.dtype,
    because: str,
) -> None:
    _able(monkeypatch, **abilities)
    dtype, reason = choose_dtype("auto", CPU, CONFIG, lambda config: ratio)
    assert dtype == expected
    assert reason.startswith(f"{str(expected).removeprefix('torch.')}: ")
    assert because in reason


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, torch.bfloat16), (1.09, torch.bfloat16), (1.1, torch.float32)]
)
def test_native_kernels_need_no_instructions(
    monkeypatch: pytest.MonkeyPatch, ratio: float, expected: torch.dtype
) -> None:
    _able(monkeypatch)
    dtype, reason = choose_dtype("auto", CPU, CONFIG, _never, native=lambda config: ratio)
    assert dtype == expected
    assert f"{ratio:.2f} of float32's time (measured, native kernels)" in reason
    _able(monkeypatch, avx512_bf16=True)
    without = choose_dtype("auto", CPU, CONFIG, lambda config: 0.7, native=lambda config: None)
    assert without[0] == torch.bfloat16 and "0.70" in without[1]


@pytest.mark.parametrize("abilities", [{}, {"avx2": True, "avx512_bf16": False}])
def test_nothing_is_measured_without_instructions(
    monkeypatch: pytest.MonkeyPatch, abilities: dict[str, bool]
) -> None:
    _able(monkeypatch, **abilities)
    dtype, reason = choose_dtype("auto", CPU, CONFIG, _never)
    assert dtype == torch.float32
    assert "no bfloat16 instructions" in reason


@pytest.mark.parametrize("spec", ["float32", "bfloat16", "float16"])
def test_nothing_is_measured_where_one_is_asked_for(spec: str) -> None:
    assert choose_dtype(spec, CPU, CONFIG, _never) == (
        getattr(torch, spec),
        f"{spec}, as asked for",
    )


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for able, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able: able)
        assert choose_dtype("auto", cuda, CONFIG, _never)[0] == expected
    assert choose_dtype("auto", torch.device("mps"), CONFIG, _never)[0] == torch.float16


def test_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"'int8': auto, float32, bfloat16, float16$"):
        choose_dtype("int8", CPU, CONFIG)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_products_are_timed_whatever_the_family(family: str) -> None:
    assert 0 < measure_bfloat16_ratio(tiny.CONFIGS[family]()) < float("inf")


def test_the_ratio_is_that_of_undisturbed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # float32 and bfloat16 by turns; the first round counts for nothing, and half the others' times
    # are those of something else
    turns = itertools.count()

    def times(blocks: Any, rows: int) -> list[float]:
        typical = (2.0, 1.2)[rows - 1]
        round_ = next(turns) // 2
        return [0.1] * 9 if round_ == 0 else [typical, 90.0 * rows] * 4 + [typical]

    monkeypatch.setattr(dtype_module, "_times_per_weight", times)
    assert measure_bfloat16_ratio(CONFIG) == pytest.approx(0.6)


def test_one_thread_measures_and_all_are_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []

    def times(blocks: Any, rows: int) -> list[float]:
        seen.append(torch.get_num_threads())
        if len(seen) > 2:
            raise RuntimeError("interrupted")
        return [1.0]

    monkeypatch.setattr(dtype_module, "_times_per_weight", times)
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            measure_bfloat16_ratio(CONFIG)
        assert torch.get_num_threads() == 3
        assert seen == [1, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("hidden", "inner", "size", "count", "rows"),
    [
        (32, 64, 5 * 3 * 32 * 64, 5, 64),
        (32, 64, 5 * 3 * 32 * 64 + 100, 5, 64),  # what is left over is no layer
        (8192, 28672, 3 * 8192 * 30 + 5, 1, 30),  # a part of one layer
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_carved_out_of_one_memory(
    dtype: torch.dtype, hidden: int, inner: int, size: int, count: int, rows: int
) -> None:
    memory = torch.zeros(size, dtype=dtype)
    weights = dtype_module._carve(memory, hidden, inner)
    assert [up.shape for up, _ in weights] == [(2 * rows, hidden)] * count
    assert [down.shape for _, down in weights] == [(hidden, rows)] * count
    for up, down in weights:
        up += 1
        down += 1
    assert memory.max() == 1 and memory.sum(dtype=torch.int64) == count * 3 * hidden * rows


def test_both_dtypes_go_through_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[torch.dtype, int, int, int]] = []

    def measure(blocks: Any, rows: int) -> list[float]:
        first, last = blocks[0][0], blocks[-1][1]
        end = last.data_ptr() + last.nbytes
        assert torch.isfinite(first).all() and first.abs().max() < 1
        spans.append((first.dtype, rows, first.data_ptr(), end))
        return [1.0]

    monkeypatch.setattr(dtype_module, "_times_per_weight", measure)
    assert measure_bfloat16_ratio(CONFIG) == 1.0
    float32, bfloat16 = spans[:2]
    assert float32[:2] == (torch.float32, 1)
    assert bfloat16[:2] == (torch.bfloat16, 2)
    assert float32[2:] == bfloat16[2:]


def _never(config: Any) -> float:
    raise AssertionError("measured without need")
