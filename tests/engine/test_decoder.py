"""The decoder beyond plain passes: plans, restoring, chunks, observing, plain attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import MistralConfig

from conflayers_cli.engine import decoder as decoder_module
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

WHOLE, SUB_LAYERS = SkipPlan.of_layers([1, 3]), SkipPlan.of([1], [2, 3])
TOKENS = torch.tensor([tiny.prompt(24, 3)])


def forward(decoder: Decoder, plan: SkipPlan = decoder_module.FULL) -> torch.Tensor:
    count = TOKENS.shape[1]
    return decoder.forward(TOKENS, torch.arange(count)[None], decoder.new_cache(count), plan)


def table(decoder: Decoder) -> list[tuple[str, nn.Module]]:
    """All modules by name, and the list of layers as it is iterated."""
    layers = decoder.model.get_decoder().layers
    return [*decoder.model.named_modules(), *((str(i), layer) for i, layer in enumerate(layers))]


@pytest.mark.parametrize("plan", [WHOLE, SUB_LAYERS])
def test_a_plan_leaves_out_what_it_names(plan: SkipPlan) -> None:
    """The same as removing each sub-layer's contribution from the residual stream by a hook."""
    decoder = tiny.decoder("llama")
    got = forward(decoder, plan)
    named = [("attention", i) for i in plan.attention] + [("mlp", i) for i in plan.mlp]
    handles = []
    for kind, i in named:
        module = decoder.stack.sub_layer(kind, i)  # type: ignore[arg-type]
        assert module is not None
        handles.append(module.register_forward_hook(_nothing))
    try:
        with decoder.stack.watching():
            expected = forward(decoder)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - forward(decoder)).abs().max() > 0.1  # leaving them out matters


def _nothing(module: nn.Module, args: object, output: object) -> object:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    assert isinstance(output, torch.Tensor)
    return torch.zeros_like(output)


@pytest.mark.parametrize("plan", [WHOLE, SUB_LAYERS])
def test_modules_are_back_after_a_plan(plan: SkipPlan) -> None:
    decoder = tiny.decoder("llama")
    before, logits = table(decoder), forward(decoder)
    with decoder.stack.without(plan):
        assert table(decoder) != before
    assert table(decoder) == before
    forward(decoder, plan)
    assert table(decoder) == before
    assert torch.equal(forward(decoder), logits)


@pytest.mark.parametrize("plan", [WHOLE, SUB_LAYERS])
def test_modules_are_back_after_an_error(plan: SkipPlan) -> None:
    decoder = tiny.decoder("llama")
    before, logits = table(decoder), forward(decoder)
    watched = decoder.stack.watched

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    handle = decoder.stack.layers[4].register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt), decoder.stack.watching():
            forward(decoder, plan)
    finally:
        handle.remove()
    assert table(decoder) == before
    assert decoder.stack.watched == watched
    assert torch.equal(forward(decoder), logits)


@pytest.mark.parametrize(
    ("family", "plan", "reason"),
    [
        ("llama", SkipPlan.of_layers([0]), "the first and the last never"),
        ("llama", SkipPlan(mlp=(4,)), "the first and the last never"),
        ("llama", SkipPlan(attention=(9,)), "a model with 5 layers"),
        ("opt", SkipPlan.of([1, 2], [2]), "only whole layers; layers 1 name"),
    ],
)
def test_plans_that_do_not_fit_are_refused(family: str, plan: SkipPlan, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tiny.decoder(family).check_plan(plan)


@pytest.mark.parametrize(("family", "plan"), [("llama", SUB_LAYERS), ("opt", WHOLE)])
def test_plans_that_fit_are_not(family: str, plan: SkipPlan) -> None:
    tiny.decoder(family).check_plan(plan)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_prefill_in_chunks(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder(family)
    expected = forward(decoder)[:, -1:]
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(decoder_module, "MIN_CHUNK", 1)
    assert decoder.chunk_for(24) == chunk
    logits = decoder.prefill(TOKENS, decoder.new_cache(24))
    assert logits.shape == (1, 1, tiny.VOCABULARY)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_long_prompts_go_in_smaller_chunks() -> None:
    decoder = tiny.decoder("llama")  # two query heads per key head
    assert decoder.chunk_for(1) == decoder.chunk_for(4096) == decoder_module.PREFILL_CHUNK
    assert decoder.chunk_for(16_384) == 128
    assert decoder.chunk_for(1_000_000) == decoder_module.MIN_CHUNK


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_cache_is_allocated_at_once(family: str) -> None:
    """As large as the passes would have made it, layer by layer."""
    decoder = tiny.decoder(family)
    cache = decoder.new_cache(700, batch=2)
    held = cache.bytes
    decoder.prefill(TOKENS.expand(2, -1), cache)
    assert (
        cache.bytes
        == held
        == 2
        * sum(
            layer.keys.shape[1] * layer.keys.shape[3]
            + layer.values.shape[1] * layer.values.shape[3]
            for layer in cache.layers
        )
        * 1024
        * 4
    )


def test_prefill_on_top_of_what_is_there() -> None:
    decoder = tiny.decoder("mistral")
    cache = decoder.new_cache(24)
    decoder.prefill(TOKENS[:, :10], cache)
    logits = decoder.prefill(TOKENS[:, 10:], cache, start=10)
    torch.testing.assert_close(logits, forward(decoder)[:, -1:], rtol=1e-4, atol=1e-4)


def test_long_texts_pass_the_first_extent() -> None:
    """The extent grows with the text; the logits stay the model's own."""
    model = tiny.build(MistralConfig(**{**tiny.LLAMA_LIKE, "max_position_embeddings": 600}))
    decoder = Decoder(model)
    tokens = torch.tensor([tiny.prompt(530, 1)])
    cache = decoder.new_cache(530)
    decoder.prefill(tokens[:, :250], cache)
    step = decoder.prefill(tokens[:, 250:260], cache, start=250)
    last = decoder.prefill(tokens[:, 260:], cache, start=260)
    with decoder.plain() as plain, torch.inference_mode():
        expected = plain(tokens, use_cache=False).logits
    torch.testing.assert_close(step, expected[:, 259:260], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


def test_observing_shows_what_is_added_to_the_residual_stream() -> None:
    decoder = tiny.decoder("llama")
    shown: dict[tuple[str, int], torch.Tensor] = {}

    def note(kind: str, layer: int, output: torch.Tensor) -> None:
        assert (kind, layer) not in shown
        shown[kind, layer] = output

    with decoder.observing(note):
        logits = forward(decoder)
    assert set(shown) == {(kind, i) for kind in ("attention", "mlp") for i in range(tiny.DEPTH)}
    inner = decoder.model.get_decoder()
    stream = inner.embed_tokens(TOKENS) + torch.stack(list(shown.values())).sum(0)
    expected = decoder.model.lm_head(inner.norm(stream))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    shown.clear()
    forward(decoder)
    assert not shown


def test_observing_does_not_show_what_is_left_out() -> None:
    decoder = tiny.decoder("llama")
    shown: list[tuple[str, int]] = []
    with decoder.observing(lambda kind, layer, output: shown.append((kind, layer))):
        forward(decoder, SUB_LAYERS)
    assert set(shown) == {("attention", i) for i in (0, 2, 3, 4)} | {("mlp", i) for i in (0, 1, 4)}


@pytest.fixture
def fresh() -> Iterator[Decoder]:
    yield Decoder(tiny.build(tiny.CONFIGS["llama"]()))


def test_plain_gives_the_models_own_attention_and_takes_it_back(fresh: Decoder) -> None:
    assert fresh.model.config._attn_implementation == "conflayers"
    with pytest.raises(KeyboardInterrupt), fresh.plain() as model:
        assert model is fresh.model
        assert model.config._attn_implementation == "sdpa"
        raise KeyboardInterrupt
    assert fresh.model.config._attn_implementation == "conflayers"


def test_a_second_decoder_of_a_model_knows_its_own_attention_too(fresh: Decoder) -> None:
    with Decoder(fresh.model).plain() as model:
        assert model.config._attn_implementation == "sdpa"
