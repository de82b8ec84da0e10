"""The ways to decode that a bench compares. Each decodes one prompt and says what it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from conflayers_cli.answer import Summary
from conflayers_cli.engine.batch import Batch, BatchRequest
from conflayers_cli.engine.builtin import quiet_transformers
from conflayers_cli.engine.costs import clock
from conflayers_cli.engine.decode import Generation
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.draft import Drafter
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.engine.sampling import Sampling

SKIP_ONLY = "skip-only"
"""The name of the arm whose output is not the model's own."""


@dataclass(frozen=True)
class Case:
    """One prompt to decode.

    Attributes:
        id: its name.
        category: what kind of prompt it is, if it says so.
        tokens: the prompt's token ids.
        max_new_tokens: the most tokens produced.
        seed: of the random numbers; the same in every arm.
    """

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One decoding of a prompt.

    Attributes:
        tokens: what came out.
        stats: what it took.
        cache_bytes: memory of the keys and values; None where it is not known.
    """

    tokens: tuple[int, ...]
    stats: Summary
    cache_bytes: int | None = None


class Arm(Protocol):
    """A way to decode."""

    @property
    def name(self) -> str: ...

    def run(self, case: Case) -> Run: ...


@dataclass(frozen=True)
class EngineArm:
    """This package's engine: vanilla where ``drafter`` is None."""

    name: str
    decoder: Decoder
    drafter: Drafter | None
    sampling: Sampling
    end_tokens: frozenset[int]

    def run(self, case: Case) -> Run:
        """Decode the prompt once."""
        generation = Generation(
            self.decoder,
            case.tokens,
            max_new_tokens=case.max_new_tokens,
            sampling=replace(self.sampling, seed=case.seed),
            drafter=self.drafter,
            end_tokens=self.end_tokens,
        )
        stats = Summary.of(list(generation))
        return Run(tuple(generation.output), stats, generation.cache.bytes)


@dataclass(frozen=True)
class SkipOnlyArm:
    """The model with layers left out for good behind the prompt: lossy (see `engine.batch`)."""

    decoder: Decoder
    plan: SkipPlan
    sampling: Sampling
    end_tokens: frozenset[int]
    name: str = SKIP_ONLY

    def run(self, case: Case) -> Run:
        """Decode the prompt once."""
        sampling = replace(self.sampling, seed=case.seed)
        request = BatchRequest(case.tokens, case.max_new_tokens, sampling)
        batch = Batch(self.decoder, [request], plan=self.plan, end_tokens=self.end_tokens)
        batch.run()
        (tokens,) = batch.outputs
        return Run(tuple(tokens), Summary.of_row(batch, 0), batch.cache.bytes)


@dataclass(frozen=True)
class TransformersArm:
    """``model.generate`` of transformers, as a user would call it, with the same settings."""

    decoder: Decoder
    sampling: Sampling
    end_tokens: frozenset[int]
    name: str = "transformers"

    def run(self, case: Case) -> Run:
        """Decode the prompt once."""
        device = self.decoder.device
        prompt = torch.tensor([case.tokens], device=device)
        with self.decoder.plain() as model, _own_settings(model), _seeded(case.seed, device):
            stopwatch = _Stopwatch(device)
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._config(case.max_new_tokens),
                stopping_criteria=StoppingCriteriaList([stopwatch]),
            )
        tokens = tuple(output[0, len(case.tokens) :].tolist())
        return Run(tokens, stopwatch.summary())

    def _config(self, max_new_tokens: int) -> Any:
        settings = self.sampling
        ends = sorted(self.end_tokens)
        config: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": not settings.greedy,
            "repetition_penalty": settings.repetition_penalty,
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if ends else 0,
        }
        if not settings.greedy:
            config |= {
                "temperature": settings.temperature,
                "top_k": settings.top_k or 0,  # 50 would be the default
                "top_p": 1.0 if settings.top_p is None else settings.top_p,
                "min_p": settings.min_p,
            }
        return GenerationConfig(**config)


class _Stopwatch(StoppingCriteria):
    """Notes the time behind every token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times = [clock(device)]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._times.append(clock(self._device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def summary(self) -> Summary:
        """The first token's time as the prefill's, the others' as decoding."""
        count = len(self._times) - 1
        return Summary(
            prefill_seconds=self._times[1] - self._times[0],
            decode_seconds=self._times[-1] - self._times[1],
            tokens=count,
            decode_tokens=count - 1,
            steps=count - 1,
        )


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Within: the model has no generation settings of its own, which would fill in for ours."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with quiet_transformers():
            yield
    finally:
        model.generation_config = kept


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within: torch's own random numbers start from ``seed``; they go on as before behind it."""
    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
