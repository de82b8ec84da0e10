"""What a drafter remembers of the texts it drafts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from conflayers_cli.spec_decode.acceptance import FRESH, KEPT, NOTHING, REFUSED, Bias, Mark, Trail
from conflayers_cli.spec_decode.ngram import NgramIndex

REMEMBERED = 8
"""Texts remembered at the least, for a drafter that serves several in turn."""


@dataclass(frozen=True)
class Last:
    """What was drafted last: the place of the text's last token, it and the draft, by whom."""

    start: int
    tokens: tuple[int, ...]
    sources: tuple[str, ...]


@dataclass
class Text:
    """One text, as the drafter knows it.

    Attributes:
        tokens: the list that it is kept in, which grows.
        index: its n-grams.
        bias: how it differs from other texts.
        trails: what was proposed for places that it has not come to yet.
        last: the last draft.
    """

    tokens: list[int]
    index: NgramIndex = field(default_factory=NgramIndex)
    bias: Bias = field(default_factory=Bias)
    trails: list[Trail] = field(default_factory=list)
    last: Last | None = None

    def learn(self) -> None:
        """Compare what was proposed with what the text has become."""
        self.trails = [trail for trail in self.trails if not trail.follow(self.tokens)]

    def outcome(self) -> tuple[int, int]:
        """(how the last draft fared, as a beginning of the next; its skip tokens that stood)."""
        if self.last is None or "skip" not in self.last.sources:
            return FRESH, 0
        drafted = self.last.tokens
        text = self.tokens[self.last.start : self.last.start + len(drafted)]
        same = 0
        while same < len(text) and text[same] == drafted[same]:
            same += 1
        # The first one is the text's own last token then.
        stood = self.last.sources[: max(same - 1, 0)].count("skip")
        return (KEPT if same == len(drafted) else REFUSED), stood

    def propose(self, tokens: Sequence[int], marks: Sequence[Mark]) -> None:
        """Note what was proposed behind the text as it is, to be learnt from as the text grows.

        The text's last token counts, too: it may be taken back.
        """
        trail = [self.tokens[-1], *tokens], [NOTHING, *marks]
        self.trails.append(Trail(len(self.tokens) - 1, *trail))

    def drafted(self, tokens: Sequence[int], sources: Sequence[str]) -> None:
        """Note the draft that is to be verified."""
        self.last = Last(len(self.tokens) - 1, (self.tokens[-1], *tokens), tuple(sources))


class Texts:
    """The texts at work, and some that were; a text is the list that its tokens are kept in."""

    def __init__(self, index: bool) -> None:
        self._index = index
        self._known: dict[int, Text] = {}

    def __contains__(self, tokens: list[int]) -> bool:
        known = self._known.get(id(tokens))
        return known is not None and known.tokens is tokens

    def __len__(self) -> int:
        return len(self._known)

    def at_hand(self, lists: Sequence[list[int]]) -> list[Text]:
        """The texts in these lists, brought up to date; those longest out of use are forgotten.

        Each holds its list, so no other list comes by the same id while it is known.
        """
        texts = [self._text(tokens) for tokens in lists]
        for key in list(self._known)[: -max(REMEMBERED, 2 * len(texts))]:
            del self._known[key]
        return texts

    def _text(self, tokens: list[int]) -> Text:
        text = self._known.pop(id(tokens), None)
        if text is None:
            for other in self._known.values():  # their last drafts have been decided meanwhile
                other.learn()
            text = Text(tokens)
        self._known[id(tokens)] = text  # the latest used is the last
        text.learn()
        if self._index:
            text.index.update(tokens)
        return text
