"""What a profile and a caller say about drafting, made into a proposer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
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

MOST_DRAFTED = 25
"""Tokens drafted at once at the most, where the draft length is adaptive."""


def build_proposer(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None,
    path: Path | None,
    force: bool,
    options: DraftOptions,
) -> Proposer | None:
    """What drafts for this model; None (vanilla) where nobody does.

    Args:
        loaded, decoder: the model.
        profile, path: the profile and the file it was read from.
        force: go on with a profile of another model of the same depth.
        options: who is to draft, and how far.

    Raises:
        InputError: the profile was made for another model, or this one can't run under its plan.
    """
    if profile is not None:
        check_fit(loaded, decoder, profile, path, force)
    if profile is None or options.method is DraftMethod.NGRAM:
        return _ngrams(loaded, decoder, options) if options.method is DraftMethod.NGRAM else None
    sections = profile.plans()
    modes = [_mode(plan, draft, options) for _, plan, draft in sections]
    if all(mode is DraftMethod.NONE for mode in modes):
        return None
    _note_other_device(loaded, profile, path, modes, options)
    _prepare_weights(decoder, [plan for _, plan, _ in sections], modes, path)
    builder = _Builder(loaded, decoder, profile, options)
    drafters = [
        (begin, builder.drafter(mode, plan, draft))
        for (begin, plan, draft), mode in zip(sections, modes, strict=True)
    ]
    if len(drafters) == 1:
        return drafters[0][1]
    from conflayers_cli.spec_decode.by_context import ContextLengthProposer

    return ContextLengthProposer(tuple(drafters))


def _mode(plan: SkipPlan, draft: DraftSettings, options: DraftOptions) -> DraftMethod:
    """Who drafts with one section of a profile."""
    method = options.method or (DraftMethod(draft.by) if draft.by else None)
    if bool(plan) and draft.max_tokens > 0:
        return method or DraftMethod.MIXED
    if method is None or not method.uses_ngrams:
        return DraftMethod.NONE
    return DraftMethod.NGRAM


def _is_adaptive(draft: DraftSettings, options: DraftOptions) -> bool:
    if options.adaptive_draft_length is not None:
        return options.adaptive_draft_length
    # one that is to be as long as the profile says can't also be what n-grams give
    ngrams = options.method is not None and options.method.uses_ngrams
    return draft.lookahead is not False or ngrams or options.batch_size > 1


def _note_other_device(
    loaded: LoadedModel,
    profile: Profile,
    path: Path | None,
    modes: list[DraftMethod],
    options: DraftOptions,
) -> None:
    """A note where something tuned on another device is used, and only of what is used."""
    drafts = [profile.draft, *(each.draft for each in profile.ranges or ())]
    skipping = [
        draft
        for draft, mode in zip(drafts, modes, strict=True)
        if mode.skips_layers  # n-grams draft by nothing that a profile says
    ]
    if not skipping:
        return
    chains = options.tree is False or options.batch_size > 1
    trees = not chains and any(draft.tree for draft in skipping)
    tuned = ("ranges of context lengths",) if profile.ranges else ()
    note_other_device(
        loaded,
        profile,
        path,
        fixed=not all(_is_adaptive(draft, options) for draft in skipping),
        tuned=(*tuned, "side candidates") if trees else tuned,
    )


def _prepare_weights(
    decoder: Decoder, plans: list[SkipPlan], modes: list[DraftMethod], path: Path | None
) -> None:
    """Make the rounded weights that drafts use; a note where they can't be had."""
    drafting = zip(plans, modes, strict=True)
    rounded = [plan for plan, mode in drafting if plan.weights and mode.skips_layers]
    if not rounded:
        return
    reason = decoder.stack.int4.reason
    if reason is None:
        import torch

        # A first pass makes them: here it is no text's time.
        at = torch.zeros((1, 1), dtype=torch.int64)
        decoder.forward(at, at, decoder.new_cache(1), rounded[0])
    else:
        source = f"{path}: " if path else ""
        logger.warning(
            f"note: {source}drafts use the model's own weights, not int4, which is slower: {reason}"
        )


@dataclass
class _Builder:
    """Makes the drafters of a profile's sections; costs are measured when the first one asks."""

    loaded: LoadedModel
    decoder: Decoder
    profile: Profile
    options: DraftOptions
    _costs: CostTable | None = None

    @property
    def costs(self) -> CostTable:
        if self._costs is None:
            int4 = self.profile.drafts_with_int4
            self._costs = costs_for(self.loaded, self.decoder, self.options.batch_size, int4)
        return self._costs

    def drafter(self, mode: DraftMethod, plan: SkipPlan, draft: DraftSettings) -> Proposer | None:
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
                max_tokens=MOST_DRAFTED,
                tree=tree,
            )
        from conflayers_cli.spec_decode.proposer import SkipProposer

        if tree is None:
            return SkipProposer(self.decoder, plan, draft.max_tokens, draft.stop_probability)
        one = self.costs.by_batch[1]
        return SkipProposer(
            self.decoder,
            plan,
            draft.max_tokens,
            draft.stop_probability,
            tree,
            verify_cost=one.verify_cost,
            draft_seconds=one.draft_cost(plan, self.decoder.depth),
        )

    def _tree_shape(self, draft: DraftSettings) -> TreeShape | None:
        """The side candidates wanted: the profile's, or the papers' where they are asked for."""
        from conflayers_cli.spec_decode.tree import GREEDY_SHAPE, SAMPLING_SHAPE, TreeShape

        if self.options.tree is False or (self.options.tree is None and draft.tree is None):
            return None
        if self.options.batch_size > 1:  # batches verify chains
            return None
        if draft.tree is not None:
            return TreeShape(draft.tree)
        return GREEDY_SHAPE if self.options.greedy else SAMPLING_SHAPE


def _ngrams(loaded: LoadedModel, decoder: Decoder, options: DraftOptions) -> Proposer:
    from conflayers_cli.spec_decode.mixed import MixedProposer

    costs = costs_for(loaded, decoder, options.batch_size)
    return MixedProposer(decoder, None, costs, max_tokens=MOST_DRAFTED)


def costs_for(
    loaded: LoadedModel, decoder: Decoder, rows: int = 1, int4: bool = False
) -> CostTable:
    """What passes over up to so many rows cost here: measured now, or known from an earlier run.

    ``int4``: those of drafts with weights of four bits, too.
    """
    from conflayers_cli.engine.cost_cache import costs_of, sizes_up_to

    with progress_bar() as on_progress:
        found = costs_of(loaded, decoder, sizes_up_to(rows), progress=on_progress, int4=int4)
    if found.unkept:
        logger.warning(f"note: what passes cost is measured anew every time: {found.unkept}")
    return found.table


def rows_drafter(drafter: Proposer | None) -> BatchProposer | None:
    """A drafter as one that drafts for several rows at once; None where nobody drafts.

    Raises:
        InputError: it can't.
    """
    from conflayers_cli.spec_decode.proposer import BatchProposer

    if drafter is None or isinstance(drafter, BatchProposer):
        return drafter
    raise InputError(
        "drafts of a fixed length are for one prompt at a time: use adaptive_draft_length",
        names=("adaptive_draft_length",),
    )
