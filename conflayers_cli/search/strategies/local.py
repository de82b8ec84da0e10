"""Local: no search of its own, but the refinement that every strategy's plan goes through.

Refinement begins with the empty plan and the sub-layers' effects (see `search.local_search`), and
needs no start: what the papers' searches find, it finds in a fraction of their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.problem import SearchProblem, SearchResult
from conflayers_cli.search.strategies.base import check_depth
from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class Local:
    """Nothing is left out before refinement."""

    name: ClassVar[str] = "local"
    setting: ClassVar[DraftParams] = PAPER

    def search(self, problem: SearchProblem) -> SearchResult:
        """The empty plan; InputError: the model is too shallow."""
        check_depth(problem.decoder)
        return SearchResult(SkipPlan(), (), {}, False, "refinement is the search")
