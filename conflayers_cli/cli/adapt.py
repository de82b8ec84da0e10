"""``generate --adapt``: finding the layers to skip while generating, and keeping what was found."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.online import AdaptiveProposer

logger = logging.getLogger(__name__)

_PANEL = "Adapting"
DEFAULT_BUDGET = 0.05

Adapt = Annotated[
    str | None,
    typer.Option(
        "--adapt",
        metavar="METHOD",
        help="Find the layers to skip while generating: conflayers or swift. No profile is needed; "
        "with one, its set is where the search starts. The text stays the model's own (sampled, it "
        "differs from run to run, for tries depend on time).",
        rich_help_panel=_PANEL,
    ),
]
AdaptBudget = Annotated[
    float | None,
    typer.Option(
        "--adapt-budget",
        metavar="SHARE",
        help=f"Most of the wall time to spend on the search, over 0 up to 1 ({DEFAULT_BUDGET:g}).",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
SaveProfile = Annotated[
    Path | None,
    typer.Option(
        "--save-profile",
        metavar="FILE",
        help="With --adapt: write what was found as a profile.",
        rich_help_panel=_PANEL,
    ),
]


def check_flags(
    adapt: str | None, budget: float | None, save: Path | None, tree: bool | None
) -> None:
    """Refuse what can't be meant.

    Raises:
        InputError: an unknown method, a budget out of range, or flags that don't go together.
    """
    from conflayers_cli.profile.schema import check_replaceable

    methods = ("conflayers", "swift")
    if adapt is None:
        for flag, value in (("--adapt-budget", budget), ("--save-profile", save)):
            if value is not None:
                raise InputError(f"{flag} goes with --adapt {' or '.join(methods)}")
        return
    if adapt not in methods:
        raise InputError(f"--adapt {adapt}: there is {' and '.join(methods)}")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"--adapt-budget {budget:g}: allowed is over 0, at most 1")
    if tree:
        raise InputError("--adapt drafts chains: leave out --tree")
    if save is not None:
        check_replaceable(save)


class Learned:
    """What ``--adapt`` finds during one run of the command, and where it goes.

    Args:
        method, budget, save, seed: of the command line.
    """

    def __init__(self, method: str, budget: float | None, save: Path | None, seed: int) -> None:
        self._method = method
        self._budget = budget or DEFAULT_BUDGET
        self._save = save
        self._seed = seed
        self._adapter: AdaptiveProposer | None = None
        self._loaded: LoadedModel | None = None

    def begin(
        self, loaded: LoadedModel, decoder: Decoder, profile: Profile | None
    ) -> AdaptiveProposer:
        """The drafter that searches while it drafts, from the profile's plan where there is one.

        Raises:
            InputError: SWIFT without scikit-learn, or a model too shallow.
        """
        from conflayers_cli.search.objective import Setting
        from conflayers_cli.search.online import METHODS, AdaptiveProposer

        method = next(name for name in METHODS if name == self._method)
        start, setting = None, None
        # The layers are where the search begins; what stands in for some it can't search, and it
        # knows what layers cost with their own weights.
        if profile is not None and profile.plan and profile.draft.max_tokens:
            start = replace(profile.plan, weights=None)
            setting = Setting(profile.draft.max_tokens, profile.draft.stop_probability)
        self._loaded = loaded
        self._adapter = AdaptiveProposer(
            *(decoder, method),
            budget=self._budget,
            seed=self._seed,
            start=start,
            setting=setting,
        )
        return self._adapter

    def end(self, prompts: Sequence[Prompt], *, tell: bool) -> None:
        """Say what was found, and write it where that is wanted.

        Raises:
            InputError, ConfLayersError: the profile can't be written.
        """

        if self._adapter is None or self._loaded is None:
            return
        if tell or self._save:
            logger.info(summary(self._adapter, _depth(self._loaded)))
        if self._save and not (self._adapter.plan or self._adapter.settled):
            # Too little text to know anything: a profile that is there must not be lost for it.
            logger.info(f"nothing was learned from so little text: {self._save} is not written")
        elif self._save:
            _profile_of(
                self._loaded, self._adapter, prompts, self._method, self._budget, self._seed
            ).save(self._save)
            logger.info(f"wrote {self._save}")


def _depth(loaded: LoadedModel) -> int:
    depth: int = loaded.model.config.get_text_config().num_hidden_layers
    return depth


def summary(adapter: AdaptiveProposer, depth: int) -> str:
    """What the search came to, in one sentence."""
    state = "settled" if adapter.settled else "still searching"
    if adapter.plan:
        from conflayers_cli.profile.describe import skipped

        gain = adapter.best.speed / adapter.vanilla.speed
        found = f"skipping {skipped(adapter.plan, depth)} decodes at {gain:.2f}× vanilla"
    else:
        found = "nothing tried decodes faster than without drafts"
    return (
        f"adapt: {found} ({state}, {adapter.tried} sets tried); the search took "
        f"{adapter.search_share:.1%} of the time"
    )


def _profile_of(
    loaded: LoadedModel,
    adapter: AdaptiveProposer,
    prompts: Sequence[Prompt],
    method: str,
    budget: float,
    seed: int,
) -> Profile:
    """What was found, with figures measured on the way."""
    from conflayers_cli.generation.prompts import fingerprint
    from conflayers_cli.profile.check import environment_of, fingerprint_of
    from conflayers_cli.profile.schema import (
        DraftSettings,
        FoundBy,
        Measured,
        Profile,
        PromptsUsed,
        SkipSection,
    )

    best, found = adapter.best, bool(adapter.plan)
    return Profile(
        model=fingerprint_of(loaded),
        skip=SkipSection.of(adapter.plan),
        draft=DraftSettings(
            max_tokens=adapter.setting.max_tokens,
            stop_probability=adapter.setting.stop_probability,
        ),
        found_by=FoundBy(
            strategy=method,
            refined=method == "conflayers",
            settings={"on_the_fly": True, "adapt_budget": budget},
            seed=seed,
            prompts=PromptsUsed(count=len(prompts), sha256=fingerprint(prompts)),
        ),
        measured=Measured(
            acceptance_rate=best.accepted / best.drafted if found and best.drafted else None,
            tokens_per_step=best.tokens / best.steps if found and best.steps else None,
            expected_speedup=None,
            measured_speedup=best.speed / adapter.vanilla.speed if found else None,
            iterations=adapter.tried,
            seconds=adapter.search_seconds,
            conclusion=summary(adapter, _depth(loaded)),
        ),
        environment=environment_of(loaded),
    )
