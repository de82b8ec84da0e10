"""A proposer from a profile and a caller's draft options."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError
from conflayers_cli.profile.check import check_fit, note_other_device
from conflayers_cli.spec_decode.options import DraftMethod, DraftOptions
from conflayers_cli.utils.progress import progress_bar

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.engine.cost_model import CostTable
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import DraftSettings, Profile
    from conflayers_cli.skip_plan import SkipPlan
    from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer
    from conflayers_cli.spec_decode.tree import TreeShape

logger = logging.getLogger(__name__)

MAX_DRAFT_TOKENS = 25
"""Tokens drafted at once at the most, where the draft length is adaptive."""


def build_proposer(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None,
    path: Path | None,
    force: bool,
    options: DraftOptions,
) -> Proposer | None:
    """The proposer for a profile and a caller's options; None: decoding is vanilla.

    Args:
        loaded, decoder: the model.
        profile, path: the profile and the file it was read from.
        force: go on with a profile of another model of the same depth.
        options: the draft method and length; they go before what the profile says.

    Raises:
        InputError: the profile was made for another model, or this one can't run under its plan.
    """
    from conflayers_cli.spec_decode.mixed import MixedProposer

    if profile is not None:
        check_fit(loaded, decoder, profile, path, force)
    if options.method is DraftMethod.NGRAM:
        costs = costs_for(loaded, decoder, options.batch_size)
        return MixedProposer(decoder, None, costs, max_tokens=MAX_DRAFT_TOKENS)
    if profile is None:
        return None
    sections = profile.plans()
    modes = [_mode(plan, draft, options) for _, plan, draft in sections]
    if all(mode is DraftMethod.NONE for mode in modes):
        return None
    skipping = [
        (plan, draft)
        for (_, plan, draft), mode in zip(sections, modes, strict=True)
        if mode.skips_layers
    ]
    if skipping:  # n-grams draft by nothing that a profile says
        _note_other_device(loaded, profile, path, [draft for _, draft in skipping], options)
    _prepare_weights(decoder, [plan for plan, _ in skipping if plan.weights], path)
    builder = _Builder(loaded, decoder, profile, options)
    proposers = [
        (begin, builder.proposer(mode, plan, draft))
        for (begin, plan, draft), mode in zip(sections, modes, strict=True)
    ]
    if len(proposers) == 1:
        return proposers[0][1]
    from conflayers_cli.spec_decode.by_context import ContextLengthProposer

    return ContextLengthProposer(tuple(proposers))


def check_store(name: str, profile: Profile | None, options: DraftOptions) -> None:
    """Raise InputError where no n-grams draft, so that nothing would be looked up in a store.

    ``name``: the argument that names the store or a text for it. Without a profile and options
    drafts are by n-grams, too.
    """
    fixed, method = options.adaptive_draft_length is False, options.method
    if profile is None and options.by_ngrams and not fixed:
        return
    modes = [
        (_mode(plan, draft, options), draft)
        for _, plan, draft in (profile.plans() if profile else ())
    ]
    if any(
        mode is DraftMethod.NGRAM or (mode.uses_ngrams and _is_adaptive(draft, options))
        for mode, draft in modes
    ):
        return
    what = f"draft {method}" if method else "adaptive_draft_length=False"
    if method or fixed:
        raise InputError(f"{name} is about n-grams: not with {what}", names=(name, what))
    raise InputError(
        f"{name} is about n-grams, which don't draft by this profile: give draft mixed, too",
        names=(name, "draft mixed"),
    )


def _mode(plan: SkipPlan, draft: DraftSettings, options: DraftOptions) -> DraftMethod:
    """The draft method of one section of a profile."""
    method = options.method or (DraftMethod(draft.by) if draft.by else None)
    if bool(plan) and draft.max_tokens > 0:
        return method or DraftMethod.MIXED
    if method is None or not method.uses_ngrams:
        return DraftMethod.NONE
    return DraftMethod.NGRAM


def _is_adaptive(draft: DraftSettings, options: DraftOptions) -> bool:
    if options.adaptive_draft_length is not None:
        return options.adaptive_draft_length
    # n-grams give drafts of any length, so the profile's fixed one can't hold for them
    ngrams = options.method is not None and options.method.uses_ngrams
    return draft.lookahead is not False or ngrams or options.batch_size > 1


def _note_other_device(
    loaded: LoadedModel,
    profile: Profile,
    path: Path | None,
    drafts: list[DraftSettings],
    options: DraftOptions,
) -> None:
    """A note where something tuned on another device is used, and only of what is used."""
    chains = options.tree is False or options.batch_size > 1
    tuned = ["ranges of context lengths"] if profile.ranges else []
    if not chains and any(draft.tree for draft in drafts):
        tuned.append("side candidates")
    fixed = not all(_is_adaptive(draft, options) for draft in drafts)
    note_other_device(loaded, profile, path, fixed=fixed, tuned=tuned)


def _prepare_weights(decoder: Decoder, plans: list[SkipPlan], path: Path | None) -> None:
    """Make the rounded weights that drafts with ``plans`` use; a note where they can't be had."""
    if not plans:
        return
    if (reason := decoder.stack.int4.reason) is None:
        import torch

        # A first pass makes them: here it is no request's time.
        zero = torch.zeros((1, 1), dtype=torch.int64)
        decoder.forward(zero, zero, decoder.new_cache(1), plans[0])
    else:
        source = f"{path}: " if path else ""
        logger.warning(
            f"note: {source}drafts use the model's own weights, not int4, which is slower: {reason}"
        )


@dataclass
class _Builder:
    """Builds the proposers of a profile's sections; costs are measured when the first one asks."""

    loaded: LoadedModel
    decoder: Decoder
    profile: Profile
    options: DraftOptions

    @cached_property
    def costs(self) -> CostTable:
        int4 = self.profile.drafts_with_int4
        return costs_for(self.loaded, self.decoder, self.options.batch_size, int4)

    def proposer(self, mode: DraftMethod, plan: SkipPlan, draft: DraftSettings) -> Proposer | None:
        if mode is DraftMethod.NONE:
            return None
        tree = self._tree_shape(draft)
        if mode is DraftMethod.NGRAM or _is_adaptive(draft, self.options):
            from conflayers_cli.spec_decode.mixed import MixedProposer

            measured = self.profile.measured
            return MixedProposer(
                self.decoder,
                None if mode is DraftMethod.NGRAM else plan,
                self.costs,
                ngram=mode is not DraftMethod.SKIP,
                prior=measured.acceptance_rate if measured else None,
                max_tokens=MAX_DRAFT_TOKENS,
                tree=tree,
            )
        from conflayers_cli.spec_decode.proposer import SkipProposer

        costs = self.costs.by_batch[1] if tree else None
        return SkipProposer(
            self.decoder,
            plan,
            draft.max_tokens,
            draft.stop_probability,
            tree,
            verify_cost=costs.verify_cost if costs else None,
            draft_seconds=costs.draft_cost(plan, self.decoder.depth) if costs else 0.0,
        )

    def _tree_shape(self, draft: DraftSettings) -> TreeShape | None:
        """The side candidates wanted: the profile's, or the papers' where they are asked for."""
        from conflayers_cli.spec_decode.tree import PAPER_SHAPE, TreeShape

        if self.options.tree is False or self.options.batch_size > 1:  # batches verify chains
            return None
        if draft.tree is not None:
            return TreeShape(draft.tree)
        return PAPER_SHAPE if self.options.tree else None


def costs_for(
    loaded: LoadedModel, decoder: Decoder, batch_size: int = 1, int4: bool = False
) -> CostTable:
    """Costs of passes over up to ``batch_size`` sequences, measured now or in an earlier run.

    ``int4``: those of drafts with weights of four bits, too.
    """
    from conflayers_cli.engine.cost_cache import batch_sizes_up_to, get_costs

    with progress_bar() as on_progress:
        found = get_costs(
            loaded, decoder, batch_sizes_up_to(batch_size), progress=on_progress, int4=int4
        )
    if found.cache_error:
        logger.warning(f"note: what passes cost is measured anew every time: {found.cache_error}")
    return found.table


def as_batch_proposer(proposer: Proposer | None) -> BatchProposer | None:
    """The proposer as one that drafts for several sequences at once; None stays None.

    Raises:
        InputError: it can't.
    """
    from conflayers_cli.spec_decode.proposer import BatchProposer

    if proposer is None or isinstance(proposer, BatchProposer):
        return proposer
    raise InputError(
        "drafts of a fixed length are for one prompt at a time: use adaptive_draft_length",
        names=("adaptive_draft_length",),
    )
