"""What is worth knowing about how a model is run, in sentences and in figures."""

from __future__ import annotations

from typing import Any

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import MOST_WIDTH


def remarks(decoder: Decoder) -> tuple[str, ...]:
    """Sentences for people; none where all is as usual."""
    told = []
    runner = decoder.runner
    if runner.reason is None:
        told.append(f"passes of up to {MOST_WIDTH} tokens replayed ({runner.graphs} recorded)")
    elif decoder.device.type != "cpu":
        told.append(f"passes launched one by one: {runner.reason}")
    if decoder.device.type != "cpu":
        told += [f"could not be used: {disabled}" for disabled in decoder.disabled_paths]
    if decoder.inexact:
        told.append(
            decoder.exactness_note
            or "not exact to the bit: kernels here round by the number of rows, so drafts may part "
            "the text from vanilla's where two tokens are as good as equal"
        )
    if decoder.compilation is not None:
        told.append(decoder.compilation.reason)
    return tuple(told)


def run_facts(decoder: Decoder) -> dict[str, Any]:
    """The same for result files."""
    compilation = decoder.compilation
    return {
        "replayed": decoder.runner.reason is None,
        "graphs": decoder.runner.graphs,
        "one_by_one_because": decoder.runner.reason,
        "forward": _forward(decoder),
        "attention_kernel": decoder.passes.flash and decoder.passes.fused is not None,
        "setbacks": list(decoder.disabled_paths),
        "rows_at_least": decoder.invariance.min_rows,
        "exact_to_the_bit": not decoder.inexact
        and (decoder.invariance.bitwise or decoder.dtype == torch.float32),
        "compiled": compilation is not None and compilation.used,
        "compile_seconds": compilation.seconds if compilation else None,
    }


def _forward(decoder: Decoder) -> str:
    forward = decoder.passes.fused
    return "modules" if forward is None else type(forward).__name__
