"""Token ids → text, incrementally: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conflayers_cli.generation.text_stages import REPLACEMENT, prefix_length
from conflayers_cli.generation.token_decoder import token_decoder


class Detokenizer:
    """Decodes a growing list of tokens: a text's pieces, none of which is ever taken back.

    Together they are what the tokenizer decodes all tokens to at once, up to the first stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stops: strings that end the text; they are not part of it. One is found at the token with
            which the text, if it ended there, has it. One that a special token is written as is
            that token: special tokens are no part of the text.
        keep_special: whether special tokens are part of the text all the same.
        prompt: tokens that the text goes on behind, as one text with theirs.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        keep_special: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self._decoder = token_decoder(tokenizer, keep_special=keep_special, prompt=prompt)
        self._stops = tuple(filter(None, stops))
        self._stop_tokens = frozenset(special_tokens(tokenizer, self._stops).values())
        self._pending = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> bool:
        """Add one token. True when a stop string is complete; later tokens are ignored."""
        if self.stopped:
            return True
        if token in self._stop_tokens:
            self._end()
            self.stopped = True
            return True
        self._pending += self._decoder.feed(token)
        if self._stops and not (rest := self._decoder.peek()).endswith(REPLACEMENT):
            self._cut_at_stop(rest)  # with half a character there is more to come
        return self._cut_at_stop()

    def take(self) -> str:
        """The text that has become certain since the last call, possibly empty."""
        held = 0 if self.stopped else self._stop_prefix_length()
        ready = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(ready) :]
        self.text += ready
        return ready

    def finish(self) -> str:
        """The rest of the text, half characters included as replacement characters."""
        if not self.stopped:
            self._end()
        rest, self._pending = self._pending, ""
        self.text += rest
        return rest

    def _end(self) -> None:
        """Take what the decoder has held back for the end of the text."""
        rest = self._decoder.peek()
        if not self._cut_at_stop(rest):
            self._pending += rest

    def _cut_at_stop(self, rest: str = "") -> bool:
        """Cut the text at the first stop string in it; ``rest`` is not pending yet."""
        text = self._pending + rest
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found and not self.stopped:
            self._pending = text[: min(found)]
            self.stopped = True
        return self.stopped

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the pending text that may become a stop string."""
        return max((prefix_length(self._pending, stop) for stop in self._stops), default=0)


def special_tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, int]:
    """The special tokens that these texts are written as; a text that is none is left out."""
    if not texts:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {str(token): number for number, token in added.items() if token.special}
    return {text: known[text] for text in texts if text in known}
