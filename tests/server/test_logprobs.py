"""Tokens' names: together they are the text, whatever kind of tokenizer wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conflayers_cli.generation.sequence import TokenLogprobs
from conflayers_cli.server.logprobs import ChatLogprobs, CompletionLogprobs, TokenNames

BYTES = [f"<0x{value:02X}>" for value in range(256)]
PIECES = ["<unk>", "<end>", "x", "▁x", "▁", "▁the", "▁sky", "s", ".", "▁▁", "\ufffd"]
WORDS = ["<unk>", "<end>", "x", "##x", "the", "sky", "##s", ".", "n't", "日"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
EURO = [f"<0x{byte:02X}>" for byte in "€".encode()]


def tokenizer(pieces: list[str], model: Any, split: Any, decoder: Any) -> Any:
    made = Tokenizer(model({piece: i for i, piece in enumerate(pieces)}))
    made.pre_tokenizer, made.decoder = split, decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


def sentence_pieces(decoder: Any) -> Any:
    def model(vocabulary: dict[str, int]) -> Any:
        return models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")

    split = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer([*PIECES, *BYTES], model, split, decoder)


def letters() -> Any:
    pieces = ["<unk>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġthe", "ðŁĻ"]

    def model(vocabulary: dict[str, int]) -> Any:
        return models.BPE(vocab=vocabulary, merges=[])

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer(pieces, model, split, decoders.ByteLevel())


def words() -> Any:
    def model(vocabulary: dict[str, int]) -> Any:
        return models.WordPiece(vocabulary, unk_token="<unk>")

    return tokenizer(WORDS, model, pre_tokenizers.Whitespace(), decoders.WordPiece())


SENTENCE = ["▁the", "▁sky", "s", "▁", *EURO, "▁the", ".", "▁▁", "▁x", "\ufffd"]
CASES = {
    "sentence pieces": (sentence_pieces(decoders.Metaspace()), ["▁the", "▁sky", "s", "▁x", "."]),
    "byte fallback": (
        sentence_pieces(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
        SENTENCE,
    ),
    "byte fallback, nothing stripped": (sentence_pieces(decoders.Sequence(LLAMA)), SENTENCE),
    "a space first": (
        sentence_pieces(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
        ["▁", "▁the", "▁sky"],
    ),
    "byte-level": (letters(), ["Ġthe", "Ġ", "ðŁĻ", "Ĥ", "a", "Ã", "©", "ï", "¿", "½"]),
    "word pieces": (words(), ["the", "sky", "##s", ".", "n't", "日", "x", "##x"]),
}


def noted(kind: str) -> tuple[Any, list[TokenLogprobs], str]:
    own, pieces = CASES[kind]
    tokens = [own.convert_tokens_to_ids(piece) for piece in pieces]
    top = ((tokens[0], -0.5), (tokens[-1], -1.0))
    return own, [TokenLogprobs(token, -0.1, top) for token in tokens], own.decode(tokens)


@pytest.mark.parametrize("kind", CASES)
def test_the_names_of_a_chats_tokens_are_its_text(kind: str) -> None:
    own, tokens, text = noted(kind)
    found = ChatLogprobs(TokenNames(own))
    parts = [found.add(tokens[:1]), found.add([]), found.add(tokens[1:])]

    content = found.whole()["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    assert [entry for part in parts if part for entry in part["content"]] == content
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    whole = [entry for entry in content if "\\x" not in entry["token"]]
    assert all(entry["token"].encode() == bytes(entry["bytes"]) for entry in whole)


@pytest.mark.parametrize("kind", CASES)
def test_a_completions_offsets_are_where_its_tokens_begin(kind: str) -> None:
    own, tokens, _ = noted(kind)
    anchor = own("x", add_special_tokens=False)["input_ids"][-1:]
    text = own.decode([*anchor, *(each.token for each in tokens)])[1:]  # it goes on behind "x"
    found = CompletionLogprobs(TokenNames(own))
    parts = [found.add(tokens[:2]), found.add(tokens[2:])]

    whole = found.whole()
    for i, (name, begin) in enumerate(zip(whole["tokens"], whole["text_offset"], strict=True)):
        if not name.startswith("bytes:"):
            assert text[begin:].startswith(name), i
    offsets = [offset for part in parts if part for offset in part["text_offset"]]
    assert offsets == whole["text_offset"]
    partial = [name for name in whole["tokens"] if name.startswith("bytes:")]
    assert bool(partial) == kind.startswith("byte")


def test_parts_of_characters_are_told_apart() -> None:
    own, tokens, _ = noted("byte fallback")
    (entry,) = [e for e in ChatLogprobs(TokenNames(own)).add(tokens)["content"]  # type: ignore[index]
                if e["bytes"] == [0xE2]]  # fmt: skip
    assert entry["token"] == "\\xe2"


def test_special_tokens_have_no_bytes() -> None:
    own, tokens, _ = noted("byte fallback")
    special = TokenLogprobs(own.convert_tokens_to_ids("<end>"), -1.0)
    found = ChatLogprobs(TokenNames(own))
    found.add([special, *tokens])

    first, second, *_ = found.whole()["content"]
    assert (first["token"], first["bytes"]) == ("<end>", None)
    assert second["token"] == "the"  # it begins the text all the same


def test_a_token_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, tokens, _ = noted("byte-level")
    names = TokenNames(own)
    ChatLogprobs(names).add(tokens)

    def fail(*_: object, **__: object) -> str:
        raise AssertionError("asked again")

    monkeypatch.setattr(own, "decode", fail)
    monkeypatch.setattr(own, "convert_ids_to_tokens", fail)
    ChatLogprobs(names).add(tokens)
