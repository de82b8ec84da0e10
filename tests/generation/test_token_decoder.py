"""What is decoded piece by piece against the whole, for every kind of decoder."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from conflayers_cli.generation.detokenizer import Detokenizer
from tests.generation.test_detokenizer import parts

SPECIAL, ADDED = "<end>", "<added one>"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
RUNS = bytes("é€🙂", "utf-8")
"""Bytes of which some characters can be made."""
METASPACE = ["▁", "▁the", "▁a", "cat", "▁.", ",", "日", "\ufffd", "", "▁▁", "\n", "▁n't", "<0x4G>"]
SUFFIXED = ["the</w>", "cat</w>", "ca", "t</w>", ".</w>", "a</w>b", "x", "</w>", "日</w>"]
WORDS = ["the", "##s", "cat", ".", "?", "!", ",", "'", "n't", "'m", "do", "not", "s", "日", "##'s"]
SPACED = ["a", " ", ".", " .", "?", " '", "' ", "'", " n", "'t", " '", "s", "ve", " '", "re", "\ufffd"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

KINDS: dict[str, tuple[list[str], Any]] = {
    "byte-level": (sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġth", "ðŁĻ", "日"], "ByteLevel"),
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


@settings(max_examples=1500)
@given(texts(), st.booleans())
def test_pieces_are_what_decoding_gives_at_once(text: tuple[Any, list[int]], keep: bool) -> None:
    its, tokens = text
    taken = parts(Detokenizer(its, keep_special=keep), tokens)
    assert "".join(taken) == its.decode(tokens, skip_special_tokens=not keep)
