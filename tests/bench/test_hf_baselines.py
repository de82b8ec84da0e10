from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from conflayers_cli.bench import tables as bench_tables
from conflayers_cli.bench.hf_baselines import HF_BASELINES, TransformersSystem
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, Run
from conflayers_cli.cli.bench_options import Baseline
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.models.generation_settings import GenerationSettings
from conflayers_cli.sampling_params import SamplingParams
from tests import tiny

GREEDY = SamplingParams()
REPEATING = tuple(tiny.prompt(6) * 4)


def run(name: str, prompt: BenchPrompt, sampling: SamplingParams = GREEDY) -> Run:
    return TransformersSystem.baseline(name, tiny.decoder("llama"), sampling, frozenset()).run(
        [prompt]
    )[0]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_transformers_system_is_generate_with_the_same_settings(penalty: float) -> None:
    decoder = tiny.decoder("llama")
    sampling = SamplingParams(repetition_penalty=penalty)
    prompt = BenchPrompt("p", None, tuple(tiny.prompt(9)), 20)
    kept = decoder.model.generation_config
    theirs = TransformersSystem(decoder, sampling, frozenset()).run([prompt])[0]
    ours = EngineSystem("vanilla", decoder, None, sampling, frozenset()).run([prompt])[0]
    assert theirs.tokens == ours.tokens
    assert decoder.model.generation_config is kept
    assert (theirs.stats.tokens, theirs.stats.decode_tokens) == (20, 19)
    assert theirs.stats.prefill_seconds > 0
    assert theirs.stats.decode_seconds > 0
    end = frozenset({ours.tokens[5]})
    first = ours.tokens.index(ours.tokens[5]) + 1
    assert len(TransformersSystem(decoder, sampling, end).run([prompt])[0].tokens) == first
    assert (
        len(EngineSystem("vanilla", decoder, None, sampling, end).run([prompt])[0].tokens) == first
    )


def test_both_follow_the_models_generation_config() -> None:
    decoder = tiny.decoder("llama")
    tokens, kept = tuple(tiny.prompt(9)), decoder.model.generation_config
    decoder.model.generation_config = transformers.GenerationConfig(
        repetition_penalty=3.0, no_repeat_ngram_size=2, suppress_tokens=[5, 6, 7]
    )
    try:
        known = GenerationSettings(decoder.model.generation_config, frozenset())
        prompt = BenchPrompt("p", None, tokens, 20, known.processors(tokens, 20))
        sampling = SamplingParams(repetition_penalty=known.repetition_penalty)
        theirs = TransformersSystem(decoder, SamplingParams(), frozenset()).run([prompt])[0]
        ours = EngineSystem("vanilla", decoder, None, sampling, frozenset()).run([prompt])[0]
    finally:
        decoder.model.generation_config = kept
    assert theirs.tokens == ours.tokens
    assert len(set(zip(ours.tokens, ours.tokens[1:], strict=False))) == 19


def test_transformers_system_draws_from_its_seed_and_leaves_torchs_alone() -> None:
    decoder = tiny.decoder("llama")
    prompt = BenchPrompt("p", None, tuple(tiny.prompt(9)), 20)
    before = torch.random.get_rng_state()
    runs = [
        TransformersSystem(decoder, SamplingParams(1.0, seed=seed), frozenset())
        .run([prompt])[0]
        .tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_command_line_and_the_report_know_all_peers() -> None:
    assert (
        {baseline.value for baseline in Baseline}
        == set(HF_BASELINES)
        == set(bench_tables.BASELINE_LABELS)
    )


@pytest.mark.parametrize("name", HF_BASELINES)
def test_every_baseline_writes_what_the_model_writes_and_counts_it(name: str) -> None:
    decoder = tiny.decoder("llama")
    prompt = BenchPrompt("p", None, REPEATING, 30)
    ours = EngineSystem("vanilla", decoder, None, GREEDY, frozenset()).run([prompt])[0]
    theirs = run(name, prompt)
    assert theirs.tokens == ours.tokens
    stats = theirs.stats
    assert stats.tokens == 30
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    drafts = name in ("prompt-lookup", "early-exit")
    first = 30 - stats.decode_tokens  # more than one token may come with the prompt
    assert (first == 1) or drafts
    assert (stats.steps < stats.decode_tokens) == drafts
    assert decoder.depth == decoder.config.num_hidden_layers


@pytest.mark.parametrize("name", HF_BASELINES)
def test_every_baseline_draws_as_many_tokens_as_it_may(name: str) -> None:
    prompt = BenchPrompt("p", None, REPEATING, 12)
    sampling = SamplingParams(temperature=1.0, top_k=20, seed=3)
    one, again = (run(name, prompt, sampling) for _ in range(2))
    assert one.tokens == again.tokens
    assert (len(one.tokens), one.stats.tokens) == (12, 12)


def test_the_first_step_may_bring_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are always right, four at a time: 20 tokens in four steps, five in the first."""
    prompt = BenchPrompt("p", None, REPEATING, 20)
    text = [*REPEATING, *run("transformers", prompt).tokens]

    def right(generator: Any, ids: torch.Tensor, **more: object) -> tuple[torch.Tensor, None]:
        drafted = text[ids.shape[1] : ids.shape[1] + 4]
        return torch.cat([ids, torch.tensor([drafted], dtype=ids.dtype)], dim=1), None

    generators = transformers.generation.candidate_generator
    monkeypatch.setattr(generators.PromptLookupCandidateGenerator, "get_candidates", right)
    stats = run("prompt-lookup", prompt).stats
    assert (stats.tokens, stats.decode_tokens, stats.steps) == (20, 15, 3)


def test_a_baseline_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")

    def fail(*arguments: object, **more: object) -> None:
        decoder.config.num_hidden_layers = 2  # as early exit leaves it
        raise ValueError("not\nfor this\nmodel")

    monkeypatch.setattr(decoder.model, "forward", fail)
    with pytest.raises(InputError, match=r"early-exit: .* not for this model$"):
        run("early-exit", BenchPrompt("p", None, (1, 2, 3), 5))
    assert decoder.config.num_hidden_layers == decoder.depth


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is packed here"
)
def test_weights_that_are_held_twice_meanwhile_are_told() -> None:
    model = tiny.build(tiny.CONFIGS["llama"](), dtype=torch.bfloat16)
    plain = sum(weight.nbytes for weight in model.parameters())
    decoder = Decoder(model)
    held = sum(weight.nbytes for weight in model.parameters())
    done = TransformersSystem(decoder, GREEDY, frozenset()).run(
        [BenchPrompt("p", None, (1, 2, 3), 3)]
    )[0]
    assert done.weights_twice_bytes == plain - held > 0
