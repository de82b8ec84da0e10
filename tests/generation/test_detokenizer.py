"""Text as it is decided: whole characters, nothing of a stop string, nothing lost."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conflayers_cli.generation.detokenizer import Detokenizer

END = "<end>"
SAMPLE = ["the cat and the dog and the end of the day", "stop here", "naïve café", "🙂 日本語"]
# What is easily cut in two: several bytes a character, several characters a sign.
LETTERS = "abSTOPEND \n\té§ßñ日本語€🙂👩‍🚀🇩🇪\u0301\u200d\ufb01"
TEXTS = st.text(st.sampled_from(LETTERS), max_size=40) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20
)


@functools.cache
def tokenizer(merges: bool = True) -> Any:
    """Byte-level BPE, with few merges: most characters beyond ASCII are several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 320 if merges else len(alphabet) + 1
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def ids(text: str, merges: bool = True) -> list[int]:
    encoded: list[int] = tokenizer(merges).encode(text, add_special_tokens=False)
    return encoded


def decoded(tokens: list[int]) -> str:
    text: str = tokenizer().decode(tokens, skip_special_tokens=True)
    return text


def parts(stream: Detokenizer, tokens: list[int]) -> list[str]:
    """What is taken after each token, and the rest; ends at a stop string, as decoding would."""
    taken = []
    for token in tokens:
        stopped = stream.feed(token)
        taken.append(stream.take())
        if stopped:
            break
    return [*taken, stream.finish()]


@settings(max_examples=300)
@given(TEXTS, st.booleans())
def test_parts_are_the_text_and_never_half_a_character(text: str, merges: bool) -> None:
    stream = Detokenizer(tokenizer(merges))
    taken = parts(stream, ids(text, merges))
    assert "".join(taken) == stream.text == text
    assert not any("\ufffd" in part for part in taken)
    assert not stream.stopped


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokens = ids("a🙂b", merges=False)
    assert len(tokens) == 6
    assert parts(Detokenizer(tokenizer(False)), tokens) == ["a", "", "", "", "🙂", "b", ""]


def test_half_a_character_at_the_end_is_a_replacement_character() -> None:
    tokens = ids("a🙂", merges=False)[:-2]
    assert parts(Detokenizer(tokenizer(False)), tokens) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    """A run of continuation bytes never becomes a character."""
    byte = ids("é", merges=False)[1]
    taken = parts(Detokenizer(tokenizer(False)), [byte] * 20 + ids("x", merges=False))
    assert "".join(taken) == "\ufffd" * 20 + "x"
    assert "\ufffd" in "".join(taken[:10])


def test_a_character_behind_a_run_of_such_bytes_is_whole() -> None:
    first, second = ids("é", merges=False)
    tokens = [second] * 7 + [first, second, *ids("x", merges=False)]
    assert "".join(parts(Detokenizer(tokenizer(False)), tokens)) == "\ufffd" * 7 + "éx"


# Starts and ends of characters, so that at random some become whole after a run of rubbish.
PIECES = ids("éé🙂", merges=False)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 256) | st.sampled_from(PIECES), max_size=30))
def test_any_tokens_give_what_decoding_gives_at_once(tokens: list[int]) -> None:
    """Bytes at random: most are no text, some are half a character."""
    stream = Detokenizer(tokenizer(False))
    whole: str = tokenizer(False).decode(tokens, skip_special_tokens=True)
    assert "".join(parts(stream, tokens)) == whole


def test_special_tokens_give_no_text() -> None:
    end = tokenizer().convert_tokens_to_ids(END)
    tokens = [end, *ids("the 🙂"), end, *ids("dog"), end]
    assert "".join(parts(Detokenizer(tokenizer()), tokens)) == "the 🙂dog"


@settings(max_examples=300)
@given(
    TEXTS,
    st.text(st.sampled_from(LETTERS), min_size=1, max_size=4),
    TEXTS,
    st.booleans(),
)
@example("aS", "STOP", "b", False)  # the start of a stop string right before it
@example("a", "🙂", "b", False)
def test_a_stop_string_and_what_follows_is_cut(
    before: str, stop: str, after: str, merges: bool
) -> None:
    text = before + stop + after
    tokens = ids(text, merges)
    stream = Detokenizer(tokenizer(merges), [stop])
    taken = parts(stream, tokens)
    assert stream.stopped
    assert "".join(taken) == stream.text == text[: text.index(stop)]
    assert stream.feed(tokens[0])  # later tokens are ignored
    assert stream.take() == stream.finish() == ""
    assert stream.text == text[: text.index(stop)]


@settings(max_examples=150)
@given(TEXTS, st.text(st.sampled_from(LETTERS), min_size=1, max_size=4))
def test_a_stop_string_that_never_comes_withholds_nothing(text: str, stop: str) -> None:
    assume(stop not in text)
    stream = Detokenizer(tokenizer(), [stop])
    assert "".join(parts(stream, ids(text))) == text
    assert not stream.stopped


@settings(max_examples=200)
@given(
    st.text("abc", max_size=25),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_of_several_stop_strings_the_first_to_be_complete(text: str, stops: list[str]) -> None:
    """One character a token: the earliest end decides; of several with that end, the earliest
    start."""
    ends = [text[:n] for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stops))]
    expected = text
    if ends:
        expected = min((ends[0].removesuffix(s) for s in stops if ends[0].endswith(s)), key=len)
    stream = Detokenizer(tokenizer(False), stops)
    assert "".join(parts(stream, ids(text, merges=False))) == expected
    assert stream.stopped == bool(ends)


def test_stop_strings_across_tokens() -> None:
    stream = Detokenizer(tokenizer(False), ["STOP"])
    assert [stream.feed(token) for token in ids("aSTSTOPb", merges=False)] == [False] * 6 + [
        True
    ] * 2
    assert stream.finish() == "aST"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = Detokenizer(tokenizer(False), ["STOP", "\n\n"])
    taken = parts(stream, ids("xSTa\nb", merges=False))
    assert taken == ["x", "", "", "STa", "", "\nb", ""]


@pytest.mark.parametrize("stops", [(), ("",)])
def test_an_empty_stop_string_is_none(stops: tuple[str, ...]) -> None:
    stream = Detokenizer(tokenizer(), stops)
    assert "".join(parts(stream, ids("the end"))) == "the end"


def test_a_special_token_ends_the_text_where_its_text_is_a_stop() -> None:
    end = tokenizer().convert_tokens_to_ids(END)
    stream = Detokenizer(tokenizer(), [END])
    assert not any(stream.feed(token) for token in ids("the 🙂"))
    assert stream.feed(end)
    assert stream.take() + stream.finish() == "the 🙂"
    assert stream.stopped


def test_special_tokens_may_stay_in_the_text() -> None:
    end = tokenizer().convert_tokens_to_ids(END)
    tokens = [*ids("the "), end, *ids("dog")]
    assert "".join(parts(Detokenizer(tokenizer(), keep_special=True), tokens)) == f"the {END}dog"


class Words:
    """A tokenizer that drops the space before the first word of a text, as SentencePiece does."""

    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(f" w{token}" for token in tokens)[1:]


def test_a_text_goes_on_behind_its_prompt() -> None:
    assert "".join(parts(Detokenizer(Words(), prompt=[1, 2]), [3, 4])) == " w3 w4"
    assert "".join(parts(Detokenizer(Words()), [3, 4])) == "w3 w4"
