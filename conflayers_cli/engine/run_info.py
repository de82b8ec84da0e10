"""How a model is run, in sentences for people and in figures for result files."""

from __future__ import annotations

from typing import Any

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import MAX_WIDTH


def run_notes(decoder: Decoder) -> tuple[str, ...]:
    """Sentences for people; none where all is as usual."""
    notes = []
    if decoder.device.type == "cpu":
        because = f" ({decoder.no_native})" if decoder.no_native else ""
        notes.append(f"kernels: {decoder.kernels}{because}")
    runner, on_cpu = decoder.runner, decoder.device.type == "cpu"
    if runner.reason is None:
        notes.append(f"passes of up to {MAX_WIDTH} tokens replayed ({runner.graphs} recorded)")
    elif not on_cpu:
        notes.append(f"passes launched one by one: {runner.reason}")
    if not on_cpu:
        notes += [f"could not be used: {disabled}" for disabled in decoder.disabled_paths]
    if decoder.inexact:
        notes.append(
            decoder.exactness_note
            or "not exact to the bit: kernels here round by the number of rows, so drafts may part "
            "the text from vanilla's where two tokens are as good as equal"
        )
    if decoder.compilation is not None:
        notes.append(decoder.compilation.reason)
    return tuple(notes)


def run_details(decoder: Decoder) -> dict[str, Any]:
    """The same for result files."""
    compilation, fused = decoder.compilation, decoder.passes.fused
    return {
        "replayed": decoder.runner.reason is None,
        "graphs": decoder.runner.graphs,
        "one_by_one_because": decoder.runner.reason,
        "forward": decoder.kernels,
        "no_native": decoder.no_native,
        "attention_kernel": decoder.passes.flash and fused is not None,
        "setbacks": list(decoder.disabled_paths),
        "rows_at_least": decoder.invariance.min_rows,
        "exact_to_the_bit": not decoder.inexact
        and (decoder.invariance.bitwise or decoder.dtype == torch.float32),
        "compiled": compilation is not None and compilation.used,
        "compile_seconds": compilation.seconds if compilation else None,
    }
