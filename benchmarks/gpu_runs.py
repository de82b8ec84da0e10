"""Single runs: of this engine in one of its ways, and of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.gpu_models import PlantedModel
from conflayers_cli.engine.compile import compile_forward
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.engine.run_info import run_details, run_notes
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.models.builtin import quiet_transformers
from conflayers_cli.spec_decode.proposer import Proposer

Result = dict[str, Any]


@dataclass(frozen=True)
class Decoded:
    """One decoding of a prompt, without the pass that reads it.

    Attributes:
        output: the new tokens, with the first one.
        steps: those behind the prompt's.
        seconds: they took, in all.
    """

    output: tuple[int, ...]
    steps: tuple[Step, ...]
    seconds: float

    @property
    def per_token(self) -> float:
        return self.seconds / max(sum(len(step.tokens) for step in self.steps), 1)

    @property
    def drafted(self) -> int:
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)


def make_decoder(model: Any, runner: str, compiled: bool) -> Decoder:
    """A decoder that launches its passes so.

    Args:
        model: on its device.
        runner: ``eager``: one by one; ``graphs``: recorded, where the device can.
        compiled: have its layers compiled, which is kept only where it is quicker.
    """
    decoder = Decoder(model, eager="as asked for" if runner == "eager" else None)
    if compiled:
        compile_forward(decoder)
    return decoder


def describe_decoder(decoder: Decoder) -> Result:
    """How a decoder runs."""
    forward = decoder.passes.fused
    return {
        **run_details(decoder),
        "forward": None if forward is None else type(forward).__name__,
        "run_notes": list(run_notes(decoder)),
        "int4": decoder.stack.int4.reason or "usable",
    }


def model_facts(model: PlantedModel) -> Result:
    """What a model is, for the results."""
    return {
        "shape": asdict(model.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes_per_token": model.weight_bytes,
        "cache_bytes_per_position": model.position_bytes,
        "planted": asdict(model.planting),
    }


def decode(
    decoder: Decoder, prompt: Sequence[int], count: int, proposer: Proposer | None = None
) -> Decoded:
    """Decode one prompt greedily; nothing ends it early."""
    generation = Generation(decoder, GenerationRequest(prompt, count), proposer=proposer)
    generation.step()
    begin = clock(decoder.device)
    steps = tuple(generation)
    seconds = clock(decoder.device) - begin
    return Decoded(tuple(generation.output), steps, seconds)


class _FirstToken(StoppingCriteria):
    """Notes when `generate` has its first token; stops nothing.

    Only there the device is waited for, so that `generate` runs as far ahead as it may.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.at is None:
            self.at = clock(self._device)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], count: int, **more: Any
) -> tuple[list[list[int]], float]:
    """`model.generate`, greedily, over prompts of one length, with plain weights.

    Args:
        model: with its own attention (`Decoder.plain`).
        count: new tokens.
        more: further settings of `generate`.

    Returns:
        (the new tokens; seconds of a step behind the first token).
    """
    given = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    first = _FirstToken(model.device)
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, **more
    )
    with quiet_transformers():
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([first]),
        )
    end = clock(model.device)
    begin = end if first.at is None else first.at
    return output[:, given.shape[1] :].tolist(), (end - begin) / max(count - 1, 1)
