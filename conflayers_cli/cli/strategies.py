"""From the command line's options to the strategies that ``calibrate`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.own_strategy import FORM, content_of, is_own, own_strategy
from conflayers_cli.cli.skip_only import check_target_speedup
from conflayers_cli.errors import InputError
from conflayers_cli.utils.suggest import did_you_mean

if TYPE_CHECKING:
    from conflayers_cli.search.problem import Strategy

AUTO = "auto"
UNIFIED = "unified"
STRATEGIES = ("conflayers", "swift", "knapsack", "clasp", "greedy", UNIFIED, AUTO)
AUTO_TARGETS = (1.5, 2.0)
"""Unified's target speed-ups that auto looks at."""


@dataclass(frozen=True)
class SearchOptions:
    """What the command line says about the search; None: the strategy's own default."""

    skip_ratio: float | None = None
    search_interval: int | None = None
    max_iterations: int | None = None
    patience: int | None = None
    context_window: int | None = None
    target_speedup: float | None = None
    budget: float | None = None


_TAKES: dict[str, frozenset[str]] = {
    "conflayers": frozenset(
        {"skip_ratio", "search_interval", "max_iterations", "patience", "context_window"}
    ),
    "swift": frozenset({"skip_ratio", "max_iterations", "patience", "context_window"}),
    "knapsack": frozenset(),
    "clasp": frozenset(),
    "greedy": frozenset({"patience"}),
    UNIFIED: frozenset({"target_speedup"}),
    AUTO: frozenset({"budget"}),
}


def check_options(name: str, options: SearchOptions) -> None:
    """Refuse an unknown strategy and options that it does not take.

    Raises:
        InputError: the message names what there is.
    """
    if name not in STRATEGIES and not is_own(name):
        hint = did_you_mean(name, STRATEGIES)
        raise InputError(
            f"--strategy {name}: there is {', '.join(STRATEGIES)}, or {FORM} of your own{hint}"
        )
    given = {key for key, value in vars(options).items() if value is not None}
    stray = sorted(given - _TAKES.get(name, frozenset()))
    if stray:
        takers = [other for other in STRATEGIES if stray[0] in _TAKES[other]]
        flag = "--" + stray[0].replace("_", "-")
        raise InputError(
            f"{flag} goes with --strategy {' or '.join(takers)}; {name} has no use for it"
        )
    if name == UNIFIED and options.target_speedup is None:
        raise InputError("--strategy unified needs --target-speedup S, 1.5 for one")
    check_target_speedup(options.target_speedup)


def identity_of(name: str) -> str:
    """What a search with this strategy can be gone on with by: its name, or what its file says."""
    return content_of(name) if is_own(name) else name


def make_strategies(name: str, options: SearchOptions) -> list[Strategy]:
    """The strategies behind a name, in the order they run: several for ``auto``, else one.

    Raises:
        InputError: swift without scikit-learn; a file of one's own that holds no strategy.
    """
    from conflayers_cli.search.strategies.conflayers import ConfLayers
    from conflayers_cli.search.strategies.greedy import Greedy
    from conflayers_cli.search.strategies.knapsack import Knapsack
    from conflayers_cli.search.strategies.swift import Swift, require_sklearn, sklearn_there
    from conflayers_cli.search.strategies.unified import Unified

    if is_own(name):
        return [own_strategy(name, STRATEGIES)]
    if name == AUTO:
        every: list[Strategy] = [Unified(target) for target in AUTO_TARGETS]
        every += [Knapsack(), ConfLayers(), Greedy(), Knapsack.clasp()]
        return [*every, Swift()] if sklearn_there() else every
    given = {key: value for key, value in vars(options).items() if value is not None}
    if name == "swift":
        require_sklearn()
        if "max_iterations" in given:
            given["max_steps"] = given.pop("max_iterations")
    makers: dict[str, Any] = {
        "conflayers": ConfLayers,
        "swift": Swift,
        "knapsack": Knapsack,
        "clasp": Knapsack.clasp,
        "greedy": Greedy,
        UNIFIED: Unified,
    }
    strategy: Strategy = makers[name](**given)
    return [strategy]
