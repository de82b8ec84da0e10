"""A model's generation config is part of its texts: greedy texts are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.generator import TextGenerator, batch_size_for
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.generation_settings import GenerationSettings, check_settings
from conflayers_cli.models.support import context_length
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.adaptive.proposer import AutoProposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny

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
    },
)
FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "opt", "phi3")


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


def ours(decoder: Decoder, prompt: list[int], ends: list[int], budget: int, proposer: Any) -> Any:
    known = GenerationSettings(decoder.model.generation_config, frozenset(ends))
    sampling = SamplingParams(temperature=0.0, repetition_penalty=known.repetition_penalty)
    request = GenerationRequest(
        prompt, budget, sampling, processors=known.processors(len(prompt), budget)
    )
    generator = TextGenerator(decoder, end_tokens=frozenset(ends), proposer=proposer)
    (result,) = generator.generate([request])
    return list(result.token_ids)


@settings(max_examples=40)
@given(
    given_=SETTINGS,
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 99),
    drafts=st.sampled_from(["none", "skip", "auto"]),
)
def test_greedy_texts_are_those_of_generate(
    given_: dict[str, Any], family: str, seed: int, drafts: str
) -> None:
    decoder, prompt, ends = tiny.decoder(family), tiny.prompt(6, seed), [2, 11]
    before = decoder.model.generation_config
    decoder.model.generation_config = hf.GenerationConfig(**given_)
    try:
        proposer = {
            "none": None,
            "skip": SkipProposer(decoder, SkipPlan.of_layers([2]), 4, 0.0),
            "auto": AutoProposer(decoder, budget=1.0),
        }[drafts]
        text = ours(decoder, prompt, ends, 16, proposer)
        with decoder.plain() as model:
            assert text == by_transformers(model, prompt, ends, 16)
    finally:
        decoder.model.generation_config = before


def test_the_models_own_sampling() -> None:
    config = hf.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    known = GenerationSettings(config, frozenset())
    assert known.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert GenerationSettings(hf.GenerationConfig(), frozenset()).sampling == {"temperature": 0.0}
    everything = hf.GenerationConfig(do_sample=True, top_k=0)
    assert "top_k" not in GenerationSettings(everything, frozenset()).sampling


def test_what_is_not_followed_is_named() -> None:
    config = hf.GenerationConfig(num_beams=4, guidance_scale=1.5)
    assert GenerationSettings(config, frozenset()).ignored == ["num_beams 4", "guidance_scale 1.5"]
    assert not GenerationSettings(hf.GenerationConfig(), frozenset()).ignored
    assert not GenerationSettings(None, frozenset()).processors(3, 4)


def test_texts_that_processors_look_at_are_decoded_one_by_one() -> None:
    known = GenerationSettings(hf.GenerationConfig(no_repeat_ngram_size=2), frozenset())
    plain = GenerationRequest([1, 2], 3)
    looked_at = GenerationRequest([1, 2], 3, processors=known.processors(2, 3))
    assert batch_size_for([plain, plain], 4) == 4
    assert batch_size_for([plain, looked_at], 4) == 1


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
    with pytest.raises(InputError, match="generation config of tiny is broken"):
        check_settings(known, tiny.VOCABULARY, "tiny")


def test_sampling_that_is_no_number_is_refused() -> None:
    config = hf.GenerationConfig(do_sample=True)
    config.top_p = "x"
    with pytest.raises(InputError, match="has top_p 'x', which is no number"):
        _ = GenerationSettings(config, frozenset()).sampling
