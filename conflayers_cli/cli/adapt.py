"""``generate --adapt``: searching while generating, and what is kept of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from conflayers_cli.cli.generate_options import AUTO, AdaptOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.adaptive.proposer import AutoProposer
    from conflayers_cli.search.online import AdaptiveProposer

logger = logging.getLogger(__name__)


class Adaptation:
    """The search of one run of the command.

    Args:
        options: of the command line, checked.
        seed: of the search.
        path, force: the profile's file, and whether it may be another model's.
    """

    def __init__(
        self, options: AdaptOptions, seed: int, path: Path | None = None, force: bool = False
    ) -> None:
        self.method = options.adapt or ""
        self._options = options
        self._seed = seed
        self._path, self._force = path, force
        self._opened: tuple[LoadedModel, Decoder, AutoProposer | AdaptiveProposer] | None = None

    def begin(
        self,
        loaded: LoadedModel,
        decoder: Decoder,
        profile: Profile | None,
    ) -> AutoProposer | AdaptiveProposer:
        """The proposer that searches while it drafts, from the profile's plan where there is one.

        Raises:
            InputError: SWIFT without scikit-learn, a model too shallow, or a profile of another
                model.
        """
        proposer = self._proposer(loaded, decoder, profile)
        self._opened = loaded, decoder, proposer
        return proposer

    def _proposer(
        self,
        loaded: LoadedModel,
        decoder: Decoder,
        profile: Profile | None,
    ) -> AutoProposer | AdaptiveProposer:
        if self.method == AUTO:
            from conflayers_cli.search.open_proposer import open_auto_proposer

            return open_auto_proposer(
                loaded,
                decoder,
                profile,
                self._path,
                self._force,
                budget=self._options.budget,
                remember=self._options.remember is not False,
            )
        from conflayers_cli.search.objective import DraftParams
        from conflayers_cli.search.online import METHODS, AdaptiveProposer

        start, setting = None, None
        if profile is not None and profile.plan and profile.draft.max_tokens:
            start = replace(profile.plan, weights=None)  # rounded weights are not searched
            setting = DraftParams(profile.draft.max_tokens, profile.draft.stop_probability)
        return AdaptiveProposer(
            decoder,
            next(name for name in METHODS if name == self.method),
            budget=self._options.budget,
            seed=self._seed,
            start=start,
            setting=setting,
        )

    def end(self, prompts: Sequence[Prompt], *, show: bool) -> None:
        """Print what was found if ``show``, keep it, and write it where that is wanted.

        Raises:
            InputError, ConfLayersError: the profile can't be written.
        """
        if self._opened is None:
            return
        loaded, _, proposer = self._opened
        found = self._found(loaded, proposer, prompts)
        target = self._options.save_profile
        if show or target:
            logger.info(found.measured.conclusion if found.measured else "")
        if target is None:
            return
        if not (found.plan or proposer.settled):
            # a profile that is there must not be lost for nothing
            logger.info(f"nothing was learned from so little text: {target} is not written")
            return
        found.save(target)
        logger.info(f"wrote {target}")

    def _found(
        self,
        loaded: LoadedModel,
        proposer: AutoProposer | AdaptiveProposer,
        prompts: Sequence[Prompt],
    ) -> Profile:
        from conflayers_cli.search.adaptive.proposer import AutoProposer

        budget = self._options.budget
        if isinstance(proposer, AutoProposer):
            from conflayers_cli.search.adaptive.report import learnt_profile

            proposer.save()
            return learnt_profile(loaded, proposer, prompts, budget)
        from conflayers_cli.search.to_profile import adapted_profile

        return adapted_profile(
            loaded, proposer, prompts, method=self.method, budget=budget, seed=self._seed
        )
