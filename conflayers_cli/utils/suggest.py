"""What a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A clause to put behind an error: ``; did you mean X?``, or nothing where none is near.

    Args:
        word: what was given.
        known: what there is.
        cutoff: how near, from 0 to 1, a name has to be.
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[close[0]]}?" if close else ""
