"""What is decoded piece by piece against the whole, for every kind of decoder."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from conflayers_cli.generation.detokenizer import Detokenizer
from conflayers_cli.generation.text_stages import common_prefix
from tests.generation.test_detokenizer import parts

SPECIAL, ADDED = "<end>", "<added one>"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
RUNS = bytes("é€🙂", "utf-8")
"""Bytes of which some characters can be made."""
METASPACE = ["▁", "▁the", "▁a", "cat", "▁.", ",", "日", "\ufffd", "", "▁▁", "\n", "▁n't", "<0x4G>"]
SUFFIXED = ["the</w>", "cat</w>", "ca", "t</w>", ".</w>", "a</w>b", "x", "</w>", "日</w>"]
WORDS = ["the", "##s", "cat", ".", "?", "!", ",", "'", "n't", "'m", "do", "not", "s", "日", "##'s"]
SPACED = [
    "a",
    " ",
    ".",
    " .",
    "?",
    " '",
    "' ",
    "'",
    " n",
    "'t",
    " '",
    "s",
    "ve",
    " '",
    "re",
    "\ufffd",
]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

KINDS: dict[str, tuple[list[str], Any]] = {
    "byte-level": ([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġth", "ðŁĻ", "日"], "ByteLevel"),
    "byte fallback": ([*METASPACE, *BYTES], decoders.Sequence(LLAMA)),
    "byte fallback, a space stripped": (
        [*METASPACE, *BYTES],
        decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    ),
    "byte fallback and metaspace": (
        [*METASPACE, *BYTES],
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    ),
    "metaspace": (METASPACE, decoders.Metaspace()),
    "metaspace, never": (METASPACE, decoders.Metaspace(prepend_scheme="never")),
    "word pieces": (WORDS, decoders.WordPiece()),
    "word pieces as they are": (WORDS, decoders.WordPiece(cleanup=False)),
    "suffixes": (SUFFIXED, decoders.BPEDecoder()),
    "CTC": (["<pad>", "|", "a", "b", "n't", "."], decoders.CTC()),
    "none": (WORDS, None),
    "replaced": (
        ["ab", "a", "b", "ba", " ", "aab"],
        decoders.Sequence(
            [
                decoders.Replace(Regex("aa+"), "b"),
                decoders.Strip("b", 1, 0),
                decoders.Fuse(),
                decoders.Replace("ab", "c"),
                decoders.Replace("bcb", "-"),
            ]
        ),
    ),
    "replaced after all": (  # a decoder that isn't known: a word at a time
        ["the ", "cat ", "dog ", "a "],
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("[ck]at"), "CAT")]),
    ),
    "spaces cleaned up": (SPACED, decoders.Fuse()),
}


@functools.cache
def tokenizer(kind: str, clean: bool) -> Any:
    """Its vocabulary's first tokens are two added ones, one of them special."""
    words, decoder = KINDS[kind]
    vocabulary = [(word, 0.0) for word in dict.fromkeys(words)]
    own = Tokenizer(models.Unigram([*vocabulary, ("<unk>", 0.0)], len(vocabulary), False))
    own.add_special_tokens([AddedToken(SPECIAL, special=True)])
    own.add_tokens([ADDED])
    if decoder is not None:
        own.decoder = decoders.ByteLevel() if decoder == "ByteLevel" else decoder
    return PreTrainedTokenizerFast(tokenizer_object=own, clean_up_tokenization_spaces=clean)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Any, list[int]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    its = tokenizer(kind, draw(st.booleans()))
    known = {token: number for token, number in its.get_vocab().items() if token in BYTES}
    likely = [known[BYTES[value]] for value in RUNS if known] or [0]
    # beyond the vocabulary, too
    ids = st.integers(0, len(its) + 2) | st.sampled_from(likely)
    runs = st.lists(st.sampled_from([(0, 2), (2, 5), (5, 9), (0, 9), (0, 1)]), max_size=3)
    tokens = draw(st.lists(ids, max_size=25))
    for begin, end in draw(runs):
        tokens += likely[begin:end]
    return its, tokens + draw(st.lists(ids, max_size=4))


@settings(max_examples=300)
@given(texts(), st.booleans())
def test_pieces_are_what_decoding_gives_at_once(text: tuple[Any, list[int]], keep: bool) -> None:
    its, tokens = text
    taken = parts(Detokenizer(its, keep_special=keep), tokens)
    assert "".join(taken) == its.decode(tokens, skip_special_tokens=not keep)


def settled(its: Any, tokens: list[int], beyond: list[list[int]]) -> str:
    """What all texts that go on from these tokens begin with."""
    texts = [its.decode(tokens + more, skip_special_tokens=True) for more in beyond]
    return texts[0][: min(common_prefix(texts[0], text) for text in texts)]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"replaced after all"}))
def test_a_piece_comes_as_soon_as_no_later_token_can_change_it(kind: str) -> None:
    its = tokenizer(kind, False)
    size, numbers = len(its), its.get_vocab()
    beyond = [[], *([token] for token in range(size))]
    if size < 20:
        beyond += [[one, other] for one in range(size) for other in range(size)]
    for value in (0x80, 0x90, 0xA0):  # ends of characters
        letters = [f"<0x{value:02X}>", "<0x80>"]
        if kind == "byte-level":  # GPT-2's letters for them
            letters = [chr(value - 0x80 + 0x122), chr(0x122)]
        if letters[0] in numbers:
            first, more = (numbers[each] for each in letters)
            beyond += [[first, *[more] * count] for count in range(1, 3)]
    chance = random.Random(0)
    for _ in range(4):
        tokens = [chance.randrange(size) for _ in range(6)]
        stream = Detokenizer(its)
        for count, token in enumerate(tokens, 1):
            stream.feed(token)
            stream.take()
            assert stream.text == settled(its, tokens[:count], beyond), tokens[:count]


@settings(max_examples=200)
@given(texts(), st.integers(0, 30), st.integers(1, 4), st.integers(0, 9))
def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(
    text: tuple[Any, list[int]], begin: int, length: int, other: int
) -> None:
    """Also where the tokenizer might still read that token in another way."""
    its, tokens = text
    whole = its.decode(tokens, skip_special_tokens=True)
    stops = [stop for stop in (whole[begin : begin + length], whole[other : other + 2]) if stop]
    stream = Detokenizer(its, stops)
    expected, stopped = whole, False
    for count in range(1, len(tokens) + 1):
        so_far = its.decode(tokens[:count], skip_special_tokens=True)
        found = [so_far.index(stop) for stop in stops if stop in so_far]
        if found and (count == len(tokens) or not so_far.endswith("\ufffd")):
            expected, stopped = so_far[: min(found)], True
            break
    taken = parts(stream, tokens)
    assert ("".join(taken), stream.stopped) == (expected, stopped)


@settings(max_examples=200)
@given(texts(), st.integers(0, 25))
def test_behind_a_prompt_a_text_is_what_it_adds(text: tuple[Any, list[int]], cut: int) -> None:
    its, tokens = text
    prompt, whole = (its.decode(ids, skip_special_tokens=True) for ids in (tokens[:cut], tokens))
    stream = Detokenizer(its, prompt=tokens[:cut])
    taken = "".join(parts(stream, tokens[cut:]))
    assert taken == whole[common_prefix(prompt, whole) :]


def test_lines_of_byte_tokens_stop_at_once() -> None:
    """SentencePiece vocabularies without a line feed spell it as a byte."""
    its = tokenizer("byte fallback", False)
    the, feed = its.convert_tokens_to_ids(["▁the", "<0x0A>"])
    stream = Detokenizer(its, ["\n\n"])
    assert [stream.feed(token) for token in (the, feed, feed)] == [False, False, True]
    assert stream.take() + stream.finish() == " the"


class Joined(PreTrainedTokenizer):
    """Written in Python: "@@" joins a token to the next, as CTRL's and BlenderBot's."""

    words = ("the", "ca@@", "t", "d@@", "og", ".", "?", "re@@", "s")

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "")


class Loud(PreTrainedTokenizerFast):
    """With a decoding of its own, in which the first letter is a capital one."""

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        text: str = super()._decode(token_ids, *args, **kwargs)
        return text.replace("cat", "CAT")

    def clean_up_tokenization(self, text: str) -> str:
        return text.replace(" ?", "??")


@settings(max_examples=150)
@given(st.lists(st.integers(0, 8), max_size=60), st.booleans())
def test_tokenizers_in_python_come_a_token_later(tokens: list[int], clean: bool) -> None:
    its = Joined(clean_up_tokenization_spaces=clean)
    taken = parts(Detokenizer(its), tokens)
    assert "".join(taken) == its.decode(tokens, skip_special_tokens=True)
    assert all(taken[2:-1]) or "@@" in its.decode(tokens) or clean


@settings(max_examples=100)
@given(st.text(st.sampled_from("aé€🙂 "), max_size=40))
def test_bytes_read_in_python(text: str) -> None:
    its = ByT5Tokenizer()
    tokens = its.encode(text, add_special_tokens=False)
    assert "".join(parts(Detokenizer(its), tokens)) == text


@settings(max_examples=100)
@given(st.lists(st.integers(0, 14), max_size=40), st.booleans())
def test_a_decoding_of_the_tokenizers_own(tokens: list[int], clean: bool) -> None:
    own = tokenizer("word pieces", False).backend_tokenizer
    its = Loud(tokenizer_object=own, clean_up_tokenization_spaces=clean)
    taken = "".join(parts(Detokenizer(its), tokens))
    assert taken == its.decode(tokens, skip_special_tokens=True)
