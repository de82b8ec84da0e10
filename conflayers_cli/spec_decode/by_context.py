"""Drafting with another plan where the text is longer (KnapSpec, arXiv 2602.20217)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.spec_decode.proposer import BatchProposer, Context, Draft, Proposer


@dataclass(frozen=True)
class ContextLengthProposer:
    """Leaves each draft to the proposer for the length of the text.

    Attributes:
        proposers: (minimum length in tokens, proposer), ascending from 0; None drafts nothing.

    Raises:
        ValueError: the lengths are not ascending from 0.
    """

    proposers: Sequence[tuple[int, Proposer | None]]

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.proposers]
        if not lengths or lengths[0] != 0 or lengths != sorted(set(lengths)):
            raise ValueError(f"ascending lengths from 0 on are needed, got {lengths}")

    @property
    def name(self) -> str:
        return next((each.name for _, each in self.proposers if each is not None), "none")

    def propose(self, context: Context, limit: int) -> Draft:
        proposer = self._at(len(context.tokens))
        return Draft() if proposer is None else proposer.propose(context, limit)

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        """By the proposer for the longest sequence; TypeError: it drafts for one at a time."""
        proposer = self._at(max(len(context.tokens) for context in contexts))
        if proposer is None:
            return [Draft()] * len(contexts)
        if not isinstance(proposer, BatchProposer):
            raise TypeError(f"{type(proposer).__name__} drafts for one sequence at a time")
        return proposer.propose_batch(contexts, limits)

    def _at(self, length: int) -> Proposer | None:
        return [each for begin, each in self.proposers if begin <= length][-1]
