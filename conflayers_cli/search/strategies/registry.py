"""The strategies by name, the settings each takes, and how they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.search.options import AUTO, LOCAL, UNIFIED, SearchOptions
from conflayers_cli.search.strategies.custom import FORM, hash_strategy, is_custom, load_strategy
from conflayers_cli.skip_plan import check_target_speedup
from conflayers_cli.utils.error_text import did_you_mean

if TYPE_CHECKING:
    from conflayers_cli.search.problem import Strategy

SETTINGS: dict[str, frozenset[str]] = {
    LOCAL: frozenset(),
    "conflayers": frozenset(
        {"skip_ratio", "search_interval", "max_iterations", "patience", "context_window"}
    ),
    "swift": frozenset({"skip_ratio", "max_iterations", "patience", "context_window"}),
    "knapsack": frozenset(),
    "clasp": frozenset(),
    "greedy": frozenset({"patience"}),
    UNIFIED: frozenset({"target_speedup"}),
    AUTO: frozenset(),
}
"""Settings that each strategy takes."""
STRATEGIES = tuple(SETTINGS)
AUTO_TARGETS = (1.5, 2.0)
"""Target speed-ups of the unified rule that ``auto`` looks at."""


def check_options(options: SearchOptions) -> None:
    """Raise InputError for an unknown strategy, or settings that it does not take."""
    name = options.strategy
    if name not in STRATEGIES and not is_custom(name):
        hint = did_you_mean(name, STRATEGIES)
        raise InputError(
            f"strategy {name}: there is {', '.join(STRATEGIES)}, or {FORM} of your own{hint}",
            names=(f"strategy {name}",),
        )
    stray = sorted(_given(options).keys() - SETTINGS.get(name, frozenset()))
    if stray:
        takers = [other for other in STRATEGIES if stray[0] in SETTINGS[other]]
        raise InputError(
            f"{stray[0]} goes with strategy {' or '.join(takers)}; {name} has no use for it",
            names=(f"{stray[0]} goes", f"strategy {takers[0]}"),
        )
    if name == UNIFIED and options.target_speedup is None:
        raise InputError(
            "strategy unified needs target_speedup S, 1.5 for one",
            names=("strategy unified", "target_speedup"),
        )
    check_target_speedup(options.target_speedup)


def _given(options: SearchOptions) -> dict[str, Any]:
    """The settings of single strategies that are given."""
    names = sorted(set().union(*SETTINGS.values()))
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def strategy_key(name: str) -> str:
    """What must be equal for a search to be resumed: the name, or a hash of the custom file."""
    return hash_strategy(name) if is_custom(name) else name


def make_strategies(options: SearchOptions) -> list[Strategy]:
    """The strategies behind a name, in the order they run: several for ``auto``, else one.

    Raises:
        InputError: swift without scikit-learn; a custom file that holds no strategy.
    """
    from conflayers_cli.search.strategies.conflayers import ConfLayers
    from conflayers_cli.search.strategies.greedy import Greedy
    from conflayers_cli.search.strategies.knapsack import Knapsack
    from conflayers_cli.search.strategies.local import Local
    from conflayers_cli.search.strategies.swift import Swift, has_sklearn, require_sklearn
    from conflayers_cli.search.strategies.unified import Unified

    name = options.strategy
    if is_custom(name):
        return [load_strategy(name, STRATEGIES)]
    if name == AUTO:
        every: list[Strategy] = [Unified(target) for target in AUTO_TARGETS]
        every += [Knapsack(), ConfLayers(), Greedy(), Knapsack.clasp()]
        return [*every, Swift()] if has_sklearn() else every
    settings = _given(options)
    if name == "swift":
        require_sklearn()
        if "max_iterations" in settings:
            settings["max_steps"] = settings.pop("max_iterations")
    makers: dict[str, Any] = {
        LOCAL: Local,
        "conflayers": ConfLayers,
        "swift": Swift,
        "knapsack": Knapsack,
        "clasp": Knapsack.clasp,
        "greedy": Greedy,
        UNIFIED: Unified,
    }
    return [makers[name](**settings)]
