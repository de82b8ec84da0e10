"""Who drafts, and how far: what a profile and the command line say, made into a drafter."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.errors import InputError
from conflayers_cli.profile_check import check_fit, tell_other_device
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
_PANEL = "Drafting"


class By(Enum):
    """Who drafts."""

    SKIP = "skip"
    NGRAM = "ngram"
    MIXED = "mixed"
    NONE = "none"


DraftBy = Annotated[
    By | None,
    typer.Option(
        "--draft",
        help="Who drafts: the profile's skipped layers, n-grams found in prompt and output, both "
        "(mixed), or nobody; by default as the profile says, else nobody.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
AdaptiveDraftLength = Annotated[
    bool | None,
    typer.Option(
        "--adaptive-draft-length/--no-adaptive-draft-length",
        help="Draft as long as it pays, by what was accepted so far and by what passes cost here "
        "(measured once); without, up to the profile's max_tokens and stop_probability.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Tree = Annotated[
    bool | None,
    typer.Option(
        "--tree/--no-tree",
        help="Draft side candidates beside the chain, as far as they earn their cost; by default "
        "as the profile says.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Way:
    """What the command line says about drafting; None leaves it to the profile.

    Attributes:
        by: who drafts.
        adaptive_draft_length: whether it is decided anew at every step how far.
        tree: whether there are side candidates beside the chain.
        greedy: whether tokens are chosen greedily, for the papers' shape of a tree.
        rows: prompts decoded at once.
    """

    by: By | None = None
    adaptive_draft_length: bool | None = None
    tree: bool | None = None
    greedy: bool = True
    rows: int = 1

    def check(self, profile: Path | None) -> None:
        """Refuse what contradicts itself, before a model is loaded.

        Raises:
            InputError: the message names the arguments.
        """
        if self.by in (By.SKIP, By.MIXED) and profile is None:
            raise InputError(
                f"draft {self.by.value} leaves out the layers that a profile names: give "
                "profile FILE, or draft ngram, which needs none",
                names=(f"draft {self.by.value}", "profile FILE", "draft ngram"),
            )
        if self.adaptive_draft_length is False and self.by in (By.NGRAM, By.MIXED):
            raise InputError(
                f"adaptive_draft_length=False drafts as the profile says, by skipping alone: not with "
                f"draft {self.by.value}",
                names=("adaptive_draft_length=False", f"draft {self.by.value}"),
            )
        idle = self.by in (By.NONE, By.NGRAM) or profile is None
        nobody = self.by is By.NONE or (profile is None and self.by is None)
        if self.adaptive_draft_length and nobody:
            raise InputError(
                "adaptive_draft_length is about drafts, and nobody drafts: see draft",
                names=("adaptive_draft_length", "draft"),
            )
        fixed = self.adaptive_draft_length is False
        for name, wanted in (("tree", self.tree), ("adaptive_draft_length=False", fixed)):
            if wanted and idle:
                raise InputError(
                    f"{name} is about drafts by skipped layers, and there are none", names=(name,)
                )
        if self.rows > 1 and (self.tree or fixed):
            name = "tree" if self.tree else "adaptive_draft_length=False"
            raise InputError(
                f"{name} is for one prompt at a time: leave batch_size out",
                names=(name, "batch_size"),
            )


def drafter_for(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None,
    path: Path | None,
    force: bool,
    way: Way,
) -> Proposer | None:
    """What drafts for this model; None (vanilla) where nobody does.

    Args:
        loaded, decoder: the model.
        profile, path: the profile and the file it was read from.
        force: go on with a profile of another model of the same depth.
        way: what the command line says.

    Raises:
        InputError: the profile was made for another model, or this one can't run under its plan.
    """
    if profile is not None:
        check_fit(loaded, decoder, profile, path, force)
    if profile is None or way.by is By.NGRAM:
        return _ngrams(loaded, decoder, way) if way.by is By.NGRAM else None
    sections = profile.plans()
    modes = [_mode(plan, draft, way) for _, plan, draft in sections]
    if all(mode is By.NONE for mode in modes):
        return None
    _tell_other_device(loaded, profile, path, modes, way)
    _prepare_weights(decoder, [plan for _, plan, _ in sections], modes, path)
    builder = _Builder(loaded, decoder, profile, way)
    drafters = [
        (begin, builder.drafter(mode, plan, draft))
        for (begin, plan, draft), mode in zip(sections, modes, strict=True)
    ]
    if len(drafters) == 1:
        return drafters[0][1]
    from conflayers_cli.spec_decode.by_context import ContextLengthProposer

    return ContextLengthProposer(tuple(drafters))


def _mode(plan: SkipPlan, draft: DraftSettings, way: Way) -> By:
    """Who drafts with one section of a profile."""
    by = way.by or (By(draft.by) if draft.by else None)
    skips = bool(plan) and draft.max_tokens > 0
    if by is None:
        by = By.MIXED if skips else By.NONE
    if by is By.MIXED and not skips:
        return By.NGRAM
    if by is By.SKIP and not skips:
        return By.NONE
    return by


def _looks_ahead(draft: DraftSettings, way: Way) -> bool:
    if way.adaptive_draft_length is not None:
        return way.adaptive_draft_length
    # one that is to be as long as the profile says can't also be what n-grams give
    return draft.lookahead is not False or way.by in (By.NGRAM, By.MIXED) or way.rows > 1


def _tell_other_device(
    loaded: LoadedModel, profile: Profile, path: Path | None, modes: list[By], way: Way
) -> None:
    """A note where something tuned on another device is used, and only of what is used."""
    drafts = [profile.draft, *(each.draft for each in profile.ranges or ())]
    skipping = [
        draft
        for draft, mode in zip(drafts, modes, strict=True)
        if mode in (By.SKIP, By.MIXED)  # n-grams draft by nothing that a profile says
    ]
    if not skipping:
        return
    trees = way.tree is not False and way.rows == 1 and any(draft.tree for draft in skipping)
    tuned = ("ranges of context lengths",) if profile.ranges else ()
    tell_other_device(
        loaded,
        profile,
        path,
        fixed=not all(_looks_ahead(draft, way) for draft in skipping),
        tuned=(*tuned, "side candidates") if trees else tuned,
    )


def _prepare_weights(
    decoder: Decoder, plans: list[SkipPlan], modes: list[By], path: Path | None
) -> None:
    """Make the rounded weights that drafts use; a note where they can't be had."""
    drafting = zip(plans, modes, strict=True)
    rounded = [p for p, mode in drafting if p.weights and mode in (By.SKIP, By.MIXED)]
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
    way: Way
    _costs: CostTable | None = None

    @property
    def costs(self) -> CostTable:
        if self._costs is None:
            int4 = self.profile.drafts_with_int4
            self._costs = costs_for(self.loaded, self.decoder, self.way.rows, int4)
        return self._costs

    def drafter(self, mode: By, plan: SkipPlan, draft: DraftSettings) -> Proposer | None:
        if mode is By.NONE:
            return None
        tree = self._tree_shape(draft)
        if mode is By.NGRAM or _looks_ahead(draft, self.way):
            from conflayers_cli.spec_decode.mixed import MixedProposer

            measured = self.profile.measured
            return MixedProposer(
                self.decoder,
                None if mode is By.NGRAM else plan,
                self.costs,
                ngram=mode is not By.SKIP,
                prior=measured.acceptance_rate if measured else None,
                max_tokens=MOST_DRAFTED,
                tree=tree,
            )
        from conflayers_cli.spec_decode.proposer import SkipProposer

        if tree is None:
            return SkipProposer(self.decoder, plan, draft.max_tokens, draft.stop_probability)
        one = self.costs.by_batch[1]
        return SkipProposer(
            *(self.decoder, plan, draft.max_tokens, draft.stop_probability, tree),
            verify_cost=one.verify_cost,
            draft_seconds=one.draft_cost(plan, self.decoder.depth),
        )

    def _tree_shape(self, draft: DraftSettings) -> TreeShape | None:
        """The side candidates wanted: the profile's, or the papers' where they are asked for."""
        from conflayers_cli.spec_decode.tree import GREEDY_SHAPE, SAMPLING_SHAPE, TreeShape

        if self.way.tree is False or (self.way.tree is None and draft.tree is None):
            return None
        if self.way.rows > 1:  # batches verify chains
            return None
        if draft.tree is not None:
            return TreeShape(draft.tree)
        return GREEDY_SHAPE if self.way.greedy else SAMPLING_SHAPE


def _ngrams(loaded: LoadedModel, decoder: Decoder, way: Way) -> Proposer:
    from conflayers_cli.spec_decode.mixed import MixedProposer

    costs = costs_for(loaded, decoder, way.rows)
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
