"""Tiny random models of many families, built in memory, the same on every run.

Five layers, hidden size 32, a vocabulary of 100, float32. Weights are drawn large enough that each
layer matters (outputs don't settle into one repeated token), yet not so large that a draft without
one of them is never right.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import scipy.stats
import torch
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, SkipProposer

VOCABULARY = 100
DEPTH = 5
WINDOW = 7

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": DEPTH,
    "n_head": 4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(DEPTH)]


def _llama_like(config: type, **more: Any) -> Callable[[], Any]:
    return lambda: config(**{**LLAMA_LIKE, **more})


def _ungrouped(config: type, **more: Any) -> Callable[[], Any]:
    """For families that know no key/value heads: a config would carry the stray entry along."""
    known = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return lambda: config(**{**known, **more})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama_like(hf.LlamaConfig),
    "mistral": _llama_like(hf.MistralConfig, sliding_window=WINDOW),
    "qwen2": _llama_like(hf.Qwen2Config),
    # the first two layers see everything, the others a window
    "qwen2-mixed": _llama_like(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": _llama_like(hf.Qwen3Config, head_dim=8),
    "gemma2": _llama_like(
        hf.Gemma2Config, head_dim=8, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
    "gemma3": _llama_like(
        hf.Gemma3TextConfig, head_dim=8, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
    "phi3": _llama_like(hf.Phi3Config, sliding_window=None),
    "gpt-neox": _ungrouped(hf.GPTNeoXConfig),
    "gpt2": lambda: hf.GPT2Config(**GPT2_LIKE),
    "opt": _ungrouped(hf.OPTConfig, ffn_dim=64, word_embed_proj_dim=32),
    "mixtral": _llama_like(hf.MixtralConfig, num_local_experts=4),
    "olmo2": _llama_like(hf.Olmo2Config),
    "gpt-oss": _llama_like(
        hf.GptOssConfig,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
FAMILIES = tuple(CONFIGS)


def draw_weights(model: Any, seed: int, gain: float = 1.0) -> None:
    """Draw all weights but the norms' anew, from their own generator."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if re.search(r"norm|ln_", name):
            continue
        if re.search(r"lm_head|embed_out", name):
            spread = gain * 0.5  # some tokens likely, others not
        elif re.search(r"embed|\bw[tp]e\b", name):
            spread = 1.0
        else:
            spread = gain * 0.15 if weight.dim() > 1 else 0.1
        drawn = torch.randn(weight.shape, generator=generator) * spread
        weight.data.copy_(drawn)


def build(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> Any:
    """A model of a configuration, in eval mode, with weights of its own seed."""
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    draw_weights(model, seed, gain)
    return model.to(dtype)


@functools.cache
def decoder(family: str) -> Decoder:
    """The family's model behind the engine, one for the whole run."""
    return Decoder(build(CONFIGS[family]()))


def prompt(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()
    return ids


def generated(decoder: Decoder, tokens: Sequence[int], count: int) -> list[int]:
    """What transformers' own greedy ``generate`` says."""
    with decoder.plain() as model:
        ids = torch.tensor([list(tokens)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
    new: list[int] = out[0, len(tokens) :].tolist()
    return new


def generation(
    model: Decoder,
    prompt: list[int],
    count: int,
    sampling: SamplingParams | None = None,
    on_token: Callable[[int], bool] | None = None,
    **more: Any,
) -> Generation:
    """A request of these at work; what else there is goes to `Generation`."""
    request = GenerationRequest(prompt, count, sampling or SamplingParams(), on_token=on_token)
    return Generation(model, request, **more)


def steps_of(generation: Generation) -> list[Step]:
    """All steps to the end."""
    return list(generation)


@dataclass
class Scripted:
    """A drafter that proposes what a function of the text says, as certain drafts."""

    guess: Callable[[list[int]], Iterable[int]]
    name: str = "scripted"

    def propose(self, context: Context, limit: int) -> Draft:
        return Draft(tuple(self.guess(context.tokens))[:limit])


def keeps_its_text(
    model: Decoder, plan: SkipPlan, size: int, temperature: float, seed: int
) -> None:
    """Drafts of ``size`` tokens under a plan leave no trace in the text, greedy or sampled."""
    tokens, sampling = prompt(6, seed), SamplingParams(temperature=temperature, seed=seed)
    proposer = SkipProposer(model, plan, size, 0.0)
    text = Generation(model, GenerationRequest(tokens, 20, sampling), proposer=proposer)
    assert sum(step.drafted for step in steps_of(text)) > 0
    assert len(text.output) == 20
    plain = generation(model, tokens, 20, sampling)
    steps_of(plain)
    assert text.output == plain.output
    if sampling.greedy:
        assert text.output == generated(model, tokens, 20)


def chi_square(counts: Mapping[Any, int], law: Mapping[Any, float]) -> float:
    """p-value of counts under a law; outcomes expected under five times are counted as one.

    An outcome that the law rules out makes it 0.
    """
    total = sum(counts.values())
    if any(law.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    seen, expected, rare_seen, rare = [], [], 0, 0.0
    for outcome, probability in law.items():
        if probability * total >= 5:
            seen.append(counts.get(outcome, 0))
            expected.append(probability * total)
        else:
            rare_seen += counts.get(outcome, 0)
            rare += probability * total
    if rare >= 5:
        seen.append(rare_seen)
        expected.append(rare)
    else:  # too little to be a class of its own
        seen[-1] += rare_seen
        expected[-1] += rare
    return float(scipy.stats.chisquare(seen, expected, sum_check=False).pvalue)


def through_logits(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    """Have every pass give its logits, where a test watches or changes `Decoder.forward`."""
    patch.setattr(decoder, "choose", lambda *args, **more: None)
