"""The attention kernels against attention written out in float64, and the bits of their rows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.kernels import flash_decode
from tests.kernels.interpreted import (
    DEVICE,
    INTERPRETED,
    Recorder,
    elsewhere,
    kernels_run,
    native,
    rounding_as_gpus_do,
    run_in_interpreter,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e4]

# What a kernel computes with rows that hold garbage on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")


@contextmanager
def products_as_gpus_do() -> Iterator[None]:
    """Within: the interpreter's products treat all rows alike, and know bfloat16.

    By itself it leaves products to a library that rounds a row by its place among the others, and
    takes bfloat16 for integers. Summed in float64 the order makes no difference.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def floats(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return handle.data.astype(np.float64)

    def dot(builder: Any, one: Any, other: Any, sums: Any, *rest: Any) -> Any:
        product = floats(one) @ floats(other) + sums.data
        return TensorHandle(product.astype(np.float32), sums.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture(autouse=True, scope="module")
def _as_gpus_do() -> Iterator[None]:
    with rounding_as_gpus_do(), products_as_gpus_do():
        yield


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, 50)


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None
    window: int | None
    scaling: float

    def run(self) -> torch.Tensor:
        return flash_decode.flash_attention(
            *(self.query, self.keys, self.values, self.positions, self.slots),
            *(self.window, self.scaling),
        )

    @property
    def written(self) -> torch.Tensor:
        return self.positions if self.slots is None else self.slots


def seen_by(call: Call) -> torch.Tensor:
    """What each token sees, as the decoder's masks have it: bool ``[B, T, S]``."""
    every = torch.arange(call.keys.shape[2], device=DEVICE)
    at = call.positions[..., None]
    seen = every <= at if call.slots is None else every < at
    if call.window is not None:
        seen = seen & (every > at - call.window)
    return seen if call.slots is None else seen | (every == call.slots[..., None])


def reference(call: Call, seen: torch.Tensor) -> torch.Tensor:
    """Row by row, as the formula says: ``[B, T, Hq, Dv]`` float64."""
    batch, heads, tokens, _ = call.query.shape
    groups = heads // call.keys.shape[1]
    out = torch.empty(batch, tokens, heads, call.values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                keys = call.keys[b, h // groups, seen[b, t]].double()
                values = call.values[b, h // groups, seen[b, t]].double()
                scores = keys @ call.query[b, h, t].double() * call.scaling
                out[b, t, h] = scores.softmax(0) @ values
    return out.to(DEVICE)


def assert_right(call: Call, seen: torch.Tensor | None = None) -> None:
    got = call.run()
    assert got.dtype == call.query.dtype and got.is_contiguous()
    expected = reference(call, seen_by(call) if seen is None else seen)
    tolerance = TOLERANCE[call.query.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def cache_of(states: torch.Tensor, slots_first: bool) -> torch.Tensor:
    """The same states ``[B, H, S, D]`` as a view of a larger cache full of NaN."""
    batch, heads, capacity, size = states.shape
    room = -(-capacity // 512) * 512 + 512
    if slots_first:
        whole = states.new_full((batch + 1, room, heads, size), float("nan")).transpose(1, 2)
    else:
        whole = states.new_full((batch + 1, heads, room, size), float("nan"))
    view = whole[1:, :, :capacity]
    view.copy_(states)
    return view


def make(
    seed: int,
    *,
    batch: int = 1,
    shared: int = 2,
    groups: int = 2,
    tokens: int = 3,
    size: int = 16,
    value_size: int | None = None,
    capacity: int = 300,
    window: int | None = None,
    tree: bool = False,
    dtype: torch.dtype = torch.float32,
    garbage: float = float("nan"),
) -> Call:
    """A call of random states; rows are filled as far as chance has it, garbage lies beyond."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    def upto(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit + 1, shape, generator=generator)

    filled = upto(capacity - tokens, batch, 1)
    slots = filled + torch.arange(tokens)
    positions = slots
    if tree:  # tokens from some place on are alternatives to earlier ones
        chain = 1 + int(upto(tokens - 1))
        others = filled + upto(chain - 1, batch, tokens - chain)
        positions = torch.cat([slots[:, :chain], others], dim=1)
    value_size = size if value_size is None else value_size
    query = draw(batch, tokens, shared * groups, size).transpose(1, 2)
    keys = draw(batch, shared, capacity, size)
    values = draw(batch, shared, capacity, value_size)
    call = Call(
        query=query,
        keys=cache_of(keys, slots_first=bool(seed % 2)),
        values=cache_of(values, slots_first=bool(seed % 3)),
        positions=positions.to(DEVICE),
        slots=slots.to(DEVICE) if tree else None,
        window=window,
        scaling=1.5 * size**-0.5,
    )
    nobody = ~seen_by(call).any(1)
    for states in (call.keys, call.values):
        states.masked_fill_(nobody[:, None, :, None], garbage)
    return call


@st.composite
def calls(draw: Callable[..., Any]) -> Call:
    tokens, groups = draw(st.integers(1, 26)), draw(st.sampled_from([1, 3, 4, 8]))
    return make(
        draw(st.integers(0, 1 << 20)),
        batch=draw(st.integers(1, 2)),
        shared=draw(st.integers(1, 2)),
        groups=groups if tokens < 9 else min(groups, 3),
        tokens=tokens,
        size=draw(st.sampled_from([16, 24, 32])),
        capacity=draw(st.integers(tokens, 400)),
        window=draw(st.sampled_from([None, 1, 7, 100, 300])),
        tree=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        garbage=draw(st.sampled_from(GARBAGE)),
    )


@kernels_run
@settings(max_examples=6)
@given(calls())
def test_attention(call: Call) -> None:
    assert_right(call)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "value_size"),
    [(16, 16), (17, 30), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)],
)
def test_head_sizes(size: int, value_size: int, dtype: torch.dtype) -> None:
    call = make(
        size, size=size, value_size=value_size, shared=1, tokens=2, capacity=280, dtype=dtype
    )
    assert_right(call)


@kernels_run
def test_first_token_of_all() -> None:
    call = make(3, tokens=1)
    call = replace(call, positions=torch.zeros_like(call.positions))
    call.keys[:, :, 0], call.values[:, :, 0] = 1.0, 0.25
    torch.testing.assert_close(call.run(), torch.full_like(call.run(), 0.25))


FAULTS: dict[str, Callable[[torch.Tensor, Call], torch.Tensor]] = {
    "own slot left out": lambda seen, call: seen & ~own(call),
    "one slot further": lambda seen, call: seen | seen.roll(1, -1),
    "the window one slot wider": lambda seen, call: seen | seen.roll(-1, -1),
    "all that is written": lambda seen, call: seen | seen.any(1, keepdim=True),
}


def own(call: Call) -> torch.Tensor:
    return torch.arange(call.keys.shape[2], device=DEVICE) == call.written[..., None]


@kernels_run
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_would_be_found(fault: str) -> None:
    call = make(6, tokens=5, window=40, tree=True, garbage=1.0)
    assert_right(call)
    with pytest.raises(AssertionError, match="not close"):
        assert_right(call, FAULTS[fault](seen_by(call), call))


def bits(out: torch.Tensor) -> torch.Tensor:
    return out.view({2: torch.int16, 4: torch.int32}[out.element_size()])


def alone(call: Call, row: int, token: int, capacity: int, garbage: float) -> Call:
    """One token of a call by itself, in a cache of another size with garbage all around."""
    seen = seen_by(call)[row, token].nonzero()[:, 0]

    def moved(states: torch.Tensor) -> torch.Tensor:
        other = states.new_full((1, states.shape[1], capacity, states.shape[3]), garbage)
        other[0, :, seen] = states[row, :, seen]
        return other

    return replace(
        call,
        query=call.query[row : row + 1, :, token : token + 1],
        keys=moved(call.keys),
        values=moved(call.values),
        positions=call.positions[row : row + 1, token : token + 1],
        slots=call.written[row : row + 1, token : token + 1],
    )


@kernels_run
@settings(max_examples=2)
@given(calls(), st.data())
def test_bits_of_a_token_alone(call: Call, data: st.DataObject) -> None:
    out = call.run()
    row = data.draw(st.integers(0, call.query.shape[0] - 1))
    token = data.draw(st.integers(0, call.query.shape[2] - 1))
    least = int(call.written[row, token]) + 1
    capacity = data.draw(st.integers(least, least + 400))
    single = alone(call, row, token, capacity, data.draw(st.sampled_from(GARBAGE))).run()
    assert out[row, token].isfinite().all()
    assert torch.equal(bits(single[0, 0]), bits(out[row, token]))


@kernels_run
@settings(max_examples=2)
@given(calls(), st.randoms(use_true_random=False))
def test_bits_of_tokens_in_another_order_with_padding(call: Call, chance: Any) -> None:
    tokens = call.query.shape[2]
    order = [chance.randrange(tokens) for _ in range(chance.randrange(9))] + list(range(tokens))
    chance.shuffle(order)
    shuffled = replace(
        call,
        query=call.query[:, :, order],
        positions=call.positions[:, order],
        slots=call.written[:, order],
    )
    assert torch.equal(bits(shuffled.run()), bits(call.run()[:, order]))


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_other_tokens_see_may_be_garbage(garbage: float, dtype: torch.dtype) -> None:
    call = make(8, tokens=6, dtype=dtype)
    before = call.run()
    last = int(call.positions[0, -1])
    call.keys[:, :, last], call.values[:, :, last] = garbage, garbage
    after = call.run()
    assert torch.equal(bits(after[:, :-1]), bits(before[:, :-1]))
    assert not torch.equal(bits(after[:, -1]), bits(before[:, -1]))


@kernels_run
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows(odd: float) -> None:
    call = make(9, tokens=4, shared=1, groups=1)
    call.values[:, :, int(call.positions[0, 2]), 5] = odd
    feature = call.run()[0, :, 0, 5]
    assert feature.isnan().tolist() == [False, False, True, True]
    assert not call.run()[..., :5].isnan().any()


@kernels_run
@settings(max_examples=2)
@given(calls())
def test_bits_where_programs_take_several_splits(call: Call) -> None:
    out = call.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_decode, "PROGRAMS", 1)
        assert torch.equal(bits(call.run()), bits(out))


@kernels_run
def test_another_order_of_sums_would_be_found() -> None:
    """Were splits to follow the capacity, say, the tests of bits would see it."""
    call = make(10, tokens=8, capacity=600)
    call = replace(call, positions=call.positions % 100 + 480)
    call.keys.nan_to_num_(nan=0.5), call.values.nan_to_num_(nan=-0.5)
    out = call.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_decode, "SPLIT", 128)
        other = call.run()
    torch.testing.assert_close(other, out)
    assert not torch.equal(bits(other), bits(out))


@interpreted
@pytest.mark.parametrize(("position", "window"), [(40, None), (900, None), (900, 100), (1900, 300)])
def test_only_what_is_seen_is_read(
    position: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    read: set[int] = set()
    load = InterpreterBuilder.create_masked_load

    def recording(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        read.update(pointers.data[mask.data].ravel().tolist())
        return load(builder, pointers, mask, *rest, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording)
    call = make(11, shared=1, tokens=2, capacity=2000, window=window)
    call = replace(call, positions=torch.tensor([[position, position + 1]]))
    call.keys.fill_(1.0), call.values.fill_(2.0)
    call.run()
    first = 0 if window is None else position - window + 1
    expected = (position + 2 - first) * call.keys.shape[3]
    for states in (call.keys, call.values):
        begin, last = states.data_ptr(), states[-1, -1, -1, -1].data_ptr()
        assert sum(begin <= address <= last for address in read) == expected


def launched(tokens: int, capacity: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, ...]:
    """The kernels' launches of a call whose positions have no values at all."""
    file = "flash_decode_kernels.py"
    recorders = Recorder(file, "flash_split"), Recorder(file, "flash_combine")
    monkeypatch.setattr(flash_decode, "_kernels", lambda: recorders)
    cache = torch.empty(2, 8, capacity, 128, dtype=torch.bfloat16, device="meta")
    query = torch.empty(2, 32, tokens, 128, dtype=torch.bfloat16, device="meta")
    at = torch.empty(2, tokens, dtype=torch.int64, device="meta")
    out = flash_decode.flash_attention(query, cache, cache, at, at, 4096, 0.1)
    assert out.shape == (2, tokens, 32, 128)
    return recorders


def test_launches_follow_from_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    split, combine = launched(1, 4096, monkeypatch)
    assert split.grid == (1, 16, 16)  # 4 rows; 2 sequences of 8 heads; 16 splits
    assert combine.grid == (64, 2)
    split, combine = launched(26, 1 << 17, monkeypatch)
    assert split.grid[:2] == (7, 16)  # 104 rows in blocks of 16
    assert split.grid[2] * 7 * 16 <= flash_decode.PROGRAMS + 7 * 16  # 512 splits are taken in turn
    assert combine.grid == (26 * 64, 2)


def test_one_kernel_serves_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = launched(1, 512, monkeypatch), launched(26, 1 << 17, monkeypatch)
    assert [each.compiled_for for each in few] == [each.compiled_for for each in many]
    assert all("num_warps" in each.compiled_for for each in few)


@native
def test_captured_in_a_graph() -> None:
    call = make(12, tokens=4, capacity=900, window=300, dtype=torch.float16)
    call.keys.nan_to_num_(nan=0.5), call.values.nan_to_num_(nan=-0.5)
    call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run()
    for position in (0, 255, 700):
        call.positions.copy_(position + torch.arange(4, device=DEVICE))
        graph.replay()
        assert torch.equal(bits(out), bits(call.run()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(1, 2, 300, 32)}, "keys"),
        ({"keys": torch.zeros(1, 3, 300, 16), "values": torch.zeros(1, 3, 300, 16)}, "share"),
        ({"positions": torch.zeros(1, 4, dtype=torch.int64)}, "positions"),
        ({"values": torch.zeros(1, 2, 300, 16, dtype=torch.float64)}, "float64"),
        ({"values": torch.zeros(1, 2, 300, 8)}, "8 features"),
        ({"keys": torch.zeros(1, 2, 300, 20)[..., :16]}, "even places"),
        ({"keys": torch.zeros(1, 2, 300, 32)[..., ::2]}, "even places"),
    ],
)
def test_refusals(changes: dict[str, torch.Tensor], message: str) -> None:
    call = make(14)
    moved = {name: states.to(DEVICE) for name, states in changes.items()}
    with pytest.raises(ValueError, match=message):
        replace(call, **moved).run()  # type: ignore[arg-type]


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "GPU" in str(flash_decode.unsupported_reason(torch.device("cpu"), half, 128))
    assert "float64" in str(flash_decode.unsupported_reason(cuda, torch.float64, 128))
    assert "not of 8" in str(flash_decode.unsupported_reason(cuda, half, 8))
    assert "not of 512" in str(flash_decode.unsupported_reason(cuda, half, 512))
    assert "triton" in str(flash_decode.unsupported_reason(cuda, half, 128))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(flash_decode.unsupported_reason(cuda, half, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flash_decode.unsupported_reason(cuda, half, 128) is None


def test_importing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, conflayers_cli.kernels.flash_decode as flash\n"
        "assert 'GPU' in flash.unsupported_reason(torch.device('cpu'), torch.float32, 64)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
