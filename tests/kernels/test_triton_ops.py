"""The small kernels against the operations that they stand for, and the bits of their rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conflayers_cli.kernels.fused_forward import RMSNorm
from tests.kernels.interpreted import (
    DEVICE,
    RUNS,
    Recorder,
    elsewhere,
    kernels_run,
    native,
    rounding_as_gpus_do,
    run_in_interpreter,
)

kernels: Any = importlib.import_module("conflayers_cli.kernels.triton_ops") if RUNS else None

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""Two units of the last bit of numbers between two and four."""
NAN = float("nan")

# What a kernel computes with garbage, and exponentials of large numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rms_norm(weight: torch.Tensor, epsilon: float) -> torch.nn.Module:
    """A model's norm with this weight."""
    norm = LlamaRMSNorm(weight.numel(), epsilon)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


@pytest.fixture(autouse=True, scope="module")
def _rounding() -> Iterator[None]:
    with rounding_as_gpus_do():
        yield


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, 25)


class Chance:
    """Random tensors of one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator) * spread
        return drawn.to(self.dtype).to(DEVICE)

    def slots(self, batch: int, count: int, capacity: int) -> torch.Tensor:
        """Slots of each row, no two the same; they don't lie side by side."""
        rows = [torch.randperm(capacity, generator=self.generator) for _ in range(batch)]
        return torch.stack(rows).to(DEVICE)[:, : 2 * count : 2]


def bits(states: torch.Tensor) -> torch.Tensor:
    return states.view({2: torch.int16, 4: torch.int32}[states.element_size()])


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits; of many half-precision numbers all but a few exactly."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if expected.dtype != torch.float32 and expected.numel() >= 100:
        share = (got == expected).double().mean()
        assert share > 0.9, f"not close: {share:.2f} are equal"


@dataclass(frozen=True)
class Adding:
    """The arguments of one add_norm."""

    x: torch.Tensor
    delta: torch.Tensor | None
    weight: torch.Tensor
    epsilon: float = 1e-5
    keep: int = 0

    @property
    def kept(self) -> slice:
        return slice(-self.keep if self.keep else None, None)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(what becomes of x, the normed rows)"""
        x = self.x.clone()
        return x, kernels.add_norm(
            x, self.delta, kernels.NormParams(self.weight, self.epsilon), self.keep
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x.clone()
        if self.delta is not None:
            x[:, self.kept] += self.delta[:, self.kept]
        norm = RMSNorm(rms_norm(self.weight, self.epsilon))
        return x, norm(x[:, self.kept])


def adding(
    seed: int = 0,
    *,
    batch: int = 2,
    tokens: int = 3,
    hidden: int = 48,
    keep: int = 0,
    added: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Adding:
    chance = Chance(seed, dtype)
    x = chance.normal(batch, tokens, hidden)
    delta = chance.normal(batch, tokens, hidden, spread=0.3) if added else None
    return Adding(x, delta, 1 + chance.normal(hidden, spread=0.2), keep=keep)


def assert_adds(call: Adding, reference: Adding) -> None:
    x, normed = call.run()
    expected_x, expected = reference.expected()
    assert normed.dtype == x.dtype and normed.is_contiguous()
    assert torch.equal(bits(x), bits(expected_x)), "not close: x"
    assert_near(normed, expected)


@kernels_run
@settings(max_examples=20)
@given(
    seed=st.integers(0, 1 << 20),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    hidden=st.sampled_from([1, 2, 16, 48, 100, 576, 1000]),
    keep=st.integers(0, 5),
    added=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_add_norm(tokens: int, keep: int, **sizes: Any) -> None:
    call = adding(tokens=tokens, keep=min(keep, tokens), **sizes)
    assert_adds(call, call)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [4096, 5120, 16384])
def test_add_norm_of_large_rows(hidden: int, dtype: torch.dtype) -> None:
    call = adding(hidden, tokens=1, hidden=hidden, dtype=dtype)
    assert_adds(call, call)


ADDING_FAULTS: dict[str, Callable[[Adding], Adding]] = {
    "nothing is added": lambda call: replace(call, delta=None),
    "the weight has no say": lambda call: replace(call, weight=torch.ones_like(call.weight)),
    "another epsilon": lambda call: replace(call, epsilon=1e-4),
    "other rows are kept": lambda call: replace(call, x=call.x.flip(1)),
}


@kernels_run
@pytest.mark.parametrize("fault", ADDING_FAULTS)
def test_a_wrong_norm_would_be_found(fault: str) -> None:
    call = adding(1, keep=2)
    assert_adds(call, call)
    with pytest.raises(AssertionError, match="not close"):
        assert_adds(call, ADDING_FAULTS[fault](call))


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [48, 100, 1000])
def test_bits_of_a_row_among_others(hidden: int, dtype: torch.dtype) -> None:
    call = adding(2, batch=3, tokens=4, hidden=hidden, dtype=dtype)
    assert call.delta is not None
    x, normed = call.run()
    for row, token in ((0, 0), (1, 2), (2, 3)):
        here = slice(row, row + 1), slice(token, token + 1)
        others = call.x.flip(0, 1).contiguous()
        others[here] = call.x[here]
        deltas = torch.full_like(call.delta, NAN)
        deltas[here] = call.delta[here]
        for single in (
            replace(call, x=call.x[here].contiguous(), delta=call.delta[here]),
            replace(call, x=others, delta=deltas),
        ):
            at = here if single.x.shape == call.x.shape else (slice(None), slice(None))
            got = single.run()
            assert torch.equal(bits(got[0][at]), bits(x[here]))
            assert torch.equal(bits(got[1][at]), bits(normed[here]))


@dataclass(frozen=True)
class Turning:
    """The arguments of one rotate_and_write."""

    product: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    heads: int
    weights: tuple[torch.Tensor, torch.Tensor] | None = None
    epsilons: tuple[float, float] = (1e-5, 1e-2)

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries ``[B, Hq, P, D]``, what becomes of keys and of values)"""
        keys, values = self.keys.clone(), self.values.clone()
        norms = None
        if self.weights is not None:
            both = zip(self.weights, self.epsilons, strict=True)
            norms = tuple(kernels.NormParams(*norm) for norm in both)
        queries = kernels.rotate_and_write(
            *(self.product, self.cos, self.sin, self.slots, keys, values, self.heads, norms)
        )
        assert queries.transpose(1, 2).is_contiguous()
        return queries, keys, values

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :class:`.fused.FusedForward` has it."""
        batch, own = self.slots.shape
        shared, size = self.keys.shape[1], self.keys.shape[3]
        states = self.product[:, :own].unflatten(-1, (-1, size)).transpose(1, 2)
        parts = list(states.split((self.heads, shared, shared), dim=1))
        if self.weights is not None:
            for i, (weight, epsilon) in enumerate(zip(self.weights, self.epsilons, strict=True)):
                norm = RMSNorm(rms_norm(weight, epsilon))
                parts[i] = norm(parts[i])
        queries, key = (
            torch.addcmul(part * self.cos, part.roll(size // 2, -1), self.sin) for part in parts[:2]
        )
        keys, values = self.keys.clone(), self.values.clone()
        rows = torch.arange(batch, device=DEVICE)[:, None]
        keys[rows, :, self.slots] = key.transpose(1, 2)
        values[rows, :, self.slots] = parts[2].transpose(1, 2)
        return queries, keys, values


def turning(
    seed: int = 0,
    *,
    batch: int = 2,
    own: int = 3,
    more: int = 0,
    shared: int = 2,
    groups: int = 2,
    size: int = 16,
    capacity: int = 24,
    normed: bool = False,
    slots_first: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Turning:
    chance = Chance(seed, dtype)
    heads = shared * groups
    order = (batch, capacity, shared, size) if slots_first else (batch, shared, capacity, size)
    keys, values = (torch.full(order, NAN, dtype=dtype, device=DEVICE) for _ in range(2))
    if slots_first:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    weights = (1 + chance.normal(size, spread=0.2), 1 + chance.normal(size, spread=0.2))
    angle = chance.normal(batch, 1, own, size).float()
    return Turning(
        product=chance.normal(batch, own + more, (heads + 2 * shared) * size),
        cos=angle.cos().to(dtype),
        sin=angle.sin().to(dtype),
        slots=chance.slots(batch, own, capacity),
        keys=keys,
        values=values,
        heads=heads,
        weights=weights if normed else None,
    )


def assert_turns(call: Turning, reference: Turning) -> None:
    queries, keys, values = call.run()
    expected, expected_keys, expected_values = reference.expected()
    assert queries.dtype == expected.dtype
    assert_near(queries, expected)
    # Everywhere but at the slots there is still what was there before.
    written = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool, device=DEVICE)
    written.scatter_(1, reference.slots, True)
    here = written[:, None, :, None].expand_as(keys)
    assert keys[~here].isnan().all() and values[~here].isnan().all(), "not close: elsewhere"
    assert_near(keys[here], expected_keys[here])
    assert torch.equal(bits(values[here]), bits(expected_values[here])), "not close: values"


@kernels_run
@settings(max_examples=12)
@given(
    seed=st.integers(0, 1 << 20),
    batch=st.integers(1, 3),
    own=st.integers(1, 4),
    more=st.sampled_from([0, 0, 1, 5]),
    shared=st.integers(1, 2),
    groups=st.integers(1, 4),
    size=st.sampled_from([2, 6, 8, 16, 80, 128]),
    normed=st.booleans(),
    slots_first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rotate_and_write(**sizes: Any) -> None:
    call = turning(**sizes)
    assert_turns(call, call)


@kernels_run
@pytest.mark.parametrize("size", [64, 96, 256])
def test_rotation_of_other_sizes(size: int) -> None:
    call = turning(size, batch=1, own=2, size=size, normed=True, dtype=torch.bfloat16)
    assert_turns(call, call)


TURNING_FAULTS: dict[str, Callable[[Turning], Turning]] = {
    "turned the other way": lambda call: replace(call, sin=-call.sin),
    "in other slots": lambda call: replace(call, slots=(call.slots + 1) % 24),
    "rows exchanged": lambda call: replace(call, product=call.product.flip(0)),
    "the last tokens, not the first": lambda call: replace(call, product=call.product.flip(1)),
    "no norms": lambda call: replace(call, weights=None),
    "the keys' norm for queries": lambda call: replace(call, weights=_flipped(call.weights)),
    "one epsilon": lambda call: replace(call, epsilons=(1e-5, 1e-5)),
}


def _flipped(
    weights: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if weights is None else (weights[1], weights[0])


@kernels_run
@pytest.mark.parametrize("fault", TURNING_FAULTS)
def test_a_wrong_rotation_would_be_found(fault: str) -> None:
    call = turning(1, more=2, normed=True)
    assert_turns(call, call)
    with pytest.raises(AssertionError, match="not close"):
        assert_turns(call, TURNING_FAULTS[fault](call))


@kernels_run
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_token_among_others(dtype: torch.dtype, normed: bool) -> None:
    call = turning(3, batch=3, own=4, more=2, normed=normed, dtype=dtype)
    queries, keys, values = call.run()
    for row, token in ((0, 0), (1, 3), (2, 1)):
        here = slice(row, row + 1), slice(token, token + 1)
        single = replace(
            call,
            product=call.product[here],
            cos=call.cos[row : row + 1, :, token : token + 1],
            sin=call.sin[row : row + 1, :, token : token + 1],
            slots=call.slots[here],
            keys=call.keys[row : row + 1],
            values=call.values[row : row + 1],
        )
        slot = int(call.slots[row, token])
        own_queries, own_keys, own_values = single.run()
        assert torch.equal(bits(own_queries[0, :, 0]), bits(queries[row, :, token]))
        assert torch.equal(bits(own_keys[0, :, slot]), bits(keys[row, :, slot]))
        assert torch.equal(bits(own_values[0, :, slot]), bits(values[row, :, slot]))


@kernels_run
def test_nothing_is_written_beyond_the_cache() -> None:
    call = turning(4, batch=1, own=2)
    whole = torch.full((3, 2, 24, 16), NAN, device=DEVICE)
    for outside in (-1, 24, 1 << 40):
        slots = torch.tensor([[3, outside]], device=DEVICE)
        arguments = (call.product, call.cos, call.sin, slots, whole[1:2], whole[1:2], call.heads)
        kernels.rotate_and_write(*arguments)
        assert whole[1, :, 3].isfinite().all()
        whole[1, :, 3] = NAN
        assert whole.isnan().all()


@kernels_run
@settings(max_examples=12)
@given(
    seed=st.integers(0, 1 << 20),
    rows=st.integers(1, 4),
    inner=st.sampled_from([1, 7, 16, 64, 100, 1024, 1500]),
    spread=st.sampled_from([1.0, 30.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_gated(seed: int, rows: int, inner: int, spread: float, dtype: torch.dtype) -> None:
    product = Chance(seed, dtype).normal(2, rows, 2 * inner)
    product[..., :inner] *= spread
    gate, up = product.chunk(2, dim=-1)
    got = kernels.silu_and_mul(product)
    assert got.is_contiguous() and got.dtype == dtype
    assert_near(got / spread, F.silu(gate).mul_(up) / spread)
    alone = kernels.silu_and_mul(product[1:, -1:])
    assert torch.equal(bits(alone), bits(got[1:, -1:]))


@kernels_run
@pytest.mark.parametrize("inner", [1024, 1025, 2600])
def test_gated_in_pieces(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Chance(inner, torch.float32).normal(1, 2, 2 * inner)
    beyond = torch.full((1, 3, inner), NAN, device=DEVICE)
    empty = torch.Tensor.new_empty

    def filled(states: torch.Tensor, shape: Any, **more: Any) -> torch.Tensor:
        """Memory that nobody has written to; the interpreter asks for some, too, of a device."""
        return empty(states, shape, **more) if more else beyond[:, :2]

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    gate, up = product.chunk(2, dim=-1)
    assert_near(kernels.silu_and_mul(product), F.silu(gate) * up)
    assert beyond[:, 2].isnan().all()


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_silu_is_rounded_before_it_multiplies(dtype: torch.dtype) -> None:
    product = Chance(5, dtype).normal(1, 1, 2000)
    gate, up = product.chunk(2, dim=-1)
    exact = (F.silu(gate.float()) * up.float()).to(dtype)
    got = kernels.silu_and_mul(product)
    assert (got == F.silu(gate) * up).double().mean() > 0.99
    assert (got == exact).double().mean() < 0.9


@kernels_run
def test_a_wrong_activation_would_be_found() -> None:
    product = Chance(6, torch.float32).normal(1, 2, 128)
    gate, up = product.chunk(2, dim=-1)
    got = kernels.silu_and_mul(product)
    for wrong in (F.silu(up) * gate, F.gelu(gate) * up, F.silu(gate)):
        with pytest.raises(AssertionError, match="not close"):
            assert_near(got, wrong)


def launched(batch: int, tokens: int) -> list[Recorder]:
    """The launches of calls whose tensors have no values at all."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    names = ("add_norm_kernel", "rotate_and_write_kernel", "silu_and_mul_kernel")
    functions = ("add_norm_row", "rotate_and_write_head", "silu_and_mul_piece")
    recorders = [Recorder("triton_ops.py", function) for function in functions]
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in zip(names, recorders, strict=True):
            patch.setattr(kernels, name, recorder)
        x = torch.empty(batch, tokens, 4096, **half)
        kernels.add_norm(x, x, kernels.NormParams(x[0, 0], 1e-5))
        product = torch.empty(batch, tokens, 6144, **half)
        cache = torch.empty(batch, 8, 1024, 128, **half)
        cos = torch.empty(batch, tokens, 128, **half)
        slots = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
        kernels.rotate_and_write(product, cos, cos, slots, cache, cache, 32)
        kernels.silu_and_mul(torch.empty(batch, tokens, 28672, **half))
    return recorders


@kernels_run
def test_one_kernel_serves_any_number_of_rows() -> None:
    one, many = launched(1, 1), launched(3, 26)
    assert [each.compiled_for for each in one] == [each.compiled_for for each in many]
    assert all("num_warps" in each.compiled_for for each in one)
    assert [each.grid for each in one] == [(1,), (1, 48), (1, 14)]
    assert [each.grid for each in many] == [(78,), (78, 48), (78, 14)]


@native
def test_captured_in_a_graph() -> None:
    call, turn = adding(6, hidden=1024, dtype=torch.float16), turning(6, dtype=torch.float16)
    norm = kernels.NormParams(call.weight, call.epsilon)

    def work() -> list[torch.Tensor]:
        arguments = (turn.product, turn.cos, turn.sin, turn.slots, turn.keys, turn.values)
        query = kernels.rotate_and_write(*arguments, turn.heads)
        return [kernels.add_norm(call.x, None, norm), query, kernels.silu_and_mul(call.x)]

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()
    call.x.mul_(-1.5)
    turn.product.mul_(-1.5)
    turn.slots.copy_((turn.slots + 5) % 24)
    graph.replay()
    replayed = [states.clone() for states in recorded]
    keys = turn.keys.clone()
    for got, expected in zip(replayed, work(), strict=True):
        assert torch.equal(bits(got), bits(expected))
    assert torch.equal(bits(keys), bits(turn.keys))


@kernels_run
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"product": torch.zeros(2, 3, 100)}, "product"),
        ({"product": torch.zeros(2, 2, 128)}, "product"),
        ({"product": torch.zeros(1, 3, 128)}, "product"),
        ({"cos": torch.zeros(2, 1, 2, 16)}, "cos"),
        ({"values": torch.zeros(2, 2, 24, 8)}, "values"),
        ({"keys": torch.zeros(2, 2, 24, 20)[..., :16]}, "even places"),
        ({"keys": torch.zeros(2, 2, 24, 32)[..., ::2]}, "even places"),
    ],
)
def test_refusals(changes: dict[str, torch.Tensor], message: str) -> None:
    moved = {name: states.to(DEVICE) for name, states in changes.items()}
    call = replace(turning(), **moved)  # type: ignore[arg-type]
    arguments = (call.product, call.cos, call.sin, call.slots, call.keys, call.values)
    with pytest.raises(ValueError, match=message):
        kernels.rotate_and_write(*arguments, call.heads)


@kernels_run
def test_refusals_of_rows() -> None:
    call = adding()
    norm = kernels.NormParams(call.weight, 1e-5)
    with pytest.raises(ValueError, match="strides"):
        kernels.add_norm(call.x.transpose(0, 1), None, norm)
    with pytest.raises(ValueError, match="weight"):
        kernels.add_norm(call.x, None, kernels.NormParams(call.weight[1:], 1e-5))
    with pytest.raises(ValueError, match="delta"):
        kernels.add_norm(call.x, call.x[:, :1], norm)
    with pytest.raises(ValueError, match="47 features"):
        kernels.silu_and_mul(call.x[..., :47])
