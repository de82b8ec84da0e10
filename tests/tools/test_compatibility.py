"""The page of what files say has every key, and says what the code does."""

from __future__ import annotations

from pathlib import Path

import transformers as hf

from conflayers_cli.models.generation_settings import GenerationSettings
from tools import compatibility

PAGE = Path(__file__).parents[2] / compatibility.TARGET


def test_every_key_of_a_generation_config_is_there() -> None:
    assert not compatibility.unknown_keys()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == compatibility.page()


def test_what_is_said_to_be_followed_has_a_processor() -> None:
    """Or is an end, a stop or a penalty."""
    others = {"eos_token_id", "stop_strings", "repetition_penalty"}
    values = {
        "bad_words_ids": [[5]],
        "begin_suppress_tokens": [5],
        "exponential_decay_length_penalty": (3, 1.5),
        "sequence_bias": [[[5], 1.0]],
        "suppress_tokens": [5],
        "remove_invalid_values": True,
    }
    for name in compatibility.FOLLOWED.keys() - others:
        config = hf.GenerationConfig(**{name: values.get(name, 3)})
        assert GenerationSettings(config, frozenset({2})).processors([4, 5, 6, 7], 8), name
