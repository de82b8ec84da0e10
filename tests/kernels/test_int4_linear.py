"""Drafts with weights of four bits: what they compute, and that texts stay the model's own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conflayers_cli.engine.cost_cache import cost_table
from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.forward import ModelInput
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels import int4_linear
from conflayers_cli.kernels.int4_linear import (
    GROUP_SIZE,
    LEVELS,
    Int4Head,
    Int4Linear,
    quantize_int4,
)
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.support import find_layers
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny
from tests.spec_decode import simulated

pytestmark = pytest.mark.usefixtures("without_native")

INT4 = SkipPlan(weights="int4")
WITH_LINEARS = tuple(family for family in tiny.FAMILIES if family != "gpt2")
"""GPT-2's products are no linear layers."""


def decoded(weight: torch.Tensor) -> torch.Tensor:
    """What the codes of a weight stand for."""
    codes, scales = quantize_int4(weight)
    scale, zero = scales.transpose(0, 1).unbind(-1)
    levels = codes.unflatten(1, (-1, GROUP_SIZE)) - LEVELS // 2
    return (levels * scale[..., None] + zero[..., None]).flatten(1)


def logits(decoder: Decoder, plan: SkipPlan, tokens: list[int]) -> torch.Tensor:
    row = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    return decoder.forward(row, positions, decoder.new_cache(len(tokens)), plan)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_weight_moves_by_more_than_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(48, 3 * GROUP_SIZE) * torch.logspace(-3, 2, 48)[:, None]
    before = weight.clone()
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    steps = (groups.amax(-1) - groups.amin(-1)) / (LEVELS - 1)
    moved = (decoded(weight) - weight).unflatten(1, (-1, GROUP_SIZE)).abs().amax(-1)
    assert bool((moved <= steps * 0.501 + 1e-6).all())
    assert torch.equal(weight, before)  # it stays in use
    whole = quantize_int4(weight)
    monkeypatch.setattr(int4_linear, "_ROWS", 7)  # a large weight is rounded in parts
    for one, other in zip(whole, quantize_int4(weight), strict=True):
        assert torch.equal(one, other)


def test_weights_that_are_all_one_value() -> None:
    weight = torch.full((16, GROUP_SIZE), 0.25)
    torch.testing.assert_close(decoded(weight), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 70)])
def test_the_product_is_that_with_the_rounded_weight(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias = drawn(64, 4 * GROUP_SIZE).to(dtype), drawn(64, seed=1).to(dtype)
    rows = drawn(*shape, 4 * GROUP_SIZE, seed=2).to(dtype)
    product = Int4Linear(weight, bias, [16, 48])(rows)
    expected = rows.float() @ decoded(weight).float().T + bias.float()
    assert product.dtype == dtype and product.shape == (*shape, 64)
    rtol, atol = (1e-3, 1e-3) if dtype == torch.float32 else (0.03, 0.1)
    torch.testing.assert_close(product.float(), expected, rtol=rtol, atol=atol)


def test_the_heads_likeliest_tokens_get_their_own_logits() -> None:
    weight = drawn(3200, 2 * GROUP_SIZE)
    rows = drawn(8, 50, 2 * GROUP_SIZE, seed=1)
    found, own = Int4Head(weight, weight.__getitem__)(rows), rows @ weight.T
    exact = torch.isclose(found, own, rtol=1e-5, atol=1e-5)
    assert bool((exact.sum(-1) >= int4_linear.RESCORED_TOKENS).all()) and not bool(exact.all())
    rough = Int4Linear(weight, None, [3200])(rows)
    right, roughly = (
        float((each.argmax(-1) == own.argmax(-1)).float().mean()) for each in (found, rough)
    )
    assert right > 0.99 and roughly < 0.95


@functools.cache
def roughened(family: str) -> Decoder:
    """The family's model with weights that are what their four bits stand for."""
    model = tiny.build(tiny.CONFIGS[family]())
    for layer in find_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear) and int4_linear._fits(module.weight):
                module.weight.data.copy_(decoded(module.weight.data))
    return Decoder(model)


@pytest.mark.parametrize("family", WITH_LINEARS)
def test_drafts_are_those_of_the_rounded_model(family: str) -> None:
    """By the modules and fused, with layers left out, too."""
    decoder, tokens = tiny.decoder(family), tiny.prompt(9)
    assert decoder.stack.int4.reason is None
    for plan in (INT4, SkipPlan.of([2], [2], weights="int4")):
        expected = logits(roughened(family), SkipPlan(plan.attention, plan.mlp), tokens)
        torch.testing.assert_close(logits(decoder, plan, tokens), expected, rtol=1e-3, atol=1e-3)
        with decoder.stack.watching():
            by_modules = logits(decoder, plan, tokens)
        torch.testing.assert_close(by_modules, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, logits(decoder, SkipPlan.of_layers([2]), tokens), atol=0.01)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_with_the_output_embedding(
    packed: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose rows can be had where it is not packed, or is the input embedding, too."""
    if not packed:
        monkeypatch.setattr(Packing, "create", staticmethod(lambda model, layers: None))
    config = tiny.CONFIGS["llama"]()
    config.vocab_size, config.tie_word_embeddings = 1600, tied
    decoder = Decoder(tiny.build(config))
    assert decoder.packed == packed
    tokens = tiny.prompt(9, vocabulary=1600)
    fused = logits(decoder, INT4, tokens)
    with decoder.stack.watching():
        torch.testing.assert_close(logits(decoder, INT4, tokens), fused, rtol=1e-3, atol=1e-3)
    heads = [each for each in decoder.stack.int4._made.values() if isinstance(each, Int4Head)]
    assert len(heads) == (1 if tied or not packed else 0)
    text = Generation(
        decoder, GenerationRequest(tokens, 16), proposer=SkipProposer(decoder, INT4, 4, 0.0)
    )
    accepted = sum(step.accepted for step in tiny.steps_of(text))
    assert text.output == tiny.generated(decoder, tokens, 16)
    assert accepted > 4


@settings(max_examples=60)
@given(
    family=st.sampled_from(["llama", "gemma2", "gpt-neox", "mixtral", "qwen3"]),
    attention=st.sets(st.integers(1, tiny.DEPTH - 2)),
    size=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    seed=st.integers(0, 100),
)
def test_texts_stay_the_models_own(
    family: str, attention: set[int], size: int, temperature: float, seed: int
) -> None:
    decoder = tiny.decoder(family)
    plan = SkipPlan.of(attention, (), "int4")
    tiny.keeps_its_text(decoder, plan, size, temperature, seed)


def test_in_bfloat16_and_in_batches() -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"](), dtype=torch.bfloat16))
    proposer = MixedProposer(decoder, INT4, simulated.costs(0.05, 0.001), ngram=False, max_tokens=5)
    prompts = [tiny.prompt(length, length) for length in (3, 9, 5)]
    vanilla, batch = (
        Batch(decoder, [GenerationRequest(p, 16, SamplingParams()) for p in prompts], proposer=each)
        for each in (None, proposer)
    )
    vanilla.run()
    batch.run()
    assert batch.outputs == vanilla.outputs
    assert sum(step.accepted for steps in batch.steps for step in steps) > 10


def test_what_decides_never_uses_them() -> None:
    """The cache behind drafts and their verification is the whole model's."""
    decoder, prompt = Decoder(tiny.build(tiny.CONFIGS["llama"]())), tiny.prompt(6)
    kept: list[KVCache] = []
    make = decoder.new_cache
    decoder.new_cache = lambda *sizes: kept.append(make(*sizes)) or kept[-1]  # type: ignore
    text = Generation(
        decoder, GenerationRequest(prompt, 12), proposer=SkipProposer(decoder, INT4, 3, 0.0)
    )
    tiny.steps_of(text)
    whole = [*prompt, *text.output][:-1]
    fresh = make(len(whole))
    decoder.prefill(torch.tensor([whole]), fresh)
    for one, other in zip(kept[0].layers, fresh.layers, strict=True):
        ours, theirs = (layer.keys[:, :, : len(whole)] for layer in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_plan_that_leaves_out_nothing_is_not_empty() -> None:
    """A plan with rounded weights is not the empty plan, and another than the same without."""
    assert INT4 and len(INT4) == 0 and SkipPlan() != INT4
    assert SkipPlan.of([1], weights="int4") != SkipPlan.of([1])
    with pytest.raises(ValueError, match="weights: int4 or none"):
        SkipPlan(weights="int3")  # type: ignore[arg-type]


def _no_kernel(*arguments: object) -> None:
    raise RuntimeError("no such kernel")


def test_without_a_kernel_drafts_use_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_linear, "_pack_codes", _no_kernel)
    decoder, tokens = Decoder(tiny.build(tiny.CONFIGS["llama"]())), tiny.prompt(9)
    assert decoder.stack.int4.reason == (
        "PyTorch's kernel for four-bit weights does not run here: no such kernel"
    )
    assert not decoder.stack.int4.worthwhile
    own = SkipPlan.of_layers([2])
    expected = logits(decoder, own, tokens)
    for watched in (False, True):
        decoder.stack.watched += watched
        rounded_plan = SkipPlan(own.attention, own.mlp, weights="int4")
        torch.testing.assert_close(logits(decoder, rounded_plan, tokens), expected)
    decoder.stack.watched = 0
    costs = measure_costs(decoder, context=8, rounds=1, int4=True)
    assert not costs.has_int4
    assert costs.draft_cost(INT4, 5) == costs.draft_cost(SkipPlan(), 5) > 0


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int4_linear._pack_codes
    monkeypatch.setattr(int4_linear, "_pack_codes", lambda codes, cpu: right(codes ^ 1, cpu))
    reason = Decoder(tiny.build(tiny.CONFIGS["llama"]())).stack.int4.reason
    assert reason == "PyTorch's kernel for four-bit weights gives something else here"


def test_models_that_have_nothing_to_round() -> None:
    reason = tiny.decoder("gpt2").stack.int4.reason
    assert reason == "the layers have no plain weights of shapes that four-bit kernels take"


@pytest.mark.parametrize(
    "device, dtype, word",
    [("meta", torch.float32, "on meta"), ("cuda", torch.float16, "takes bfloat16 alone")],
)
def test_devices_that_have_no_kernel(device: str, dtype: torch.dtype, word: str) -> None:
    class Elsewhere(nn.Module):
        device: torch.device
        dtype: torch.dtype

    model = Elsewhere()
    model.device, model.dtype = torch.device(device), dtype
    reason = int4_linear.Int4Weights(model, ()).reason
    assert reason is not None and word in reason


def test_only_large_models_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")
    assert not decoder.stack.int4.worthwhile
    monkeypatch.setattr(int4_linear, "MIN_MODEL_BYTES", 1000)
    assert decoder.stack.int4.worthwhile


def test_their_costs_are_measured_where_somebody_asks(tmp_path: Any) -> None:
    decoder = tiny.decoder("llama")
    costs = measure_costs(decoder, context=8, rounds=2, int4=True)
    assert costs.has_int4  # how much is floor depends on the moment's noise
    whole = costs.draft_cost(INT4, tiny.DEPTH)
    layers = tiny.DEPTH * (costs.int4_attention + costs.int4_mlp)
    assert whole == pytest.approx(costs.int4_floor + layers)
    less = costs.draft_cost(SkipPlan.of([1], [1, 2], weights="int4"), tiny.DEPTH)
    assert whole - less == pytest.approx(costs.int4_attention + 2 * costs.int4_mlp)
    longer = costs.at(800, tiny.DEPTH)
    assert longer.int4_attention - costs.int4_attention == pytest.approx(
        longer.attention - costs.attention
    )

    def asked(wanted: bool) -> tuple[tuple[int, ...], bool]:
        found = cost_table(decoder, model_key="m", cache_folder=tmp_path, int4=wanted)
        return found.measured, found.table.by_batch[1].has_int4

    assert asked(False) == ((1,), False)
    assert asked(True) == ((1,), True)  # they were not known
    assert asked(True) == asked(False) == ((), True)


def test_drafts_read_no_more_keys_than_they_have_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides reads them in extents that keep its bits the same; guesses needn't."""
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"](), dtype=torch.bfloat16))
    extents: list[int] = []
    run = decoder.passes.run

    def noted(inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, extent: int) -> Any:
        extents.append(extent)
        return run(inputs, cache, plan, keep, extent)

    monkeypatch.setattr(decoder.passes, "run", noted)
    cache = decoder.new_cache(200)
    decoder.prefill(torch.tensor([tiny.prompt(70)]), cache)
    for plan in (INT4, SkipPlan.of_layers([2]), SkipPlan()):
        decoder.forward(torch.tensor([[1]]), torch.tensor([[70]]), cache, plan)
    assert extents == [512, 128, 128, 512]
