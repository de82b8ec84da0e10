"""What is compiled gives what the fused forward gives, and is used only where it pays.

The compiler's back end is left out (``aot_eager``): what is compiled here is traced, and runs as it
was traced.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine import compile
from conflayers_cli.engine.compile import compile_forward, use_forward
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.compiled_forward import MAX_SHAPES, CompiledForward
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native")

BACKEND = "aot_eager"
COMPILED = ("llama", "phi3")  # plain, and with joined weights from the start
MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))
WEIGHTS = st.sampled_from([None, "int4"])
PLANS = st.builds(SkipPlan.of, MIDDLE, MIDDLE, weights=WEIGHTS)


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packing, "create", staticmethod(lambda model, layers: None))


def decoder_of(family: str, dtype: torch.dtype = torch.float32, **more: object) -> Decoder:
    model = tiny.build(tiny.CONFIGS[family](), dtype=dtype)
    return Decoder(model, **more)  # type: ignore[arg-type]


def compiled(decoder: Decoder) -> CompiledForward:
    """Its forward, in use from now on."""
    forward = CompiledForward(decoder.model, decoder.stack.layers, decoder.config, BACKEND)
    assert decoder.agrees(forward)
    use_forward(decoder, forward)
    return forward


def output(decoder: Decoder, prompt: list[int], plan: SkipPlan | None = None) -> list[int]:
    proposer = None if plan is None else SkipProposer(decoder, plan, 3, 0.0)
    generation = Generation(decoder, GenerationRequest(prompt, 16), proposer=proposer)
    tiny.steps_of(generation)
    return generation.output


@pytest.mark.parametrize("family", COMPILED)
def test_text_is_the_same(family: str) -> None:
    decoder = decoder_of(family)
    prompt = tiny.prompt(9)
    expected = output(decoder, prompt)
    forward = compiled(decoder)
    assert output(decoder, prompt) == expected
    for plan in (SkipPlan.of_layers([1, 2]), SkipPlan.of([1, 3], [2, 3])):
        assert output(decoder, prompt, plan) == expected
    assert forward.seconds > 0


def test_drafts_keep_bfloat16_text() -> None:
    decoder = decoder_of("qwen2", torch.bfloat16)
    compiled(decoder)
    expected = output(decoder, tiny.prompt(9))
    for plan in (SkipPlan.of_layers([2]), SkipPlan.of([1], [3])):
        assert output(decoder, tiny.prompt(9), plan) == expected


@settings(max_examples=8)
@given(plan=PLANS, width=st.integers(1, 3), length=st.integers(1, 12))
def test_logits(plan: SkipPlan, width: int, length: int) -> None:
    decoder = _one()
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(tiny.VOCABULARY, (1, length), generator=generator)
    tokens = torch.randint(tiny.VOCABULARY, (1, width), generator=generator)
    positions = torch.arange(length, length + width)[None]
    got = []
    for other in (decoder, tiny.decoder("llama")):
        cache = other.new_cache(32)
        other.prefill(prompt, cache)
        got.append(other.forward(tokens, positions, cache, plan))
    torch.testing.assert_close(got[0], got[1], rtol=1e-4, atol=2e-5)


@functools.cache
def _one() -> Decoder:
    """One decoder for all examples: compiling takes long."""
    decoder = decoder_of("llama")
    compiled(decoder)
    return decoder


def test_shapes_beyond_the_most_run_as_they_are() -> None:
    decoder, plain = decoder_of("llama"), tiny.decoder("llama")
    forward = compiled(decoder)
    for width in range(1, MAX_SHAPES + 4):
        tokens = torch.arange(width)[None]
        got, expected = (
            each.forward(tokens, tokens, each.new_cache(32)) for each in (decoder, plain)
        )
        assert torch.allclose(got, expected, atol=2e-5)
    assert len(forward._shapes) == MAX_SHAPES


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_other_families_are_told_so(family: str) -> None:
    decoder = decoder_of(family)
    before = decoder.passes.fused
    compilation = compile_forward(decoder, BACKEND)
    assert not compilation.used
    assert compilation.reason == "not compiled: norms in places that are not compiled"
    assert decoder.passes.fused is before


def test_models_without_a_fused_forward_are_told_so() -> None:
    decoder = decoder_of("gpt2")
    assert compile_forward(decoder).reason.startswith("not compiled: this model's layers")


@pytest.mark.parametrize("quicker", [True, False])
def test_the_quicker_one_is_used(quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("llama")
    before = decoder.passes.fused
    seconds = iter([1.0, 0.5 if quicker else 1.5])
    monkeypatch.setattr(compile, "_step_seconds", lambda decoder: next(seconds))
    compilation = compile_forward(decoder, BACKEND)
    assert compilation.used == quicker
    assert (decoder.passes.fused is before) != quicker
    assert ("a compiled step takes 0.50" if quicker else "takes 1.50") in compilation.reason
    assert decoder.compilation is compilation


def test_steps_are_really_timed() -> None:
    decoder = decoder_of("llama")
    compilation = compile_forward(decoder, BACKEND)
    assert "(measured)" in compilation.reason
    assert compilation.seconds > 0
    assert output(decoder, tiny.prompt(9)) == output(tiny.decoder("llama"), tiny.prompt(9))


def test_a_wrong_forward_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "conflayers_cli.kernels.compiled_forward._mlp", lambda x, norm, gate_up, down: x.neg()
    )
    monkeypatch.setattr(
        "conflayers_cli.kernels.compiled_forward._after_attention_with_mlp",
        lambda x, *more: x.neg(),
    )
    decoder = decoder_of("llama")
    compilation = compile_forward(decoder, BACKEND)
    assert compilation.reason == "not compiled: the compiled forward gave other logits"


def test_a_compiler_that_fails_is_told_of() -> None:
    decoder = decoder_of("llama")
    before = decoder.passes.fused
    compilation = compile_forward(decoder, "no such back end")
    assert not compilation.used
    assert compilation.reason.startswith("not compiled: ")
    assert decoder.passes.fused is before
    assert output(decoder, tiny.prompt(9)) == output(tiny.decoder("llama"), tiny.prompt(9))


def test_packed_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("llama")
    monkeypatch.setattr(Decoder, "packed", True)
    compilation = compile_forward(decoder, BACKEND)
    assert compilation.reason == "not compiled: on the CPU packed weights are used instead"
    assert type(decoder.passes.fused) is not CompiledForward
