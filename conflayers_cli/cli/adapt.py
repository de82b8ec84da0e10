"""``generate --adapt``: searching while generating, and what is kept of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from conflayers_cli.cli.generate_options import DEFAULT_BUDGET, AdaptOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.online import AdaptiveProposer

logger = logging.getLogger(__name__)


class Adaptation:
    """The search of one run of the command.

    Args:
        options: of the command line, checked.
        seed: of the search.
    """

    def __init__(self, options: AdaptOptions, seed: int) -> None:
        self.method = options.adapt or ""
        self._budget = options.adapt_budget or DEFAULT_BUDGET
        self._save = options.save_profile
        self._seed = seed
        self._opened: tuple[LoadedModel, Decoder, AdaptiveProposer] | None = None

    def begin(
        self, loaded: LoadedModel, decoder: Decoder, profile: Profile | None
    ) -> AdaptiveProposer:
        """The proposer that searches while it drafts, from the profile's plan where there is one.

        Raises:
            InputError: SWIFT without scikit-learn, or a model too shallow.
        """
        from conflayers_cli.search.objective import DraftParams
        from conflayers_cli.search.online import METHODS, AdaptiveProposer

        start, setting = None, None
        if profile is not None and profile.plan and profile.draft.max_tokens:
            start = replace(profile.plan, weights=None)  # rounded weights are not searched
            setting = DraftParams(profile.draft.max_tokens, profile.draft.stop_probability)
        proposer = AdaptiveProposer(
            decoder,
            next(name for name in METHODS if name == self.method),
            budget=self._budget,
            seed=self._seed,
            start=start,
            setting=setting,
        )
        self._opened = loaded, decoder, proposer
        return proposer

    def end(self, prompts: Sequence[Prompt], *, show: bool) -> None:
        """Print what was found if ``show``, and write it where that is wanted.

        Raises:
            InputError, ConfLayersError: the profile can't be written.
        """
        if self._opened is None:
            return
        from conflayers_cli.search.to_profile import adapted_profile, describe_adaptation

        loaded, decoder, proposer = self._opened
        if show or self._save:
            logger.info(describe_adaptation(proposer, decoder.depth))
        if self._save is None:
            return
        if not (proposer.plan or proposer.settled):
            # a profile that is there must not be lost for nothing
            logger.info(f"nothing was learned from so little text: {self._save} is not written")
            return
        adapted_profile(
            loaded,
            proposer,
            prompts,
            method=self.method,
            budget=self._budget,
            seed=self._seed,
        ).save(self._save)
        logger.info(f"wrote {self._save}")
