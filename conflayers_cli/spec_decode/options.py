"""Draft options: plain values that need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


class DraftMethod(StrEnum):
    """Who drafts: skipped layers, n-grams, both, or nobody."""

    SKIP = "skip"
    NGRAM = "ngram"
    MIXED = "mixed"
    NONE = "none"

    @property
    def skips_layers(self) -> bool:
        """Whether some drafts come from the model with layers left out."""
        return self in (DraftMethod.SKIP, DraftMethod.MIXED)

    @property
    def uses_ngrams(self) -> bool:
        """Whether some drafts are n-grams of the text so far."""
        return self in (DraftMethod.NGRAM, DraftMethod.MIXED)

    @classmethod
    def parse(cls, name: str) -> DraftMethod:
        """The method of this name; InputError: there is none."""
        try:
            return cls(name)
        except ValueError:
            raise InputError(f"draft {name!r}: allowed is one of {', '.join(cls)}") from None


@dataclass(frozen=True)
class DraftOptions:
    """Who drafts, and how far; None leaves it to the profile, or without one to what pays.

    Attributes:
        method: who drafts.
        adaptive_draft_length: decide at every step how far drafting pays; False: as far as the
            profile says.
        tree: draft leaves beside the chain.
        batch_size: prompts decoded at once.
    """

    method: DraftMethod | None = None
    adaptive_draft_length: bool | None = None
    tree: bool | None = None
    batch_size: int = 1

    @property
    def by_ngrams(self) -> bool:
        """Whether n-grams may draft, by what is said here."""
        return self.method is None or self.method.uses_ngrams

    def check(self, profile: Path | None) -> None:
        """Raise InputError where options contradict each other; needs no model."""
        method, fixed = self.method, self.adaptive_draft_length is False
        if method and method.skips_layers and profile is None:
            raise InputError(
                f"draft {method} leaves out the layers that a profile names: give "
                "profile FILE, or draft ngram, which needs none",
                names=(f"draft {method}", "profile FILE", "draft ngram"),
            )
        if fixed and method and method.uses_ngrams:
            raise InputError(
                "adaptive_draft_length=False drafts as the profile says, by skipping alone: not "
                f"with draft {method}",
                names=("adaptive_draft_length=False", f"draft {method}"),
            )
        if self.adaptive_draft_length and method is DraftMethod.NONE:
            raise InputError(
                "adaptive_draft_length is about drafts, and nobody drafts: see draft",
                names=("adaptive_draft_length", "draft"),
            )
        name = "tree" if self.tree else "adaptive_draft_length=False"
        if (self.tree or fixed) and (profile is None or (method and not method.skips_layers)):
            raise InputError(
                f"{name} is about drafts by skipped layers, and there are none", names=(name,)
            )
        if (self.tree or fixed) and self.batch_size > 1:
            raise InputError(
                f"{name} is for one prompt at a time: leave batch_size out",
                names=(name, "batch_size"),
            )
