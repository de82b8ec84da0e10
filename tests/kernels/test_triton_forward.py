"""The forward with kernels gives what the fused one and the modules give, under any plan."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.batch_invariance import NOT_INVARIANT, BatchInvariance
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.kernels.fused_forward import FusedForward
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.triton_forward import KernelForward
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.kernels.interpreted import (
    DEVICE,
    elsewhere,
    kernels_run,
    rounding_as_gpus_do,
    run_in_interpreter,
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen2-mixed", "qwen3", "phi3", "olmo2"]
BEHIND = "olmo2"
"""Its norms stand behind the sub-layers: all is left to the fused forward."""
MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))
WEIGHTS = st.sampled_from([None, "int4"])
CAPACITY = 64

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def _rounding() -> Iterator[None]:
    with rounding_as_gpus_do():
        yield


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, 15)


@functools.cache
def models(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """(decoder, its fused forward, the one with kernels); norms have weights that matter."""
    config = tiny.CONFIGS[family]()
    for name, value in more.items():
        setattr(config, name, value)
    model = tiny.build(config)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
    decoder = Decoder(model.to(dtype).to(DEVICE), eager="compared with itself")
    parts = decoder.model, decoder.stack.layers, decoder.config
    fused = FusedForward(*parts)
    return decoder, fused, KernelForward(*parts)


@contextmanager
def using(decoder: Decoder, forward: FusedForward | None, least: int = 1) -> Iterator[None]:
    """Within: passes go through a forward, None: the modules; and run so many rows at the least."""
    passes, rows = decoder.passes, decoder.invariance
    before = passes.fused
    passes.fused, decoder.invariance = (
        forward,
        BatchInvariance(least, bitwise=True) if least > 1 else NOT_INVARIANT,
    )
    try:
        yield
    finally:
        passes.fused, decoder.invariance = before, rows


class Case:
    """A pass on top of a prompt, and what the cache holds then.

    Args:
        rows, width, length: of the pass, and of the prompt before it; row i is i tokens further.
        tree: the last two tokens are alternatives to the one before, in slots far behind.
    """

    def __init__(
        self,
        decoder: Decoder,
        fused: FusedForward,
        *,
        rows: int = 1,
        width: int = 3,
        length: int = 7,
        tree: bool = False,
        plan: SkipPlan = FULL,
    ) -> None:
        generator = torch.Generator().manual_seed(width)
        self.decoder, self.plan, self.rows = decoder, plan, rows
        self.tokens = torch.randint(tiny.VOCABULARY, (rows, width), generator=generator)
        self.prompt = torch.randint(tiny.VOCABULARY, (rows, length), generator=generator)
        self.fused = fused
        self.positions = length + torch.arange(rows)[:, None] + torch.arange(width)
        self.slots: torch.Tensor | None = None
        if tree and width > 2:
            self.slots = self.positions.clone()
            self.slots[:, -2:] += 20
            self.positions[:, -2:] = self.positions[:, -3:-2]

    def run(
        self, forward: FusedForward | None, least: int = 1, last_only: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(logits, all keys and values)"""
        cache = self.decoder.new_cache(CAPACITY, batch=self.rows)
        with using(self.decoder, self.fused):
            self.decoder.prefill(self.prompt, cache)
        with using(self.decoder, forward, least):
            logits = self.decoder.forward(
                *(self.tokens, self.positions, cache, self.plan),
                slots=self.slots,
                last_only=last_only,
            )
        return logits, held(cache)


def held(cache: KVCache) -> list[torch.Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    """Logits and cache agree; the cache is compared because a last token doesn't see all of it."""
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for own, others in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(own, others, rtol=tolerance, atol=tolerance)


@kernels_run
@settings(max_examples=6)
@given(
    family=st.sampled_from(FAMILIES),
    plan=st.builds(SkipPlan.of, MIDDLE, MIDDLE, weights=WEIGHTS),
    rows=st.integers(1, 2),
    width=st.integers(1, 4),
    length=st.integers(1, 12),
    tree=st.booleans(),
)
def test_kernels_give_what_the_others_say(family: str, **sizes: Any) -> None:
    decoder, fused, kernels = models(family)
    case = Case(decoder, fused, **sizes)
    got = case.run(kernels)
    assert_same(got, case.run(fused), 2e-5)
    assert_same(got, case.run(None), 1e-4)


@kernels_run
@settings(max_examples=4)
@given(
    family=st.sampled_from([family for family in FAMILIES if family != BEHIND]),
    plan=st.builds(SkipPlan.of, MIDDLE, MIDDLE, weights=WEIGHTS),
    rows=st.integers(1, 2),
    width=st.integers(2, 3),
    tree=st.booleans(),
)
def test_in_bfloat16_but_for_rounding(family: str, **sizes: Any) -> None:
    """What one step rounds otherwise goes on; keys and values of the first layer are nearly equal
    bit for bit, logits as near to the fused ones as to those in float32."""
    decoder, fused, kernels = models(family, torch.bfloat16)
    case = Case(decoder, fused, **sizes)
    got, cached = case.run(kernels, least=2)
    expected, others = case.run(fused, least=2)
    spread = expected.float().std()
    assert (got - expected).float().pow(2).mean().sqrt() < 0.02 * spread
    for own, other in zip(cached[:2], others[:2], strict=True):
        assert (own == other).double().mean() > 0.99
        torch.testing.assert_close(own, other, rtol=2**-5, atol=2**-5)


@kernels_run
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [1, 3])
def test_rows_that_only_fill_up(family: str, width: int) -> None:
    decoder, fused, kernels = models(family)
    case = Case(decoder, fused, width=width)
    expected = case.run(fused)
    for least in (4, 8):
        assert_same(case.run(kernels, least), expected, 2e-5)


@kernels_run
def test_logits_of_the_last_tokens_alone() -> None:
    decoder, fused, kernels = models("llama")
    for plan in (FULL, SkipPlan.of([4], [4]), SkipPlan.of(range(5), range(5))):
        case = Case(decoder, fused, rows=2, width=4, plan=plan)
        got, expected = case.run(kernels, last_only=True), case.run(fused)
        assert got[0].shape == (2, 1, tiny.VOCABULARY)
        assert_same(got, (expected[0][:, -1:], expected[1]), 2e-5)


@kernels_run
@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_that_has_no_memory_yet(rows: int) -> None:
    decoder, fused, kernels = models("mistral")
    tokens = torch.arange(6).view(1, 6).expand(rows, 6)
    positions = torch.arange(6).expand(rows, 6)
    both = []
    for forward in (kernels, fused):
        cache = KVCache(tiny.DEPTH, rows, CAPACITY)
        with using(decoder, forward):
            both.append((decoder.forward(tokens, positions, cache), held(cache)))
    assert both[0][1][0].shape == both[1][1][0].shape
    assert_same(both[0], both[1], 2e-5)


@kernels_run
def test_one_row_of_a_larger_cache() -> None:
    decoder, fused, kernels = models("qwen2")
    both = []
    for forward in (kernels, fused):
        cache = decoder.new_cache(CAPACITY, batch=3)
        at = torch.arange(5)[None]
        with using(decoder, forward):
            logits = decoder.forward(at, at, cache.view(1, 2))
        both.append((logits, held(cache)))
        assert not cache.layers[0].keys[[0, 2]].any()
    assert_same(both[0], both[1], 2e-5)


@kernels_run
def test_another_activation_than_silu() -> None:
    decoder, fused, kernels = models("llama", hidden_act="gelu")
    case = Case(decoder, fused, plan=SkipPlan.of([1], []))
    assert_same(case.run(kernels), case.run(fused), 2e-5)


@kernels_run
def test_norms_behind_the_sub_layers_are_left_to_the_fused_forward() -> None:
    for family in FAMILIES:
        assert models(family)[2]._supported == (family != BEHIND)


def _no_delta(forward: Any) -> dict[str, Any]:
    right = forward._add_norm
    return {"_add_norm": lambda x, delta, norm, keep=0: right(x, None, norm, keep)}


def _last_not_added(forward: Any) -> dict[str, Any]:
    right = forward._add_norm
    return {
        "_add_norm": lambda x, delta, norm, keep=0: right(
            x, None if norm is forward._last else delta, norm, keep
        )
    }


FAULTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "nothing is added": _no_delta,
    "the last sub-layer's part isn't added": _last_not_added,
    "norms of other layers": lambda forward: {"_norms": forward._norms[::-1]},
    "norms exchanged": lambda forward: {"_norms": tuple(n[::-1] for n in forward._norms)},
    "heads aren't normed": lambda forward: {"_head_norms": (None,) * tiny.DEPTH},
    "another gate": lambda forward: {
        "_silu_and_mul": lambda product: F.gelu(product.chunk(2, -1)[0]) * product.chunk(2, -1)[1]
    },
}


@kernels_run
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, fused, kernels = models("qwen3")
    case = Case(decoder, fused)
    for name, wrong in FAULTS[fault](kernels).items():
        monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(case.run(kernels), case.run(fused), 2e-5)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    config = SimpleNamespace(hidden_size=4096)
    unsupported_reason = KernelForward.unsupported_reason
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "GPU" in str(unsupported_reason(torch.device("cpu"), half, config))
    assert "float64" in str(unsupported_reason(cuda, torch.float64, config))
    assert "not 20000" in str(unsupported_reason(cuda, half, SimpleNamespace(hidden_size=20000)))
    assert "triton" in str(unsupported_reason(cuda, half, config))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in str(unsupported_reason(cuda, half, config))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unsupported_reason(cuda, half, config) is None


@elsewhere
def test_importing_needs_no_triton() -> None:
    assert KernelForward.__module__ in sys.modules
    assert "conflayers_cli.kernels.triton_ops" not in sys.modules
