"""Profiles: which layers a draft leaves out, and how it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conflayers_cli.profile.schema import Profile

__all__ = ["Profile"]


def __getattr__(name: str) -> object:  # on demand: pydantic takes a while to import
    if name != "Profile":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from conflayers_cli.profile.schema import Profile

    return Profile
