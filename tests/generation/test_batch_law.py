"""Sampled texts of a batch, drafted and verified together, have the target's law."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation import sequence
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from tests.engine.law import (
    LENGTH,
    PLAN,
    PROMPT,
    SETTINGS,
    accept_without_residual,
    law,
    model,
)
from tests.engine.rows import SkipRows
from tests.tiny import chi_square

RUNS = 3000
ROWS = 24
OTHER = (5, 1, 7, 7, 2, 4, 0, 3)


class Reader(Decoder):
    """Runs a prompt once; behind it, what it wrote is copied: few prompts, thousands of texts."""

    def __init__(self, model: Any) -> None:
        self._read: dict[tuple[int, ...], tuple[KVCache, torch.Tensor]] = {}
        super().__init__(model)
        self._read.clear()

    def prefill(
        self, tokens: torch.Tensor, cache: KVCache, *, start: int = 0, plan: SkipPlan = FULL
    ) -> torch.Tensor:
        prompt = tuple(tokens[0].tolist())
        if start or plan or not cache.layers[0].is_initialized:
            return super().prefill(tokens, cache, start=start, plan=plan)
        if prompt not in self._read:
            own = self.new_cache(len(prompt))
            self._read[prompt] = own, super().prefill(tokens, own)
        own, logits = self._read[prompt]
        cache.copy_from(own, len(prompt))
        return logits


@functools.cache
def decoder() -> Decoder:
    return Reader(model.__wrapped__())  # one of its own, where the law's is cached


def sample(setting: SamplingParams) -> tuple[Counter[tuple[int, ...]], float]:
    """(counts of the starts behind the prompt, share of drafts kept).

    Every fourth row has another, longer prompt, and texts end at different lengths: so rows of all
    lengths stand side by side.
    """
    requests = [
        GenerationRequest(
            OTHER[: 4 + seed % 5] if seed % 4 == 3 else PROMPT,
            LENGTH + seed % 3,
            SamplingParams(**{**vars(setting), "seed": seed}),
        )
        for seed in range(RUNS)
    ]
    batch = Batch(decoder(), requests, size=ROWS, proposer=SkipRows(decoder(), PLAN, 1))
    batch.run()
    counts = Counter(
        tuple(output[:LENGTH])
        for output, request in zip(batch.outputs, requests, strict=True)
        if request.prompt is PROMPT
    )
    steps = [step for steps in batch.steps for step in steps]
    return counts, sum(s.accepted for s in steps) / sum(s.drafted for s in steps)


@pytest.mark.parametrize("name", ["temperature 0.7", "top-p 0.8", "repetition penalty 1.3"])
def test_the_law_is_the_targets(name: str) -> None:
    counts, share = sample(SETTINGS[name])
    assert 0.2 < share < 0.95
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sample with the residual replaced by p itself."""
    monkeypatch.setattr(sequence, "accept_sampled", accept_without_residual)
    counts, _ = sample(SETTINGS["temperature 0.7"])
    assert chi_square(counts, law(SETTINGS["temperature 0.7"])) < 1e-8
