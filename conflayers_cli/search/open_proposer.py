"""Who drafts: what a profile says, or a proposer that learns while it drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conflayers_cli.profile.build_proposer import build_proposer

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.adaptive.proposer import AutoProposer
    from conflayers_cli.spec_decode.options import DraftOptions
    from conflayers_cli.spec_decode.proposer import Proposer

BUDGET = 0.03
"""Share of the time that passes for the search of a learning proposer may take."""


def open_proposer(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None,
    path: Path | None,
    force: bool,
    options: DraftOptions,
    *,
    remember: bool = True,
) -> Proposer | None:
    """The proposer for a profile and a caller's options; None: decoding is vanilla.

    Without either, drafting needs no search: see `AutoProposer`. ``remember``: begin with what an
    earlier run has learnt, and keep what this one does; the others and errors as of
    `build_proposer`.
    """
    if profile is not None or options.method is not None:
        return build_proposer(loaded, decoder, profile, path, force, options)
    return open_auto_proposer(loaded, decoder, remember=remember)


def open_auto_proposer(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None = None,
    path: Path | None = None,
    force: bool = False,
    *,
    budget: float = BUDGET,
    remember: bool = True,
) -> AutoProposer:
    """A proposer that learns while it drafts; a profile's plan is where it begins.

    Raises:
        InputError: the profile was made for another model.
    """
    from conflayers_cli.profile.check import check_fit
    from conflayers_cli.search.adaptive.proposer import AutoProposer, Learnt
    from conflayers_cli.search.adaptive.race import OPTIMISTIC
    from conflayers_cli.search.adaptive.remembered import Memory

    memory = Memory(loaded, decoder) if remember and profile is None else None
    learnt = memory.read() if memory else None
    if profile is not None:
        check_fit(loaded, decoder, profile, path, force)
        rate = profile.measured.acceptance_rate if profile.measured else None
        learnt = Learnt(profile.plan, OPTIMISTIC if rate is None else rate, settled=True)
    return AutoProposer(
        decoder, budget=budget, learnt=learnt, keep=memory.write if memory else None
    )
