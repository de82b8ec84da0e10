"""Settings that the command line makes before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StandInSettings:
    """How stand-ins are looked for.

    Attributes:
        tokens: fitted to at the most, prompts and outputs.
        rank: of a map at the most; None: full.
        memory: bytes that the work may hold at the most.
    """

    tokens: int = 20_000
    rank: int | None = None
    memory: int = 1 << 30
