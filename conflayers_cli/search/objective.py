"""The objective of every search: tokens per second on this device.

A plan is judged by one parallel draft pass over texts the model wrote itself (SWIFT's matchness,
arXiv 2410.06916 §4.1): at every position, does the draft's choice equal the text's next token, and
how sure was the draft? As in decoding, it sees the full model's keys and values of the tokens
before. (But for those that it has drafted itself since the last verification: agreement errs on the
high side at the end of long drafts.) Decoding is then replayed on paper for each draft length and
stop probability, with the passes' measured costs, and the best setting is the plan's score.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.memo import Memo, label_of
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.tree import TreeShape

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
SAME = 0.015
"""Predicted speeds this close are taken as equal when the draft setting is chosen."""
STOPS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Setting:
    """How a draft is made.

    Attributes:
        max_tokens: its length; 0 drafts nothing.
        stop_probability: the one under which it stops.
        tree: side candidates wanted beside each token; None: a chain.
    """

    max_tokens: int
    stop_probability: float
    tree: TreeShape | None = None


VANILLA = Setting(0, 0.0)
PAPER = Setting(25, 0.8)
"""How ConfLayers and SWIFT draft."""


@dataclass(frozen=True)
class Trace:
    """One text under a plan, position by position.

    Attributes:
        agrees: whether the draft's choice is the text's next token, bool ``[n]``.
        probability: the draft's probability of its own choice, float ``[n]``.
    """

    agrees: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SideTrace:
    """The draft's other candidates along one text.

    Attributes:
        beside: their probabilities at every position, falling, float ``[n, K]``.
        rank: where among them the text's next token is, ``[n]``; K where it is not.
    """

    beside: npt.NDArray[np.float64]
    rank: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Replay:
    """Decoding replayed over traces: what it drafts, keeps, decides and costs."""

    steps: int
    drafted: int
    accepted: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """A plan's worth.

    Attributes:
        plan: what is left out.
        agreement: share of positions where the draft's choice is the model's.
        setting: the best draft setting.
        speedup: predicted tokens per second with it over vanilla's. Under 1 the plan does not pay,
            but a search still sees which way is up.
        replay: the decoding behind the speed-up.
    """

    plan: SkipPlan
    agreement: float
    setting: Setting
    speedup: float
    replay: Replay


class Objective:
    """Judges plans of one model by texts the model wrote.

    Args:
        decoder: the model.
        costs: its measured passes.
        samples: prompts with the model's own greedy output; those under 3 tokens are left out.
        most_tokens: positions per sample at the most.
        memo: has what passes found; None: one of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        costs: Costs,
        samples: Sequence[Sample],
        most_tokens: int = 96,
        memo: Memo | None = None,
    ) -> None:
        self._memo = memo or Memo(decoder)
        self.decoder = decoder
        self.costs = costs
        long = (sample for sample in samples if len(sample.output) >= 3)
        self._texts = [JudgedText(decoder, sample, most_tokens) for sample in long]
        self._traces: dict[tuple[SkipPlan, int], Trace] = {}
        self._sides: dict[tuple[SkipPlan, int], list[SideTrace]] = {}
        self._known: dict[tuple[SkipPlan, int], Score] = {}

    @property
    def texts(self) -> int:
        """How many texts there are to judge by."""
        return len(self._texts)

    @property
    def passes(self) -> int:
        """Draft passes made so far."""
        return len(self._traces)

    def at(self, context: int) -> Objective:
        """The same judge where texts are ``context`` tokens long: costs change, traces don't."""
        other = copy.copy(self)
        other.costs = self.costs.at(context, self.decoder.depth)
        other._known = {}
        return other

    def traces(self, plan: SkipPlan, texts: int | None = None) -> list[Trace]:
        """The first texts under a plan, a draft pass each where it is not known yet."""
        missing = [i for i in range(self._count(texts)) if (plan, i) not in self._traces]
        if missing:
            found = self._memo.cached(
                f"{label_of(plan)}: texts {' '.join(map(str, missing))}",
                lambda: [dict(vars(self._texts[i].trace(self.decoder, plan))) for i in missing],
            )
            for i, trace in zip(missing, found, strict=True):
                self._traces[plan, i] = Trace(**trace)
        return [self._traces[plan, i] for i in range(self._count(texts))]

    def knows(self, plan: SkipPlan, texts: int | None = None) -> bool:
        """Whether :meth:`score` needs no pass."""
        return all((plan, i) in self._traces for i in range(self._count(texts)))

    def side_traces(self, plan: SkipPlan, most: int) -> list[SideTrace]:
        """All texts under a plan with the draft's ``most`` next-best candidates, a pass each where
        they are not known yet."""
        if (plan, most) not in self._sides:
            found = self._memo.cached(
                f"{label_of(plan)}: {most} side candidates",
                lambda: [dict(vars(t.side_trace(self.decoder, plan, most))) for t in self._texts],
            )
            self._sides[plan, most] = [SideTrace(**trace) for trace in found]
        return self._sides[plan, most]

    def score(self, plan: SkipPlan, texts: int | None = None) -> Score:
        """The plan's worth on the first ``texts`` texts (default: all). Scores are kept."""
        count = self._count(texts)
        known = self._known.get((plan, count))
        if known is None:
            known = max(self._scores(plan, count), key=lambda score: score.speedup)
            self._known[plan, count] = known
        return known

    def modest(self, plan: SkipPlan) -> Score:
        """As :meth:`score`, but of settings nearly as good as the best, the one that drafts least.

        It loses least on a text that is harder to draft than these.
        """
        scores = self._scores(plan, len(self._texts))
        enough = max(score.speedup for score in scores) * (1 - SAME)
        return min(
            (score for score in scores if score.speedup >= enough),
            key=lambda score: (score.replay.drafted, -score.speedup),
        )

    def _count(self, texts: int | None) -> int:
        """How many texts there are of the ``texts`` asked for (None: of all)."""
        return len(self._texts) if texts is None else min(texts, len(self._texts))

    def _scores(self, plan: SkipPlan, count: int) -> list[Score]:
        """The plan with every draft setting."""
        if not plan or not count:
            vanilla = Replay(1, 0, 0, 1, self.costs.verify_cost(1))
            return [Score(plan, 1.0, VANILLA, 1.0, vanilla)]
        traces = self.traces(plan, count)
        agreement = float(np.concatenate([t.agrees for t in traces]).mean())
        draft = self.costs.draft_cost(plan, self.decoder.depth)
        runs: list[list[int]] = [runs_of(trace.agrees).tolist() for trace in traces]
        scores = []
        for stop in STOPS:
            chains: list[list[int]] = [_until_stop(trace, stop).tolist() for trace in traces]
            for length in LENGTHS:
                setting = Setting(length, stop)
                played = _played(chains, runs, length, draft, self.costs)
                speedup = played.tokens * self.costs.verify_cost(1) / played.seconds
                scores.append(Score(plan, agreement, setting, speedup, played))
        return scores


class JudgedText:
    """A sample; its prompt is read when a pass is asked for first."""

    def __init__(self, decoder: Decoder, sample: Sample, most_tokens: int) -> None:
        output = sample.output[: most_tokens + 1]
        start, device = len(sample.prompt), decoder.device
        self._read = (*sample.prompt, *output[:-1])
        self._cache: KVCache | None = None
        self.fed = torch.tensor([output[:-1]], device=device)
        self.following = torch.tensor(output[1:], device=device)
        self.positions = torch.arange(start, len(self._read), device=device)[None]

    def _logits(self, decoder: Decoder, plan: SkipPlan) -> torch.Tensor:
        count = self.fed.shape[1]
        if self._cache is None:
            self._cache = decoder.new_cache(len(self._read) + count)
            decoder.prefill(torch.tensor([self._read], device=decoder.device), self._cache)
        # Every drafted token has a slot behind the text: it sees the full model's keys and its own.
        slots = self.positions + count
        return decoder.forward(self.fed, self.positions, self._cache, plan, slots=slots)[0].float()

    def side_trace(self, decoder: Decoder, plan: SkipPlan, most: int) -> SideTrace:
        probability = torch.softmax(self._logits(decoder, plan), dim=-1).nan_to_num(0.0)
        best = probability.topk(min(most + 1, probability.shape[-1]), dim=-1)
        found = best.indices[:, 1:] == self.following[:, None]
        rank = torch.where(found.any(-1), found.int().argmax(-1), found.shape[-1])
        return SideTrace(best.values[:, 1:].double().cpu().numpy(), rank.cpu().numpy())

    def trace(self, decoder: Decoder, plan: SkipPlan) -> Trace:
        logits = self._logits(decoder, plan)
        top, choice = logits.max(dim=-1)
        probability = torch.exp(top - torch.logsumexp(logits, dim=-1))
        known = probability.isfinite()  # logits that are no numbers choose nothing
        agrees = known & (choice == self.following)
        probability = probability.where(known, 0.0)
        return Trace(agrees.cpu().numpy(), probability.double().cpu().numpy())


def replay(traces: Sequence[Trace], setting: Setting, draft_cost: float, costs: Costs) -> Replay:
    """Greedy decoding of the traced texts, on paper.

    Args:
        traces: texts under a plan.
        setting: at least one token is drafted per step where the text goes on.
        draft_cost: seconds per drafted token.
        costs: of verification.
    """
    runs = [runs_of(trace.agrees).tolist() for trace in traces]
    chains = [_until_stop(trace, setting.stop_probability).tolist() for trace in traces]
    return _played(chains, runs, setting.max_tokens, draft_cost, costs)


def _played(
    chains: Sequence[list[int]],
    runs: Sequence[list[int]],
    most: int,
    draft_cost: float,
    costs: Costs,
) -> Replay:
    """As :func:`replay`, of texts of which is known how far each draft and each agreement goes."""
    steps = drafted = accepted = tokens = 0
    seconds = 0.0
    width_cost = [costs.verify_cost(w + 1) for w in range(most + 1)]
    for chain, run in zip(chains, runs, strict=True):
        at = 0
        while at < len(chain):
            drafts = min(chain[at], most)
            kept = min(drafts, run[at])
            steps += 1
            drafted += drafts
            accepted += kept
            tokens += kept + 1
            seconds += drafts * draft_cost + width_cost[drafts]
            at += kept + 1
    return Replay(steps, drafted, accepted, tokens, seconds)


def chain_lengths(trace: Trace, setting: Setting) -> npt.NDArray[np.int64]:
    """Tokens drafted when drafting begins at each position (the stop token included)."""
    return np.minimum(_until_stop(trace, setting.stop_probability), setting.max_tokens)


def _until_stop(trace: Trace, probability: float) -> npt.NDArray[np.int64]:
    """As :func:`chain_lengths`, however long a draft may be."""
    stops = trace.probability < probability
    return _until(stops, len(stops) - 1) + 1


def runs_of(agrees: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Length of the run of agreement that begins at each position."""
    return _until(~agrees, len(agrees))


def _until(ends: npt.NDArray[np.bool_], last: int) -> npt.NDArray[np.int64]:
    """How far it is from each position to the first that ends something, else to the last."""
    at = np.arange(len(ends))
    places = np.append(np.flatnonzero(ends), last)
    return places[np.searchsorted(places[:-1], at)] - at
