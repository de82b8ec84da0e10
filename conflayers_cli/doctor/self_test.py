"""A tiny random model, decoded in every way there is here, and the texts compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.run_info import run_facts
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer

TOKENS = 48
_VOCABULARY = 512
_PROMPT = (17, 401, 3, 256, 88, 88, 19, 230, 5, 77)
_DRAFTED = 4


@dataclass(frozen=True)
class Outcome:
    """What came of decoding the tiny model.

    Attributes:
        told: what was done and found, in a sentence.
        problem: what does not work; None: all does.
    """

    told: str
    problem: str | None = None


def check_decoding(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Decode plainly and with drafts on a device; the texts have to be the same.

    Raises:
        whatever building or running the model raises.
    """
    return compared(Decoder(tiny_model(device, dtype)))


def compared(decoder: Decoder) -> Outcome:
    """Decode a text with a decoder, plainly and with layers left out while drafting."""
    name = f"{decoder.device}, {str(decoder.dtype).removeprefix('torch.')}"
    vanilla, _ = _decoded(decoder, None)
    plan = SkipPlan.of_layers([1, 2])
    drafted, accepted = _decoded(decoder, SkipProposer(decoder, plan, _DRAFTED, 0.0))
    told = f"{name}: {TOKENS} tokens decoded plainly and with drafts ({accepted} accepted)"
    if drafted == vanilla:
        return Outcome(f"{told}: the same")
    at = next(i for i, (a, b) in enumerate(zip(vanilla, drafted, strict=True)) if a != b)
    if decoder.inexact:
        why = decoder.exactness_note or "kernels here round by the number of rows"
        return Outcome(f"{told}: parted at token {at}, as {why}")
    return Outcome(told, f"{name}: drafts change the text (token {at}): please report this")


def check_gpu(device: torch.device, dtype: torch.dtype) -> list[Outcome]:
    """The same on a GPU, and whether its quick ways work: graphs, kernels, each against plain
    passes launched one by one.

    Raises:
        whatever building or running the model raises.
    """
    model = tiny_model(device, dtype)
    eager = Decoder(model, eager="it is compared with")
    expected, _ = _decoded(eager, None)
    quick = Decoder(tiny_model(device, dtype))
    return [compared(quick), *ways(quick, eager, expected)]


def ways(quick: Decoder, eager: Decoder, expected: list[int]) -> list[Outcome]:
    """What a decoder on a GPU makes use of, and whether it gives the eager one's text.

    Args:
        quick: records passes, with kernels.
        eager: of the same weights, launches them one by one.
        expected: the tokens that ``eager`` decodes.
    """
    found = run_facts(quick)
    outcomes = []
    if found["replayed"]:
        text, _ = _decoded(quick, None)
        same = text == expected
        told = f"passes are replayed ({run_facts(quick)['graphs']} recorded)"
        problem = f"{quick.device}: replayed passes give another text: please report this"
        exact = not (quick.inexact or eager.inexact)
        outcomes.append(Outcome(told, None if same or not exact else problem))
    else:
        reason = found["one_by_one_because"]
        outcomes.append(Outcome("passes are launched one by one", f"no graphs: {reason}"))
    kernels = "with" if found["attention_kernel"] else "without"
    told = f"passes run by {found['forward']}, {kernels} the attention kernel"
    setbacks = "; ".join(found["setbacks"])
    outcomes.append(Outcome(told, f"kernels failed: {setbacks}" if setbacks else None))
    return outcomes


def tiny_model(device: torch.device, dtype: torch.dtype) -> Any:
    """Six layers, hidden size 64; the same weights on every call."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:  # large enough that texts don't settle into one token
            spread = 1.0 if "embed" in name else 0.06
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model.to(device=device, dtype=dtype)


def _decoded(decoder: Decoder, drafter: Proposer | None) -> tuple[list[int], int]:
    """(the tokens decoded, how many drafts were accepted)."""
    generation = Generation(decoder, GenerationRequest(_PROMPT, TOKENS), drafter=drafter)
    accepted = sum(step.accepted for step in generation)
    return generation.output, accepted
