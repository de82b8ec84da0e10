"""Hugging Face baselines of a bench: transformers' own `generate`, plain or drafting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from conflayers_cli.bench.systems import BenchPrompt, Run
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.errors import InputError
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.models.builtin import quiet_transformers
from conflayers_cli.sampling_params import SamplingParams

HF_BASELINES: Mapping[str, Callable[[int], Mapping[str, Any]]] = MappingProxyType(
    {
        "transformers": lambda depth: {},
        "transformers-static": lambda depth: {"cache_implementation": "static"},
        "prompt-lookup": lambda depth: {"prompt_lookup_num_tokens": 10},
        "early-exit": lambda depth: {"assistant_early_exit": max(depth // 2, 1)},
    }
)
"""By name: the settings of `generate` that they add, for a model of so many layers."""

# What transformers raises where it can't decode a model in one of its ways.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class TransformersSystem:
    """``model.generate`` of transformers, as a user would call it, with the same settings.

    Attributes:
        decoder: the model.
        sampling: how tokens are chosen.
        end_tokens: ids that end an output.
        name: the system's.
        more: further settings of `generate`.
    """

    decoder: Decoder
    sampling: SamplingParams
    end_tokens: frozenset[int]
    name: str = "transformers"
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def baseline(
        cls, name: str, decoder: Decoder, sampling: SamplingParams, end_tokens: frozenset[int]
    ) -> TransformersSystem:
        """One of :data:`HF_BASELINES`."""
        return cls(decoder, sampling, end_tokens, name, HF_BASELINES[name](decoder.depth))

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        """Decode prompts once, one after the other.

        The model has its plain weights meanwhile; getting them back is not part of the times.

        Raises:
            InputError: transformers can't decode this model in this way.
        """
        return [self._generate(prompt) for prompt in prompts]

    def _generate(self, prompt: BenchPrompt) -> Run:
        device = self.decoder.device
        input_ids = torch.tensor([prompt.tokens], device=device)
        packed = sum(weight.nbytes for weight in self.decoder.model.parameters())
        with (
            self.decoder.plain() as model,
            _own_depth(model),
            _seeded(self.sampling.seed or 0, device),
        ):
            twice = sum(weight.nbytes for weight in model.parameters()) - packed
            stopwatch = _Stopwatch(device, len(prompt.tokens))
            try:
                output = model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=self._config(prompt.max_new_tokens),
                    stopping_criteria=StoppingCriteriaList([stopwatch]),
                )
            except _FAILURES as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(
                    f"{self.name}: transformers can't decode this model so: {reason}"
                ) from error
        tokens = tuple(output[0, len(prompt.tokens) :].tolist())
        return Run(tokens, stopwatch.summary(), weights_twice_bytes=twice)

    def _config(self, max_new_tokens: int) -> Any:
        settings = self.sampling
        ends = sorted(self.end_tokens)
        config: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": not settings.greedy,
            # What is None here is as the model's generation config has it.
            "repetition_penalty": None
            if settings.repetition_penalty == 1
            else settings.repetition_penalty,
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if ends else 0,
        }
        if not settings.greedy:
            config |= {
                "temperature": settings.temperature,
                "top_k": settings.top_k or 0,  # 50 would be the default
                "top_p": 1.0 if settings.top_p is None else settings.top_p,
                "min_p": settings.min_p or 0.0,
            }
        return GenerationConfig(**config, **self.more)


class _Stopwatch(StoppingCriteria):
    """Records time and length after every step, which may give several tokens; stops nothing.

    Drafts come from calls of `generate` within `generate`, which don't get it.
    """

    def __init__(self, device: torch.device, prompt_length: int) -> None:
        self._device = device
        self._lengths = [prompt_length]
        self._times = [clock(device)]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._times.append(clock(self._device))
        self._lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def summary(self) -> GenerationStats:
        """The first step reads the prompt, whatever it drafts; the others are decoding."""
        return GenerationStats(
            prefill_seconds=self._times[1] - self._times[0],
            decode_seconds=self._times[-1] - self._times[1],
            tokens=self._lengths[-1] - self._lengths[0],
            decode_tokens=self._lengths[-1] - self._lengths[1],
            steps=len(self._times) - 2,
        )


@contextmanager
def _own_depth(model: Any) -> Iterator[None]:
    """Within: transformers may change the depth in the model's configuration, as early exit does
    (should it fail, it leaves it so)."""
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    try:
        with quiet_transformers():
            yield
    finally:
        config.num_hidden_layers = depth


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within: torch's own random numbers start from ``seed``; after it they go on as before."""
    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
