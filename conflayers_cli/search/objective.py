"""The objective of every search: tokens per second on this device.

A plan is judged by one parallel draft pass over texts the model wrote itself (SWIFT's matchness,
arXiv 2410.06916 §4.1): at every position, is the draft's choice the text's next token, and what
probability does the draft give it? As in decoding, the draft sees the full model's keys and values
of the tokens before (but also where it would see its own, since the last verification: the best
plan's score is corrected for that in the end, see `Objective.as_decoded`). Decoding is then
simulated for each draft length and stop probability with the measured costs; the best setting is
the plan's score. Strategies count the positions that agree; refinement, which looks at many plans
that differ in little, counts how likely each was to (see `expected_replay`). With a tree, the
draft's next-best tokens are traced too: where the chain's token is rejected and the model's choice
is among the leaves beside it, the step keeps it and decides one token more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.expected_replay import (
    ExpectedText,
    agreement_chances,
    expected_replays,
)
from conflayers_cli.search.forced_text import MAX_POSITIONS, ForcedText, SideTrace, Trace
from conflayers_cli.search.memo import Memo, plan_label
from conflayers_cli.search.texts import states_stride
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.tree import TreeShape, leaf_counts

DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25)
STOP_PROBABILITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
STATES_BYTES = 512 << 20
"""Memory that the hidden states of the anchor may take, of all texts (see `ForcedText`)."""
GOLDEN = 0.618
"""Multiples of it, without their whole part, lie evenly between 0 and 1 however many they are."""
EFFECT_TEXTS = 2  # texts that sub-layers' effects are measured on
SPEEDUP_TOLERANCE = 0.015
"""Predicted speeds this close are taken as equal when the draft setting is chosen."""


@dataclass(frozen=True)
class DraftParams:
    """How to draft.

    Attributes:
        max_tokens: length of the draft; 0: nothing is drafted.
        stop_probability: the draft stops after a token of lower probability.
        tree: side candidates beside each token; None: a chain.
    """

    max_tokens: int
    stop_probability: float
    tree: TreeShape | None = None


Setting = DraftParams
"""Old name, kept for one version for users' own strategies."""
VANILLA = DraftParams(0, 0.0)
PAPER = DraftParams(25, 0.8)  # how ConfLayers and SWIFT draft


SETTINGS = tuple(DraftParams(n, stop) for stop in STOP_PROBABILITIES for n in DRAFT_LENGTHS)


@dataclass(frozen=True)
class Replay:
    """Counts and time of a simulated decoding; in expectation, counts are no whole numbers."""

    steps: float
    drafted: float
    accepted: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Score:
    """A plan's worth.

    Attributes:
        plan: what is skipped.
        agreement: share of positions where the draft's choice is the model's.
        setting: the best draft setting.
        speedup: predicted tokens per second with it over vanilla's. Under 1 the plan does not pay,
            but a search can still tell better plans from worse.
        replay: the simulated decoding behind the speed-up.
    """

    plan: SkipPlan
    agreement: float
    setting: DraftParams
    speedup: float
    replay: Replay


class Objective:
    """Judges plans of one model by texts the model wrote.

    Args:
        decoder: the model.
        costs: its measured passes.
        continuations: of prompts; those under 3 tokens are left out.
        memo: has the results of passes; None: a new one.
        states_bytes: memory that hidden states may take.
    """

    def __init__(
        self,
        decoder: Decoder,
        costs: PassCosts,
        continuations: Sequence[Continuation],
        memo: Memo | None = None,
        states_bytes: int = STATES_BYTES,
    ) -> None:
        self._memo = memo or Memo(decoder)
        self.decoder = decoder
        self.costs = costs
        long = [each for each in continuations if len(each.output) >= 3]
        positions = sum(min(len(each.output) - 1, MAX_POSITIONS) for each in long)
        stride = states_stride(decoder, positions, states_bytes)
        self._texts = [
            ForcedText(decoder, each, stride, i * GOLDEN % 1) for i, each in enumerate(long)
        ]
        self._expecting = False
        self._anchor: SkipPlan | None = None
        self._traces: dict[tuple[SkipPlan, int], Trace] = {}
        self._sides: dict[tuple[SkipPlan, int], list[SideTrace]] = {}
        self._scored: dict[tuple[SkipPlan, int], Score] = {}

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    @property
    def whole_layers(self) -> bool:
        """Whether only whole layers can be left out."""
        return len(self.decoder.sub_layers) < 2

    def at_context(self, context: int) -> Objective:
        """The same objective for contexts of ``context`` tokens: costs change, traces don't."""
        other = copy.copy(self)
        other.costs = self.costs.at(context, self.decoder.depth)
        other._scored = {}
        return other

    def expecting(self) -> Objective:
        """The same objective with how likely positions agree in place of whether they did."""
        other = copy.copy(self)
        other._expecting, other._scored = True, {}
        return other

    def anchor(self, plan: SkipPlan) -> None:
        """Keep the hidden states of a plan: those judged from now on differ from it in little."""
        self._anchor = plan

    def effects(self) -> dict[tuple[int, str], float]:
        """How much each sub-layer changes the hidden states, by (layer, kind): see `ForcedText`."""
        found = self._memo.cached(
            "effects of sub-layers",
            lambda: [
                [[*where, effect] for where, effect in text.effects().items()]
                for text in self._texts[:EFFECT_TEXTS]
            ],
        )
        every: dict[tuple[int, str], float] = {}
        for layer, kind, effect in (each for of_text in found for each in of_text):
            every[layer, kind] = every.get((layer, kind), 0.0) + effect / len(found)
        return every

    def _trace(self, plan: SkipPlan, text: ForcedText) -> Trace:
        anchor = self._anchor
        alike = anchor is not None and anchor.weights == plan.weights
        if anchor is not None and alike and text.keeps_states and text.anchor != anchor:
            trace = text.trace(anchor, anchor=True)
            if plan == anchor:
                return trace
        return text.trace(plan)

    def traces(self, plan: SkipPlan, texts: int | None = None) -> list[Trace]:
        """The first texts under a plan, a draft pass each where it is not cached."""
        missing = [i for i in range(self._count(texts)) if (plan, i) not in self._traces]
        if missing:
            found = self._memo.cached(
                f"{plan_label(plan)}: texts {' '.join(map(str, missing))}",
                lambda: [dict(vars(self._trace(plan, self._texts[i]))) for i in missing],
            )
            for i, trace in zip(missing, found, strict=True):
                self._traces[plan, i] = Trace(**trace)
        return [self._traces[plan, i] for i in range(self._count(texts))]

    def is_cached(self, plan: SkipPlan, texts: int | None = None) -> bool:
        """Whether :meth:`score` needs no pass."""
        return all((plan, i) in self._traces for i in range(self._count(texts)))

    def side_traces(self, plan: SkipPlan, count: int) -> list[SideTrace]:
        """The draft's ``count`` next-best candidates along all texts, a pass each if not cached."""
        if (plan, count) not in self._sides:
            found = self._memo.cached(
                f"{plan_label(plan)}: {count} side candidates",
                lambda: [dict(vars(text.side_trace(plan, count))) for text in self._texts],
            )
            self._sides[plan, count] = [SideTrace(**trace) for trace in found]
        return self._sides[plan, count]

    def score(self, plan: SkipPlan, texts: int | None = None) -> Score:
        """The plan's worth on the first ``texts`` texts (default: all); cached."""
        count = self._count(texts)
        found = self._scored.get((plan, count))
        if found is None:
            found = max(self._scores(plan, count), key=lambda score: score.speedup)
            self._scored[plan, count] = found
        return found

    def conservative_score(self, plan: SkipPlan) -> Score:
        """As :meth:`score`, but of settings nearly as good as the best, the one that drafts least.

        It loses least on a text that is harder to draft than these.
        """
        scores = self._scores(plan, len(self._texts))
        least = max(score.speedup for score in scores) * (1 - SPEEDUP_TOLERANCE)
        return min(
            (score for score in scores if score.speedup >= least),
            key=lambda score: (score.replay.drafted, -score.speedup),
        )

    def as_decoded(self, score: Score) -> Score:
        """The score as decoding is expected to come out.

        Tokens of a draft see its own keys and values of those before them, which agree a little
        less. And what a plan was chosen by flatters it: of many plans that are as good, the one
        whose tokens happen to agree comes out best. A second look, at drafts of the setting's
        length, does not know what was chosen. Decoding adapts the length to the text: the best
        setting stands for that.
        """
        plan, setting = score.plan, replace(score.setting, tree=None)
        if not plan or setting.max_tokens == 0:
            return score
        found = self._memo.cached(
            f"{plan_label(plan)}: drafts of {setting.max_tokens}",
            lambda: [dict(vars(t.chained_trace(plan, setting.max_tokens))) for t in self._texts],
        )
        chained = [Trace(**trace) for trace in found]
        first = self._replays(plan, self.traces(plan))[SETTINGS.index(setting)]
        own = max(self._replays(plan, chained), key=_speed)
        return replace(
            score,
            agreement=float(np.concatenate(self._agreement(chained)).mean()),
            speedup=score.speedup * _speed(own) / _speed(first),
            replay=own,
        )

    def with_tree(self, score: Score, shape: TreeShape) -> Score | None:
        """The score with side candidates beside the chain; None where they gain too little.

        Args:
            score: of the plan with its best chain.
            shape: how many candidates are wanted, before costs say how many stay.
        """
        if not score.plan or score.setting.max_tokens == 0:
            return None
        traces, setting = self.traces(score.plan), replace(score.setting, tree=shape)
        draft_cost = self.costs.draft_cost(score.plan, self.decoder.depth)
        chain = replay(traces, score.setting, draft_cost, self.costs)
        played = replay(
            traces,
            setting,
            draft_cost,
            self.costs,
            self.side_traces(score.plan, shape.max_leaves),
            only_draft=self.decoder.invariance.bitwise,
        )
        speedup = score.speedup * _speed(played) / _speed(chain)
        if speedup <= score.speedup * (1 + SPEEDUP_TOLERANCE):
            return None
        return replace(score, setting=setting, speedup=speedup, replay=played)

    def _count(self, texts: int | None) -> int:
        return len(self._texts) if texts is None else min(texts, len(self._texts))

    def _scores(self, plan: SkipPlan, count: int) -> list[Score]:
        """The plan's score with every draft setting."""
        vanilla_cost = self.costs.verify_cost(1)
        if not plan or not count:
            return [Score(plan, 1.0, VANILLA, 1.0, Replay(1, 0, 0, 1, vanilla_cost))]
        traces = self.traces(plan, count)
        agreement = float(np.concatenate(self._agreement(traces)).mean())
        return [
            Score(plan, agreement, setting, _speed(played) * vanilla_cost, played)
            for setting, played in zip(SETTINGS, self._replays(plan, traces), strict=True)
        ]

    def _agreement(self, traces: Sequence[Trace]) -> list[npt.NDArray[np.float64]]:
        """Whether, or how likely, the draft agrees at each position of the first texts."""
        if not self._expecting:
            return [trace.agrees.astype(np.float64) for trace in traces]
        margins = [trace.margin for trace in self.traces(SkipPlan(), len(traces))]
        return agreement_chances(margins, [trace.margin for trace in traces])

    def _replays(self, plan: SkipPlan, traces: Sequence[Trace]) -> list[Replay]:
        """Decoding of the first texts, traced under a plan, with each of `SETTINGS`."""
        draft_cost = self.costs.draft_cost(plan, self.decoder.depth)
        if not self._expecting:
            return [replay(traces, setting, draft_cost, self.costs) for setting in SETTINGS]
        texts = ExpectedText(self._agreement(traces), max(DRAFT_LENGTHS))
        lengths = np.zeros((len(SETTINGS), len(traces), texts.size), np.int64)
        for of_setting, setting in zip(lengths, SETTINGS, strict=True):
            for of_text, trace in zip(of_setting, traces, strict=True):
                drafted = trace.draft_lengths(setting.stop_probability)
                of_text[: len(drafted)] = np.minimum(drafted, setting.max_tokens)
        found = expected_replays(texts, lengths, draft_cost, self.costs)
        counts = (found.steps, found.drafted, found.accepted, found.tokens, found.seconds)
        return [Replay(*map(float, each)) for each in zip(*counts, strict=True)]


def _speed(played: Replay) -> float:
    return played.tokens / played.seconds


def replay(
    traces: Sequence[Trace],
    setting: DraftParams,
    draft_cost: float,
    costs: PassCosts,
    sides: Sequence[SideTrace] | None = None,
    *,
    only_draft: bool = False,
) -> Replay:
    """Simulated greedy decoding of the traced texts.

    Args:
        traces: texts under a plan.
        setting: how each step drafts, one token at least where the text goes on.
        draft_cost: seconds per drafted token.
        costs: of verification.
        sides: of the same texts; without them the setting's tree is not used.
        only_draft: the token behind an accepted leaf is not kept, but the next draft begins with
            it at no cost (half precision, see :mod:`conflayers_cli.spec_decode.tree`).
    """
    steps = drafted = accepted = tokens = 0
    seconds = 0.0
    tree, max_tokens = setting.tree if sides else None, setting.max_tokens
    verify_cost = cache(costs.verify_cost)
    for i, trace in enumerate(traces):
        lengths, runs = trace.draft_lengths(setting.stop_probability), trace.runs
        position = 0
        while position < len(lengths):
            drafts = min(lengths[position], max_tokens)
            kept = min(drafts, runs[position])
            width = 1 + drafts
            if sides and tree:
                span = slice(position, position + drafts)
                leaves = leaf_counts(
                    trace.probability[span],
                    sides[i].beside[span],
                    tree,
                    costs.verify_cost,
                    draft_cost,
                    only_draft=only_draft,
                )
                width += sum(leaves)
                if kept < drafts and sides[i].rank[position + kept] < leaves[kept]:
                    if only_draft:
                        seconds -= draft_cost
                    else:
                        kept += 1
            steps += 1
            drafted += drafts
            accepted += kept
            tokens += kept + 1
            seconds += drafts * draft_cost + verify_cost(width)
            position += kept + 1
    return Replay(steps, drafted, accepted, tokens, seconds)
