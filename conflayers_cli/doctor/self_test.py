"""Decoding tests on a tiny random model: plain, with drafts, on a GPU with graphs and kernels."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conflayers_cli.doctor.check_result import CheckResult
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.run_info import run_details
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer

TOKENS = 48
_VOCABULARY = 512
_PROMPT = (17, 401, 3, 256, 88, 88, 19, 230, 5, 77)
_DRAFT_LENGTH = 4
_SECTION = "decoding"


def check_decoding(device: torch.device, dtype: torch.dtype) -> CheckResult:
    """Decode plainly and with drafts on a device, and compare the texts."""
    return _compare_drafted("self test", Decoder(tiny_model(device, dtype)))


def check_gpu(device: torch.device, dtype: torch.dtype) -> list[CheckResult]:
    """The same on a GPU, and graphs and kernels against passes launched one by one."""
    eager = Decoder(tiny_model(device, dtype), eager="it is compared with")
    decoder = Decoder(tiny_model(device, dtype))
    return [_compare_drafted("GPU", decoder), *check_gpu_paths(decoder, eager)]


def _compare_drafted(name: str, decoder: Decoder) -> CheckResult:
    device = f"{decoder.device}, {str(decoder.dtype).removeprefix('torch.')}"
    vanilla, _ = _decoded(decoder, None)
    plan = SkipPlan.of_layers([1, 2])
    drafted, accepted = _decoded(decoder, SkipProposer(decoder, plan, _DRAFT_LENGTH, 0.0))
    message = f"{device}: {TOKENS} tokens decoded plainly and with drafts ({accepted} accepted)"
    if drafted == vanilla:
        return CheckResult(_SECTION, name, f"{message}: the same")
    at = next(i for i, (a, b) in enumerate(zip(vanilla, drafted, strict=True)) if a != b)
    if decoder.inexact:
        why = decoder.exactness_note or "kernels here round by the number of rows"
        return CheckResult(_SECTION, name, f"{message}: parted at token {at}, as {why}")
    problem = f"{device}: drafts change the text (token {at}): please report this"
    return CheckResult(_SECTION, name, message, problem)


def check_gpu_paths(decoder: Decoder, eager: Decoder) -> list[CheckResult]:
    """Which graphs and kernels a decoder uses, and whether it gives the text of ``eager``.

    ``eager`` has the same weights and launches passes one by one.
    """
    name, details = "GPU", run_details(decoder)
    if details["replayed"]:
        same = _decoded(decoder, None)[0] == _decoded(eager, None)[0]
        message = f"passes are replayed ({run_details(decoder)['graphs']} recorded)"
        problem = f"{decoder.device}: replayed passes give another text: please report this"
        forgiven = same or decoder.inexact or eager.inexact
        graphs = CheckResult(_SECTION, name, message, None if forgiven else problem)
    else:
        problem = f"no graphs: {details['one_by_one_because']}"
        graphs = CheckResult(_SECTION, name, "passes are launched one by one", problem)
    used = "with" if details["attention_kernel"] else "without"
    message = f"passes run by {details['forward']}, {used} the attention kernel"
    failures = "; ".join(details["setbacks"])
    kernels = f"kernels failed: {failures}" if failures else None
    return [graphs, CheckResult(_SECTION, name, message, kernels)]


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


def _decoded(decoder: Decoder, proposer: Proposer | None) -> tuple[list[int], int]:
    """(the tokens decoded, how many drafts were accepted)."""
    generation = Generation(decoder, GenerationRequest(_PROMPT, TOKENS), proposer=proposer)
    accepted = sum(step.accepted for step in generation)
    return generation.output, accepted
