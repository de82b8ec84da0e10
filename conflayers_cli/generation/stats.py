"""What decoding took and what was drafted: of a step, of a text, of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conflayers_cli.generation.positions import AcceptedPerPosition, count_positions, merge
from conflayers_cli.generation.sequence import Step


@dataclass(frozen=True)
class DraftCount:
    """What one drafter did."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: DraftCount) -> DraftCount:
        return DraftCount(
            self.steps + other.steps,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


@dataclass(frozen=True)
class GenerationStats:
    """What decoding took, the prompt's pass apart from the rest.

    Attributes:
        prefill_seconds: the pass over the prompt, which also decides the first token.
        decode_seconds: all steps behind it.
        tokens: tokens produced.
        decode_tokens: those of the steps behind the prefill.
        steps: those steps.
        by_drafter: what each drafter did in them; steps without a draft are not in it.
        draft_seconds: the part of ``decode_seconds`` spent on drafts that held a token.
        by_position: what each drafter did by place in the draft.
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
    def of(cls, steps: Iterable[Step]) -> GenerationStats:
        """The summary of a generation's steps."""
        return cls.total(map(_of_step, steps))

    @classmethod
    def total(cls, summaries: Iterable[GenerationStats]) -> GenerationStats:
        """One summary of several generations."""
        parts = list(summaries)
        drafters: dict[str, DraftCount] = {}
        positions: dict[str, AcceptedPerPosition] = {}
        for part in parts:
            positions = merge(positions, part.by_position)
            for name, count in part.by_drafter.items():
                drafters[name] = drafters.get(name, DraftCount()) + count
        return cls(
            prefill_seconds=sum(part.prefill_seconds for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
            tokens=sum(part.tokens for part in parts),
            decode_tokens=sum(part.decode_tokens for part in parts),
            steps=sum(part.steps for part in parts),
            by_drafter=drafters,
            draft_seconds=sum(part.draft_seconds for part in parts),
            by_position=positions,
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
        """Of decoding, without the prefill; None where nothing was decoded behind it."""
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
        """The summary as JSON takes it."""
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
            "by_drafter": {
                name: {"steps": c.steps, "drafted": c.drafted, "accepted": c.accepted}
                for name, c in self.by_drafter.items()
            },
        }


def _of_step(step: Step) -> GenerationStats:
    count = len(step.tokens)
    if step.drafter == "prefill":
        return GenerationStats(prefill_seconds=step.seconds, tokens=count)
    return GenerationStats(
        decode_seconds=step.seconds,
        tokens=count,
        decode_tokens=count,
        steps=1,
        by_drafter=_by_drafter(step),
        draft_seconds=step.draft_seconds,
        by_position=count_positions(step),
    )


def _by_drafter(step: Step) -> dict[str, DraftCount]:
    """Who drafted how much in a step; the tokens that were kept are the chain's first ones."""
    sources = step.sources or (step.drafter,) * step.drafted
    return {
        name: DraftCount(1, sources.count(name), sources[: step.accepted].count(name))
        for name in dict.fromkeys(sources)
    }
