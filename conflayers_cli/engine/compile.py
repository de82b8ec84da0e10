"""Compiling a model's forward, where that is right and measures faster."""

from __future__ import annotations

import time

import torch

from conflayers_cli.engine.batch_invariance import NOT_INVARIANT
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.compiled_forward import CompiledForward, CompileResult
from conflayers_cli.kernels.fused_forward import FusedForward
from conflayers_cli.utils.error_text import first_line

STEPS, CONTEXT = 12, 64


def compile_forward(decoder: Decoder, backend: str = "inductor") -> CompileResult:
    """Compile a decoder's fused forward, and use that from now on if it gives the model's logits
    and a step of one token takes less time. The result is also kept by the decoder.
    """
    decoder.compilation = _compiled(decoder, backend)
    return decoder.compilation


def _compiled(decoder: Decoder, backend: str) -> CompileResult:
    plain = decoder.passes.fused
    if plain is None:
        return CompileResult(False, "not compiled: this model's layers are not known here")
    if decoder.packed or not isinstance(plain, FusedForward):
        return CompileResult(False, "not compiled: on the CPU packed weights are used instead")
    before = _step_seconds(decoder)
    begin = time.perf_counter()
    try:
        forward = CompiledForward(decoder.model, decoder.stack.layers, decoder.config, backend)
        if not decoder.agrees(forward):
            return CompileResult(False, "not compiled: the compiled forward gave other logits")
        use_forward(decoder, forward)
        after = _step_seconds(decoder)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        use_forward(decoder, plain)
        return CompileResult(False, f"not compiled: {first_line(error)}")
    took = time.perf_counter() - begin
    measured = f"a compiled step takes {after / before:.2f} of the other's time (measured)"
    if after >= before:
        use_forward(decoder, plain)
        return CompileResult(False, f"not compiled: {measured}", took)
    if decoder.invariance.bitwise:
        # The compiler makes a kernel for every shape, each with an order of additions of its own.
        decoder.invariance, decoder.inexact = NOT_INVARIANT, True
        decoder.runner.forget()
    return CompileResult(True, f"compiled in {forward.seconds:.1f} s: {measured}", took)


def use_forward(decoder: Decoder, forward: FusedForward) -> None:
    """Run passes by another forward from now on; recorded passes are dropped."""
    decoder.passes.fused = forward
    decoder.runner.forget()


def _step_seconds(decoder: Decoder) -> float:
    """Of a pass of one token: the lower quartile, since other work only adds time."""
    cache = decoder.new_cache(CONTEXT + 1)
    decoder.prefill(torch.arange(CONTEXT)[None] % decoder.vocabulary, cache)
    times = []
    for number in range(decoder.runner.warm_ups + 1 + STEPS):
        begin = time.perf_counter()
        logits = decoder.forward(torch.tensor([[0]]), torch.tensor([[CONTEXT]]), cache)
        int(logits[0, -1, 0])  # waits for the device
        if number > decoder.runner.warm_ups:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4]
