"""The fused forward gives what the modules give, under any plan, and only where it does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine import kernel_choice
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.fused_forward import FAMILIES, FusedForward
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native")

FUSED = [f for f in tiny.FAMILIES if tiny.CONFIGS[f]().model_type in FAMILIES]
MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))


def test_the_families_are_those_meant() -> None:
    assert set(FUSED) == {"llama", "mistral", "qwen2", "qwen2-mixed", "qwen3", "phi3", "olmo2"}
    for family in tiny.FAMILIES:
        assert (tiny.decoder(family).passes.fused is not None) == (family in FUSED), family


def both(
    decoder: Decoder, tokens: torch.Tensor, positions: torch.Tensor, plan: SkipPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the fused forward and by the modules, on top of a prompt of the same tokens."""
    logits = []
    length = int(positions.min())
    prompt = torch.randint(
        tiny.VOCABULARY, (tokens.shape[0], length), generator=torch.Generator().manual_seed(1)
    )
    for watched in (False, True):
        cache = decoder.new_cache(64, batch=tokens.shape[0])
        decoder.stack.watched += watched
        try:
            decoder.prefill(prompt, cache)
            logits.append(decoder.forward(tokens, positions, cache, plan))
        finally:
            decoder.stack.watched -= watched
    return logits[0], logits[1]


@settings(max_examples=40)
@given(
    family=st.sampled_from(FUSED),
    plan=st.builds(SkipPlan.of, MIDDLE, MIDDLE),
    rows=st.integers(1, 3),
    width=st.integers(1, 9),
    length=st.integers(1, 20),
)
def test_fused_is_what_the_modules_say(
    family: str, plan: SkipPlan, rows: int, width: int, length: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randint(tiny.VOCABULARY, (rows, width), generator=generator)
    starts = torch.arange(rows)[:, None]  # every row at a place of its own
    positions = length + starts + torch.arange(width)
    fused, modules = both(tiny.decoder(family), tokens, positions, plan)
    torch.testing.assert_close(fused, modules, rtol=1e-4, atol=1e-4)


def test_plain_weights_are_joined_without_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packing, "create", staticmethod(lambda model, layers: None))
    decoder = Decoder(tiny.build(tiny.CONFIGS["qwen2"]()))  # with biases
    attention = decoder.model.model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1
    positions = torch.arange(4, 9)[None]
    fused, modules = both(decoder, torch.arange(5)[None], positions, SkipPlan.of([2], [1]))
    torch.testing.assert_close(fused, modules, rtol=1e-4, atol=1e-4)
    assert len(tiny.generated(decoder, [1, 2, 3], 4)) == 4


def test_whoever_watches_the_modules_sees_them_run() -> None:
    decoder = tiny.decoder("llama")
    seen = []
    tokens = torch.arange(3)[None]
    with decoder.observing(lambda kind, layer, output: seen.append((kind, layer))):
        decoder.forward(tokens, tokens, decoder.new_cache(8))
    assert len(seen) == 2 * tiny.DEPTH
    decoder.forward(tokens, tokens, decoder.new_cache(8))
    assert len(seen) == 2 * tiny.DEPTH


def test_a_fused_forward_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedForward._mlp
    monkeypatch.setattr(FusedForward, "_mlp", lambda self, layer, x: right(self, layer, x).neg())
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    assert decoder.passes.fused is None
    tokens = torch.arange(6)[None]
    logits = decoder.forward(tokens, tokens, decoder.new_cache(8))
    with decoder.plain() as model, torch.inference_mode():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_model_put_together_otherwise_is_run_by_its_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_choice, "FAMILIES", FAMILIES | {"gpt2", "gemma3_text", "mixtral"})
    for family in ("gpt2", "gemma3", "mixtral"):
        assert Decoder(tiny.build(tiny.CONFIGS[family]())).passes.fused is None
