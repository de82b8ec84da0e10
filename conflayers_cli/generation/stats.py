"""Seconds, tokens and drafts of one generation, or of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from conflayers_cli.generation.positions import AcceptedPerPosition, count_positions
from conflayers_cli.generation.sequence import Step

_SUMMED = ("prefill_seconds", "decode_seconds", "draft_seconds", "tokens", "decode_tokens", "steps")


@dataclass(frozen=True)
class DraftCount:
    """What one proposer did."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: DraftCount) -> DraftCount:
        return DraftCount(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


T = TypeVar("T", DraftCount, AcceptedPerPosition)


@dataclass(frozen=True)
class GenerationStats:
    """Statistics of decoding.

    Attributes:
        prefill_seconds: the pass over the prompt, which also decides the first token.
        decode_seconds: all steps behind it.
        tokens: tokens produced.
        decode_tokens: those of the steps behind the prefill.
        steps: those steps.
        by_drafter: what each proposer did in them; steps without a draft are not in it.
        draft_seconds: the part of ``decode_seconds`` spent on drafts that held a token.
        by_position: what each proposer did by position in the draft.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    by_drafter: Mapping[str, DraftCount] = field(default_factory=dict)
    draft_seconds: float = 0.0
    by_position: Mapping[str, AcceptedPerPosition] = field(default_factory=dict)

    @classmethod
    def from_steps(cls, steps: Iterable[Step]) -> GenerationStats:
        """The statistics of a generation's steps."""
        return cls.total(map(_step_stats, steps))

    @classmethod
    def total(cls, summaries: Iterable[GenerationStats]) -> GenerationStats:
        """The statistics of several generations together."""
        parts = list(summaries)
        return cls(
            by_drafter=_merge(part.by_drafter for part in parts),
            by_position=_merge(part.by_position for part in parts),
            **{name: sum(getattr(part, name) for part in parts) for name in _SUMMED},
        )

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(count.drafted for count in self.by_drafter.values())

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(count.accepted for count in self.by_drafter.values())

    @property
    def tokens_per_second(self) -> float | None:
        """Without the prefill; None where nothing was decoded behind it."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that were kept; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def drafted_by(self) -> str | None:
        """Who drafted how much, for people; None unless several did."""
        if len(self.by_drafter) < 2:
            return None
        parts = (
            f"{name} {count.drafted} ({count.accepted / count.drafted:.1%} accepted)"
            for name, count in self.by_drafter.items()
        )
        return f"drafted by: {', '.join(parts)}"

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens per full pass behind the prefill; None where there was none."""
        return self.decode_tokens / self.steps if self.steps else None

    def as_json(self) -> dict[str, Any]:
        """The statistics as JSON takes them."""
        return {
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "tokens": self.tokens,
            "decode_tokens": self.decode_tokens,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_second": self.tokens_per_second,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
            "by_drafter": {name: asdict(count) for name, count in self.by_drafter.items()},
        }


def _merge(parts: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """The sums by proposer."""
    total: dict[str, T] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total[name] + count if name in total else count
    return total


def _step_stats(step: Step) -> GenerationStats:
    count = len(step.tokens)
    if step.proposer == "prefill":
        return GenerationStats(prefill_seconds=step.seconds, tokens=count)
    positions = count_positions(step)
    return GenerationStats(
        decode_seconds=step.seconds,
        tokens=count,
        decode_tokens=count,
        steps=1,
        by_drafter={
            name: DraftCount(1, sum(at.drafted), sum(at.accepted)) for name, at in positions.items()
        },
        draft_seconds=step.draft_seconds,
        by_position=positions,
    )
