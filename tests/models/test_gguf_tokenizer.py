"""A GGUF file's vocabulary is followed as llama.cpp and SentencePiece do.

What is expected here was compared with llama.cpp's own tokens for the same files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from conflayers_cli.errors import InputError
from conflayers_cli.generation.detokenizer import Detokenizer
from conflayers_cli.models.gguf_metadata import read_metadata
from conflayers_cli.models.gguf_tokenizer import build_tokenizer
from conflayers_cli.models.gguf_vocabulary import find_ends
from conflayers_cli.utils.notices import collect_notices

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<|end|>", CONTROL)]
ADDED = [("<tool>", USER), ("  ", USER), ("[PAD1]", UNUSED)]
BYTES = [(f"<0x{number:02X}>", BYTE) for number in range(256)]
PIECES = [
    "\u2581ab",
    "abc",
    "ab",
    "\u2581a",
    "12",
    "bc",
    "\u2581",
    "a",
    "b",
    "c",
    "1",
    "2",
    "\u00e9",
]
NAMES = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
SENTENCES = [*SPECIAL, *BYTES, *((piece, NORMAL) for piece in PIECES), *ADDED]


def write(path: Path, kind: str, tokens: Sequence[tuple[str, int]], **keys: Any) -> Path:
    """A file that has a vocabulary alone."""
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([type_ for _, type_ in tokens])
    for key, value in keys.items():
        name = key.replace("__", ".") if "__" in key else f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path / "model.gguf"


def build(file: Path) -> Any:
    return build_tokenizer(read_metadata(file), "m")


def pieces(path: Path, kind: str = "llama", **keys: Any) -> Any:
    """A tokenizer of SentencePiece's kinds."""
    first = len(SENTENCES) - len(PIECES) - len(ADDED)
    scores = [float(min(0, first - number)) for number in range(len(SENTENCES))]
    return build(write(path, kind, SENTENCES, scores=scores, **{**NAMES, **keys}))


def tokens_of(tokenizer: Any, text: str, special: bool = False) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=special)["input_ids"])


@pytest.mark.parametrize(
    ("text", "expected", "prefixed"),
    [
        ("abc", ["\u2581ab", "c"], ["abc"]),
        (" ab", ["\u2581", "\u2581ab"], ["\u2581ab"]),
        ("b", ["\u2581", "b"], ["b"]),
        ("112", ["\u2581", "1", "12"], ["1", "12"]),
        ("\u00e9\u00df", ["\u2581", "\u00e9", "<0xC3>", "<0x9F>"], ["\u00e9", "<0xC3>", "<0x9F>"]),
        ("a\nb", ["\u2581a", "<0x0A>", "b"], ["a", "<0x0A>", "b"]),
        ("a<tool>a", ["\u2581a", "<tool>", "\u2581a"], ["a", "<tool>", "a"]),
        ("<|end|>ab", ["<|end|>", "\u2581ab"], ["<|end|>", "ab"]),
        ("a  a", ["\u2581a", "  ", "\u2581a"], ["a", "  ", "a"]),
        ("", [], []),
    ],
)
def test_pieces(tmp_path: Path, text: str, expected: list[str], prefixed: list[str]) -> None:
    """``prefixed``: without a space before the first word, where the file says so."""
    assert tokens_of(pieces(tmp_path), text) == expected
    assert tokens_of(pieces(tmp_path, add_space_prefix=False), text) == prefixed


def test_pieces_merge_by_their_scores(tmp_path: Path) -> None:
    """Not by their place: the same tokens with other scores."""
    tokens = [*SPECIAL, *BYTES, *((piece, NORMAL) for piece in ("a", "b", "c", "ab", "bc"))]
    ids = {token: number for number, (token, _) in enumerate(tokens)}
    for better, expected in (("ab", ["ab", "c"]), ("bc", ["a", "bc"])):
        scores = [0.0] * len(tokens)
        scores[ids["ab"]], scores[ids["bc"]] = -2.0, -2.0
        scores[ids[better]] = -1.0
        file = write(tmp_path, "llama", tokens, scores=scores, add_space_prefix=False, **NAMES)
        assert tokens_of(build(file), "abc") == expected


@pytest.mark.parametrize(
    ("extra", "text", "expected"),
    [
        (False, "a   ab", ["\u2581a", "  ", "\u2581", "\u2581ab"]),
        (True, " ab a ", ["\u2581ab", "\u2581a"]),
        (False, "ab a ", ["\u2581ab", "\u2581a", "\u2581"]),
        (True, "a<tool>b", ["\u2581a", "<tool>", "\u2581", "b"]),
        (True, "\u00df", ["\u2581", "<0xC3>", "<0x9F>"]),
    ],
)
def test_likeliest_pieces(tmp_path: Path, extra: bool, text: str, expected: list[str]) -> None:
    tokenizer = pieces(tmp_path, "t5", add_space_prefix=True, remove_extra_whitespaces=extra)
    assert tokens_of(tokenizer, text) == expected


def letters(path: Path, added: Sequence[tuple[str, int]] = (), **keys: Any) -> Any:
    """A tokenizer of bytes, with ``ab`` merged and ``abab`` that no merge makes."""
    plain = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abab"]
    tokens = [*((token, NORMAL) for token in plain), *added]
    return build(write(path, "gpt2", tokens, **{"merges": ["a b"], "pre": "gpt-2", **keys}))


def test_added_tokens_are_found_as_a_whole(tmp_path: Path) -> None:
    names = ["<\uff5cUser\uff5c>", "<think>", "  ", "\u00e9!", "<|im_end|>"]
    tokenizer = letters(
        tmp_path, list(zip(names, [CONTROL, USER, USER, USER, NORMAL], strict=True))
    )
    text = "<\uff5cUser\uff5c>ab<think>\u00e9!  \u00e9<|im_end|>"
    assert tokens_of(tokenizer, text) == [
        *names[:1],
        "ab",
        "<think>",
        "\u00e9!",
        "  ",
        "\u00c3",
        "\u00a9",
        names[4],
    ]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>\u00e9!  \u00e9"
    assert max(ids) < len(tokenizer) == 256 + 2 + len(names)


def test_whole_words_need_no_merges_where_the_way_of_splitting_says_so(tmp_path: Path) -> None:
    assert tokens_of(letters(tmp_path, pre="llama-bpe"), "abab") == ["abab"]
    assert tokens_of(letters(tmp_path, pre="qwen2"), "abab") == ["ab", "ab"]


@pytest.mark.parametrize(
    ("keys", "begins", "ends"),
    [
        ({}, True, False),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
        ({"add_bos_token": True, "bos_token_id": 2**32 - 1}, False, False),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path, keys: dict[str, Any], begins: bool, ends: bool
) -> None:
    notes: list[str] = []
    with collect_notices(notes):
        found = tokens_of(pieces(tmp_path, **keys), "a", special=True)
    assert found == ["<s>"] * begins + ["\u2581a"] + ["</s>"] * ends
    assert bool(notes) == ("bos_token_id" in keys)


def test_a_byte_level_text_begins_with_nothing_unless_told(tmp_path: Path) -> None:
    added, keys = [("<s>", CONTROL)], {"bos_token_id": 258}
    assert tokens_of(letters(tmp_path, added, **keys), "a", True) == ["a"]
    assert tokens_of(letters(tmp_path, added, pre="llama-bpe", **keys), "a", True) == ["<s>", "a"]


def test_special_tokens_take_white_space_where_the_model_is_known_to(tmp_path: Path) -> None:
    text = "<|end|>\n a<s> a"
    assert tokens_of(pieces(tmp_path, general__name="Phi-3 mini"), text) == [
        *("<|end|>", "\u2581a", "<s>", "\u2581", "\u2581a")
    ]
    assert tokens_of(pieces(tmp_path, general__name="other"), text)[1] == "\u2581"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_prompt_and_text_put_together_are_the_decoding_of_all(tmp_path: Path, kind: str) -> None:
    tokenizer = letters(tmp_path, ADDED) if kind == "gpt2" else pieces(tmp_path, kind)
    draw = random.Random(0)
    text = "<0x{:02X}>".format
    for number in range(60):
        ids = [draw.randrange(4, len(tokenizer) + 2) for _ in range(24)]
        if number % 2:  # whole characters of several bytes
            spelt = [text(byte) for byte in "\u65e5\U0001f642".encode()]
            ids[8:15] = tokenizer.convert_tokens_to_ids(spelt) if kind != "gpt2" else ids[8:15]
        cut = draw.randrange(1, 23)
        both = tokenizer.decode(ids, skip_special_tokens=True)
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if before.endswith("\ufffd"):
            continue  # the cut is within a character
        detokenizer = Detokenizer(tokenizer, prompt=ids[:cut])
        for token in ids[cut:]:
            detokenizer.feed(token)
        detokenizer.finish()
        assert before + detokenizer.text == both, ids


def test_tokens_that_fill_up_are_no_text(tmp_path: Path) -> None:
    tokenizer = letters(tmp_path, [("[PAD1]", UNUSED), ("<x>", CONTROL)])
    number = 258
    assert (
        tokenizer.decode([97 - 33, number, number + 1, 100_000]) == tokenizer.decode([64]) + "<x>"
    )
    assert "[PAD1]" not in tokens_of(tokenizer, "[PAD1]")
    assert tokens_of(tokenizer, "<x>") == ["<x>"]


def test_tokens_spelt_alike_are_written_alike(tmp_path: Path) -> None:
    tokenizer = letters(tmp_path, [("<x>", USER), ("<x>", USER)])
    assert tokenizer("<x>")["input_ids"] == [259]
    assert tokenizer.decode([258, 259]) == "<x><x>"
    assert len(tokenizer) == 260


def test_bytes_that_are_no_character_spoil_no_others(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path)
    names = ["<0x0A>", "<0xF0>", "<0x9F>", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(names)) == "\n\ufffd\n\u00e9"


def test_templates_by_name(tmp_path: Path) -> None:
    one = pieces(tmp_path, tokenizer__chat_template="A")
    assert one.chat_template == "A"
    two = pieces(
        tmp_path, tokenizer__chat_template="A{{ 1 }}", **{"tokenizer__chat_template__rag": "B"}
    )
    messages = [{"role": "user", "content": "x"}]
    assert two.apply_chat_template(messages, tokenize=False) == "A1"
    assert two.apply_chat_template(messages, tokenize=False, chat_template="rag") == "B"


def test_a_whole_tokenizer_in_the_file_is_taken(tmp_path: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}
    other = Tokenizer(models.WordLevel(words, "<unk>"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = pieces(tmp_path, tokenizer__huggingface__json=other.to_str())
    assert tokens_of(tokenizer, "hello you", True) == ["<s>", "hello", "<unk>"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<|eot_id|>", "x"], {"<|eot_id|>": 0}),
        (["<|end|>", "<|return|>"], {"<|end|>": 0, "<|return|>": 1}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>": 1, "<|call|>": 2}),
    ],
)
def test_ends_by_what_they_are_called(names: list[str], expected: dict[str, int]) -> None:
    assert find_ends({name: number for number, name in enumerate(names)}.get) == expected


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("bert", {}, "a vocabulary of the kind 'bert': supported are gpt2, llama, gemma4 and t5"),
        ("no_vocab", {}, "kind 'no_vocab'"),
        ("llama", {}, "no scores and no merges"),
        ("llama", {"scores": [0.0]}, "1 scores for 275 tokens"),
        ("t5", {"scores": [0.0] * 275, "precompiled_charsmap": [1, 2, 3]}, "is broken"),
    ],
)
def test_vocabularies_are_refused(
    tmp_path: Path, kind: str, keys: dict[str, Any], expected: str
) -> None:
    assert len(SENTENCES) == 276
    with pytest.raises(InputError, match=expected):
        build(write(tmp_path, kind, SENTENCES[:-1], **keys))
