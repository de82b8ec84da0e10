"""Token ids → text, incrementally: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
# A character is at most four bytes, hence four byte tokens. A longer run of undecodable tokens is
# not going to become one.
_CHARACTER_TOKENS = 4
_MAX_HELD_TOKENS = 8


class Detokenizer:
    """Decodes a growing list of tokens.

    Args:
        tokenizer: a transformers tokenizer.
        stops: strings that end the text; they are not part of it. One that a special token is
            written as is that token: special tokens are no part of the text.
        keep_special: whether special tokens are part of the text all the same.
        prompt: tokens that the text goes on behind, as one text with theirs: a SentencePiece
            tokenizer drops the space before the first word of a text of its own.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        keep_special: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._stops = tuple(filter(None, stops))
        self._stop_tokens = frozenset(special_tokens(tokenizer, self._stops).values())
        self._tokens: list[int] = list(prompt[-_MAX_HELD_TOKENS:])
        self._context = 0  # tokens decoded along, so that spaces between words come out right
        self._decided = len(self._tokens)  # tokens whose text has been decided
        self._pending = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> bool:
        """Add one token. True when a stop string is complete; later tokens are ignored."""
        if self.stopped:
            return True
        if token in self._stop_tokens:
            self._advance(spare=0)
            self._cut_at_stop()
            self.stopped = True
            return True
        self._tokens.append(token)
        self._advance()
        if len(self._tokens) - self._decided >= _MAX_HELD_TOKENS:
            self._advance(spare=_CHARACTER_TOKENS - 1)
        return self._cut_at_stop()

    def take(self) -> str:
        """The text that has become certain since the last call, possibly empty."""
        ready = self._pending[: len(self._pending) - self._stop_prefix_length()]
        self._pending = self._pending[len(ready) :]
        self.text += ready
        return ready

    def finish(self) -> str:
        """The rest of the text, half characters included as replacement characters."""
        if not self.stopped:
            self._advance(spare=0)
            self._cut_at_stop()
        rest, self._pending = self._pending, ""
        self.text += rest
        return rest

    def _advance(self, spare: int | None = None) -> None:
        """Decide the text of all tokens if it ends in a whole character.

        With ``spare``, decide that of all but as many last tokens, whatever it ends in.
        """
        end = len(self._tokens) - (spare or 0)
        before = self._decode(self._tokens[self._context : self._decided])
        now = self._decode(self._tokens[self._context : end])
        whole = spare is not None or not now.endswith(_REPLACEMENT)
        if len(now) > len(before) and whole:
            self._pending += now[len(before) :]
            self._context, self._decided = self._decided, end

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens,
            skip_special_tokens=not self._keep_special,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _cut_at_stop(self) -> bool:
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self._pending = self._pending[: min(found)]
            self.stopped = True
        return self.stopped

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the pending text that may become a stop string."""
        lengths = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(self._pending)), 0, -1)
            if self._pending.endswith(stop[:length])
        )
        return 0 if self.stopped else max(lengths, default=0)


def special_tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """The special tokens that these texts are written as; a text that is none is left out."""
    if not texts:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {str(token): number for number, token in added.items() if token.special}
    return {text: known[text] for text in texts if text in known}
