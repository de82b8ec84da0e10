"""Drafting with another plan where the text is longer (KnapSpec, arXiv 2602.20217)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.spec_decode.proposer import BatchProposer, Context, Draft, Proposer


@dataclass(frozen=True)
class ContextLengthProposer:
    """Hands each draft to the drafter for the length of the text.

    Attributes:
        drafters: (from how many tokens on, drafter), ascending, the first from 0 on; None drafts
            nothing.

    Raises:
        ValueError: there is no drafter from 0 on, or the lengths are not ascending.
    """

    drafters: Sequence[tuple[int, Proposer | None]]

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.drafters]
        if not lengths or lengths[0] != 0 or lengths != sorted(set(lengths)):
            raise ValueError(f"ascending lengths from 0 on are needed, got {lengths}")

    @property
    def name(self) -> str:
        return next((each.name for _, each in self.drafters if each is not None), "none")

    def draft(self, context: Context, limit: int) -> Draft:
        drafter = self._for(len(context.tokens))
        return Draft() if drafter is None else drafter.draft(context, limit)

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        """Drafts for several rows by the drafter for the longest of them.

        Raises:
            TypeError: it drafts for single rows only.
        """
        drafter = self._for(max(len(context.tokens) for context in contexts))
        if drafter is None:
            return [Draft()] * len(contexts)
        if not isinstance(drafter, BatchProposer):
            raise TypeError(f"{type(drafter).__name__} drafts for one row at a time")
        return drafter.propose_batch(contexts, limits)

    def _for(self, length: int) -> Proposer | None:
        return [each for begin, each in self.drafters if begin <= length][-1]
