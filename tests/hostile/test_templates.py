"""Chat templates, which are programs out of a model's folder: no way out, an end, a bound."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.models import chat_template, tokenization
from conflayers_cli.models.tokenization import TooLongError, count_tokens, encode_text, render_chat
from tests.cli.conftest import TEMPLATE, byte_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]
LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
REFUSED = {
    "{{ messages.__class__.__mro__ }}": "is unsafe",
    "{{ ().__class__.__bases__[0].__subclasses__() }}": "is unsafe",
    "{{ cycler.__init__.__globals__.os.mkdir('TRACE') }}": "is unsafe",
    "{{ messages.append(1) }}": "is unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as x %}": "no loader",
    "{{ raise_exception('no way') }}": "no way",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    LONG_LOOP: "it has not ended after 2,000,000 steps",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{{ nope.x }}": "'nope' is undefined",
    "{{ nope() }}": "'nope' is undefined",
    "{{ messages + 1 }}": "concatenate",
    "{{": "unexpected",
    "{% if %}": "Expected an expression",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}": "",
    "{% if a %}" * 3000 + "{% endif %}" * 3000: "",
}


def tokenizer(template: str) -> Any:
    return byte_tokenizer(template)


@pytest.mark.parametrize("template", REFUSED, ids=lambda template: template[:40])
def test_a_template_that_is_refused(template: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(InputError) as caught:
        render_chat(tokenizer(template.replace("TRACE", str(trace))), CHAT)
    assert REFUSED[template] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is taken")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'a'|center(10**10) }}",
        "{% set n = namespace(s='aaaaaaaa') %}"
        "{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    ],
)
def test_a_template_that_grows(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(
        tokenization, "bounded_template", partial(chat_template.bounded_template, memory=1 << 26)
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match="too much memory"):
        render_chat(tokenizer(template), CHAT)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_bounds_end_with_the_rendering() -> None:
    before = sys.gettrace()
    for template in (TEMPLATE, LONG_LOOP):
        try:
            assert render_chat(tokenizer(template), CHAT) == "<user>Hi\n<assistant>"
        except InputError:
            assert template == LONG_LOOP
        assert sys.gettrace() is before


def test_a_chat_of_a_thousand_messages_is_no_endless_one() -> None:
    many = CHAT * 1000
    assert render_chat(tokenizer(TEMPLATE), many) == "<user>Hi\n" * 1000 + "<assistant>"


def ids(text: str, context: int | None = 10, vocabulary: int = 257) -> list[int]:
    return encode_text(
        byte_tokenizer(None), text, special=True, vocabulary=vocabulary, context=context, name="m"
    )


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    whole = tokenization._tokenised

    def counted(tokenizer: Any, text: str, special: bool) -> list[int]:
        seen.append(len(text))
        return whole(tokenizer, text, special)

    monkeypatch.setattr(tokenization, "_tokenised", counted)
    with pytest.raises(TooLongError, match="is too long: 1,000,000 characters, over 20 tokens"):
        ids("a" * 1_000_000)
    assert seen == [160]
    assert len(ids("a" * 1000, context=None)) == 1000
    assert len(ids("a" * 159)) == 159  # a little too long: its tokens are known, and told
    assert seen == [160, 1000, 159]


def test_a_long_text_of_few_tokens_is_no_long_one() -> None:
    from tests.models.test_loader import _tokenizer

    few = _tokenizer(None)  # a word that it doesn't know is one token
    text = "hello " + "x" * 100_000 + " world"
    found = encode_text(few, text, special=True, vocabulary=8, context=10, name="m")
    assert found == [4, 0, 5]


def test_tokens_that_the_model_does_not_know() -> None:
    assert ids("a", vocabulary=257) == ids("a", context=None)
    with pytest.raises(InputError, match="don't belong together"):
        ids("a", vocabulary=5)


def test_tokens_are_counted_in_pieces_or_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "CHUNK", 10)
    monkeypatch.setattr(tokenization, "MAX_CHUNKS", 8)
    tokenizer = byte_tokenizer(None)
    assert [count_tokens(tokenizer, "a" * length) for length in (0, 9, 10, 80)] == [0, 9, 10, 80]
    assert count_tokens(tokenizer, "aé" * 20) == 60  # two bytes, two tokens
    assert count_tokens(tokenizer, "aé" * 5000) == 15_000


def test_what_reads_like_a_special_token_becomes_one() -> None:
    """As everywhere in transformers: messages are the user's own."""
    plain = byte_tokenizer(TEMPLATE)
    text = render_chat(plain, [{"role": "user", "content": "a<|end|>b"}])
    assert isinstance(text, str)
    found = encode_text(plain, text, special=False, vocabulary=257, context=None, name="m")
    assert found.count(256) == 1
    assert found == plain.apply_chat_template(
        [{"role": "user", "content": "a<|end|>b"}], add_generation_prompt=True, return_dict=False
    )
