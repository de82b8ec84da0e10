"""A model's generation config is part of its texts: greedy texts are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.generation_settings import GenerationSettings, check_settings
from conflayers_cli.models.support import context_length
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.adaptive.proposer import AutoProposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from tests import tiny
from tests.engine.rows import SkipRows

TOKENS = st.integers(3, tiny.VOCABULARY - 1)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.3, 5.0]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3),
        "min_new_tokens": st.integers(1, 9),
        "min_length": st.integers(1, 15),
        "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=8),
        "begin_suppress_tokens": st.lists(TOKENS, min_size=1, max_size=8),
        "forced_eos_token_id": st.just(2),
        "sequence_bias": st.just([[[5], 4.0], [[7, 9], -3.0]]),
        "exponential_decay_length_penalty": st.just((3, 1.2)),
        "encoder_repetition_penalty": st.sampled_from([0.5, 2.0]),
        "encoder_no_repeat_ngram_size": st.integers(1, 2),
    },
)
FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "opt", "phi3")


ENDS = [2, 11]


def by_transformers(model: Any, prompt: list[int], ends: list[int], budget: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=budget,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def ours(
    decoder: Decoder,
    prompts: list[list[int]],
    budget: int,
    proposer: Any = None,
    batch_size: int = 1,
    **sampling: Any,
) -> list[list[int]]:
    known = GenerationSettings(decoder.model.generation_config, frozenset(ENDS))
    own = SamplingParams(repetition_penalty=known.repetition_penalty, **sampling)
    requests = [
        GenerationRequest(each, budget, own, processors=known.processors(each, budget))
        for each in prompts
    ]
    generator = TextGenerator(
        decoder, end_tokens=frozenset(ENDS), proposer=proposer, batch_size=batch_size
    )
    return [list(result.token_ids) for result in generator.generate(requests)]


@contextmanager
def following(decoder: Decoder, config: dict[str, Any]) -> Iterator[None]:
    before = decoder.model.generation_config
    decoder.model.generation_config = hf.GenerationConfig(**config)
    try:
        yield
    finally:
        decoder.model.generation_config = before


def proposer_of(decoder: Decoder, drafts: str, batch_size: int) -> Any:
    plan = SkipPlan.of_layers([2])
    if drafts == "none":
        return None
    if drafts == "auto":
        return AutoProposer(decoder, budget=1.0)
    if batch_size > 1:
        return SkipRows(decoder, plan, 4)
    return SkipProposer(
        decoder, plan, 4, 0.0, tree=TreeShape(((0.0, 2),)) if drafts == "tree" else None
    )


DRAFTS = st.sampled_from(["none", "skip", "tree", "auto"])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    return [tiny.prompt(length, seed + 7 * i) for i, length in enumerate(lengths)]


@settings(max_examples=50)
@given(
    given_=SETTINGS,
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 99),
    drafts=DRAFTS,
    lengths=LENGTHS,
    batch_size=st.integers(1, 3),
)
def test_greedy_texts_are_those_of_generate(
    given_: dict[str, Any],
    family: str,
    seed: int,
    drafts: str,
    lengths: list[int],
    batch_size: int,
) -> None:
    """Of each prompt for itself, whatever it is decoded beside."""
    decoder, prompts = tiny.decoder(family), prompts_of(lengths, seed)
    with following(decoder, given_):
        proposer = proposer_of(decoder, drafts, batch_size)
        texts = ours(decoder, prompts, 16, proposer, batch_size)
        with decoder.plain() as model:
            assert texts == [by_transformers(model, each, ENDS, 16) for each in prompts]


@settings(max_examples=20)
@given(
    given_=SETTINGS,
    seed=st.integers(0, 99),
    drafts=DRAFTS,
    lengths=LENGTHS,
    batch_size=st.integers(1, 3),
    top_k=st.sampled_from([None, 8]),
)
def test_sampled_texts_are_those_without_drafts_alone(
    given_: dict[str, Any],
    seed: int,
    drafts: str,
    lengths: list[int],
    batch_size: int,
    top_k: int | None,
) -> None:
    decoder, prompts = tiny.decoder("llama"), prompts_of(lengths, seed)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": top_k, "seed": seed}
    with following(decoder, given_):
        proposer = proposer_of(decoder, drafts, batch_size)
        texts = ours(decoder, prompts, 16, proposer, batch_size, **sampling)
        assert texts == [ours(decoder, [each], 16, **sampling)[0] for each in prompts]


def test_a_batch_drafts_under_processors() -> None:
    """Drafts are accepted in several rows at once, some of which no processor looks at."""
    decoder = tiny.decoder("llama")
    with following(decoder, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}):
        known = GenerationSettings(decoder.model.generation_config, frozenset())
        requests = [
            GenerationRequest(each, 12, processors=known.processors(each, 12) if i else ())
            for i, each in enumerate(prompts_of([5, 9, 3], 4))
        ]
        batch = Batch(decoder, requests, proposer=SkipRows(decoder, SkipPlan.of_layers([1]), 4))
        batch.run()
        alone = [list(r.token_ids) for r in TextGenerator(decoder).generate(requests)]
    assert batch.outputs == alone
    assert all(sum(step.accepted for step in steps) > 0 for steps in batch.steps)


def test_the_models_own_sampling() -> None:
    config = hf.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    known = GenerationSettings(config, frozenset())
    assert known.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert GenerationSettings(hf.GenerationConfig(), frozenset()).sampling == {"temperature": 0.0}
    everything = hf.GenerationConfig(do_sample=True, top_k=0)
    assert "top_k" not in GenerationSettings(everything, frozenset()).sampling


def test_what_is_not_followed_is_named() -> None:
    config = hf.GenerationConfig(num_beams=4, guidance_scale=1.5, num_return_sequences=2)
    named = ["num_beams 4", "num_return_sequences 2", "guidance_scale 1.5"]
    assert GenerationSettings(config, frozenset()).ignored == named
    assert not GenerationSettings(hf.GenerationConfig(), frozenset()).ignored
    assert not GenerationSettings(None, frozenset()).processors([3, 4, 5], 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bad_words_ids", []), ("no_repeat_ngram_size", "3"), ("sequence_bias", {"a": 1})],
)
def test_values_that_nobody_can_follow_are_refused(name: str, value: Any) -> None:
    config = hf.GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(InputError, match=f"{name} .* in the model's generation config"):
        GenerationSettings(config, frozenset()).processors([1, 2], 3)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
    ],
)
def test_the_context_is_what_scaling_makes_it(rope: dict[str, Any] | None, length: int) -> None:
    more = {"rope_parameters": {"rope_theta": 10000.0, **rope}} if rope else {}
    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "max_position_embeddings": 64, **more})
    assert context_length(config) == length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", "x"),
        ("min_length", [1]),
        ("bad_words_ids", [["x"]]),
        ("sequence_bias", [[[10**6], 1.0]]),
        ("exponential_decay_length_penalty", "x"),
        ("stop_strings", [3]),
        ("repetition_penalty", "x"),
        ("repetition_penalty", 10**400),
    ],
)
def test_what_can_not_be_followed_is_refused(name: str, value: object) -> None:
    config = hf.GenerationConfig()
    setattr(config, name, value)
    known = GenerationSettings(config, frozenset({2}))
    with pytest.raises(InputError, match=r"^tiny: .*the model's generation config"):
        check_settings(known, tiny.VOCABULARY, "tiny")


def test_sampling_that_is_no_number_is_refused() -> None:
    config = hf.GenerationConfig(do_sample=True)
    config.top_p = "x"
    with pytest.raises(
        InputError, match=r"top_p 'x' in the model's generation config .*: it is no number"
    ):
        _ = GenerationSettings(config, frozenset()).sampling
