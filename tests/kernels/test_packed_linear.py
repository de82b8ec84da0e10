"""Packed weights: the same products, the same bits back, no second copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels import packed_linear
from conflayers_cli.kernels.packed_linear import MergedLinearPart, PackedWeight, Packing
from tests import tiny

pytestmark = [
    pytest.mark.usefixtures("without_native"),
    pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
    ),
]


def linears(*sizes: int, inputs: int = 48, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(sum(sizes))
    return [nn.Linear(inputs, size, bias=bias).requires_grad_(False) for size in sizes]


def test_merged_products_are_each_layers_own() -> None:
    layers = linears(32, 16, 16, bias=True)
    x, y = torch.randn(3, 48), torch.randn(3, 48)
    expected = [[layer(rows) for layer in layers] for rows in (x, y)]
    packed = PackedWeight(layers)
    stand_ins = [MergedLinearPart(packed, i) for i in range(3)]
    torch.testing.assert_close([s(x) for s in stand_ins], expected[0])
    # in any order, for other rows each time, or one of them alone
    assert torch.allclose(stand_ins[2](y), expected[1][2], atol=1e-6)
    assert torch.allclose(stand_ins[0](x), expected[0][0], atol=1e-6)
    assert torch.allclose(stand_ins[0](y), expected[1][0], atol=1e-6)
    assert torch.allclose(stand_ins[1](x), expected[0][1], atol=1e-6)


def test_the_last_layer_asked_leaves_no_product_behind() -> None:
    packed = PackedWeight(linears(32, 16))
    x = torch.randn(2, 48)
    packed.part(x, 0)
    packed.part(x, 1)
    assert packed._last is None


@settings(max_examples=25)
@given(
    inputs=st.sampled_from([48, 192, 576, 1536]),
    outputs=st.sampled_from([32, 192, 960]),
    rows=st.integers(2, 40),
    first=st.integers(0, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_rows_bits_do_not_depend_on_the_others(
    inputs: int, outputs: int, rows: int, first: int, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 products here")
    packed = PackedWeight([layer.to(dtype) for layer in linears(outputs, inputs=inputs)])
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(48, inputs, generator=generator).to(dtype)
    part = x[first : first + rows].contiguous()
    assert torch.equal(packed(part), packed(x)[first : first + rows])


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_come_back_to_the_bit_and_go_again(tied: bool) -> None:
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    model = tiny.build(config)
    before = weights(model)
    decoder = Decoder(model)
    layer = model.model.layers[1]
    assert isinstance(layer.self_attn.q_proj, MergedLinearPart)
    assert isinstance(model.lm_head, MergedLinearPart)
    held = sum(p.numel() for p in model.parameters())
    packed = [layer.self_attn.q_proj.merged, layer.mlp.down_proj.merged]
    assert all(linear.weight.numel() == 0 for each in packed for linear in each.linears)
    assert held < sum(weight.numel() for weight in before.values()) / 3
    with decoder.plain():
        after = weights(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        if tied:
            assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(layer.self_attn.q_proj, MergedLinearPart)
    assert sum(p.numel() for p in model.parameters()) == held


def test_an_error_while_unpacked_leaves_the_model_packed() -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    with pytest.raises(ZeroDivisionError), decoder.plain():
        raise ZeroDivisionError
    assert isinstance(decoder.model.model.layers[0].mlp.up_proj, MergedLinearPart)
    assert len(tiny.generated(decoder, [1, 2, 3], 4)) == 4


def test_a_second_decoder_of_a_model_unpacks_it_too() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    before = weights(model)
    Decoder(model)
    with Decoder(model).plain():
        assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())


class Scaled(nn.Linear):
    """Computes more than its weight says."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(rows)


def test_layers_that_are_more_than_their_weights_are_left_alone() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        plain = getattr(attention, name)
        own = Scaled(plain.in_features, plain.out_features, bias=False)
        own.weight = plain.weight
        setattr(attention, name, own)
    with torch.inference_mode():
        expected = model(torch.arange(9)[None]).logits
    decoder = Decoder(model)
    assert isinstance(attention.q_proj, Scaled) and isinstance(attention.o_proj, MergedLinearPart)
    assert decoder.passes.fused is not None  # which runs them as they are
    positions = torch.arange(9)[None]
    logits = decoder.forward(positions, positions, decoder.new_cache(9))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_stands_in_two_places_is_left_alone() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    layers = model.model.layers
    layers[2].mlp.down_proj = layers[1].mlp.down_proj
    decoder = Decoder(model)
    assert type(layers[1].mlp.down_proj) is type(layers[2].mlp.down_proj) is nn.Linear
    assert len(tiny.generated(decoder, [1, 2, 3], 4)) == 4


def test_what_cannot_be_packed_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    right, packed = packed_linear._reorder, 0

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        nonlocal packed
        packed += 1
        if packed > 5:
            raise NotImplementedError("no such kernel")
        return right(weight)

    monkeypatch.setattr(packed_linear, "_reorder", reorder)
    model = tiny.build(tiny.CONFIGS["llama"]())
    before = weights(model)
    decoder = Decoder(model)
    assert packed == 6
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    assert len(tiny.generated(decoder, [1, 2, 3], 4)) == 4


def test_a_packed_model_can_be_copied() -> None:
    model = tiny.build(tiny.CONFIGS["qwen2"]())
    before = weights(model)
    decoder = Decoder(model)
    other = Decoder(copy.deepcopy(model))
    with other.plain():
        assert all(torch.equal(before[name], w) for name, w in weights(other.model).items())
        assert isinstance(decoder.model.model.layers[0].mlp.up_proj, MergedLinearPart)
    assert tiny.generated(other, [1, 2, 3], 6) == tiny.generated(decoder, [1, 2, 3], 6)


def test_a_model_that_is_slower_packed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_WORTH_MEASURING", 0)
    clock = iter(range(10_000))

    def seconds(products: Any, rows: Any) -> float:
        next(clock)
        return 1.0 + 0.2 * isinstance(products[0], PackedWeight)

    monkeypatch.setattr(packed_linear, "_seconds", seconds)
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    assert next(clock) > 0  # it was measured
    assert isinstance(decoder.model.model.layers[0].mlp.up_proj, nn.Linear)
    assert len(tiny.generated(decoder, [1, 2, 3], 4)) == 4


def test_a_model_whose_packed_products_are_wrong_gets_its_own_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = PackedWeight.__call__
    monkeypatch.setattr(PackedWeight, "__call__", lambda self, rows: right(self, rows).neg())
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    assert isinstance(decoder.model.model.layers[0].mlp.up_proj, nn.Linear)
    assert Packing.create(decoder.model, ()) is None
    cache = decoder.new_cache(8)
    logits = decoder.prefill(torch.tensor([[1, 2, 3]]), cache)
    with decoder.plain() as model, torch.inference_mode():
        torch.testing.assert_close(logits[0, 0], model(torch.tensor([[1, 2, 3]])).logits[0, -1])
