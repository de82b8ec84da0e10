"""Which blocks of layers a linear map stands in for: chosen together with what is left out.

A block's map is fitted in closed form to hidden states of the model's own texts (:mod:`.ridge`),
and a plan with maps is judged as every other plan is, by predicted tokens per second on texts that
were not fitted to: a map costs time, and it pays for long runs of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.stand_in import StandIn
from conflayers_cli.search.blocks import Block, Fitter, candidates, neighbours
from conflayers_cli.search.corpus import MOST_TEXTS, Sample
from conflayers_cli.search.local_search import LEAST_GAIN, Refiner
from conflayers_cli.search.objective import SAME, Objective, Score
from conflayers_cli.search.problem import Task
from conflayers_cli.search.settings import StandInSettings
from conflayers_cli.search.states import Reader
from conflayers_cli.skip_plan import SkipPlan, Weights

LEAST_DEPTH = 6
"""A model with fewer layers has no run worth a map."""
MOST_BLOCKS = 3
"""Runs that maps stand in for in one plan at the most."""
FOLLOWED = 3
"""The best runs whose neighbours are looked at."""
ROUNDS, READING_ROUNDS = 8, 2
"""Rounds of looking at a run's neighbours at the most; fewer where texts are read for each."""
LEAST_TOKENS = 256
"""A map fitted to fewer tokens is none."""


@dataclass(frozen=True)
class Found:
    """What came of looking.

    Attributes:
        score: the best plan with stand-ins, or the one there was before; None: there is none.
        judged: plans judged.
        tokens: fitted to.
        reason: why there are no stand-ins, one phrase; None: there are.
        interrupted: cut short by the user.
        objective: by whom the score is; None: by whom it was before.
    """

    score: Score | None
    judged: int
    tokens: int
    reason: str | None
    interrupted: bool = False
    objective: Objective | None = None


def find_stand_ins(
    task: Task,
    before: Score | None,
    settings: StandInSettings,
    most_plans: int,
    on_better: Callable[[Score, int], None],
    weights: Sequence[Weights | None] = (None,),
) -> Found:
    """Look for a plan with stand-ins that beats the best one without.

    Args:
        task: its texts are judged by; further ones are fitted to.
        before: the best plan without; None: none was found that leaves out anything.
        settings: see there.
        most_plans: judged in the refinement of the best one at the most.
        on_better: told about every better plan and the plans judged so far.
        weights: those that drafts may use; None are the model's own.
    """
    if (reason := why_not(task.decoder)) is not None:
        return Found(before, 0, 0, reason)
    split = _split(task, settings.tokens)
    if split is None:
        return Found(before, 0, 0, "they need at least two prompts with outputs")
    objective, reader = split[0], Reader(task.decoder, split[1], settings.tokens)
    if reader.tokens < LEAST_TOKENS:
        return Found(before, 0, reader.tokens, f"{reader.tokens} tokens are too few to fit to")
    fitter = Fitter(task.decoder, reader, settings.rank, settings.memory)
    search = _Search(task, objective, fitter, before, on_better, weights)
    interrupted = False
    try:
        search.run(most_plans)
    except KeyboardInterrupt:
        interrupted = True
    best = search.best
    least = (search.base.speedup if search.base else 1.0) * (1 + SAME)
    if best is None or best.speedup <= least:
        reason = "none decodes faster than what there is without, by the texts judged by"
        return Found(before, search.judged, reader.tokens, reason, interrupted)
    return Found(best, search.judged, reader.tokens, None, interrupted, objective)


def why_not(decoder: Decoder) -> str | None:
    """Why nothing can stand in for this model's layers, one phrase; None: it can."""
    if decoder.depth < LEAST_DEPTH:
        return f"the model has {decoder.depth} layers, and they pay from {LEAST_DEPTH} on"
    import torch

    size = getattr(decoder.config, "hidden_size", None)
    shapes: list[torch.Size] = []
    token, position = torch.zeros((1, 1), dtype=torch.int64), torch.zeros((1, 1), dtype=torch.int64)
    with decoder.showing_states([1], lambda layer, states: shapes.append(states.shape)):
        decoder.forward(token, position, decoder.new_cache(1))
    if not shapes or len(shapes[0]) != 3 or shapes[0][-1] != size:
        return "what its layers hand on is not one state per token"
    return None


def _split(task: Task, tokens: int) -> tuple[Objective, tuple[Sample, ...]] | None:
    """(who judges, texts to fit to), of different prompts; None: there are too few.

    Where there are plenty, plans are judged by the texts that all searches judge by.
    """
    plenty = len(task.prompts) >= 2 * MOST_TEXTS
    judged = task.texts.enough(MOST_TEXTS if plenty else max(len(task.prompts) // 3, 1))
    fitted = task.texts.others(judged, tokens)
    if not judged or not fitted:
        return None
    if plenty:
        return task.objective, fitted
    return Objective(task.decoder, task.costs, judged, record=task.record), fitted


class _Search:
    """The search for the best runs, one after the other."""

    def __init__(
        self,
        task: Task,
        objective: Objective,
        fitter: Fitter,
        before: Score | None,
        on_better: Callable[[Score, int], None],
        weights: Sequence[Weights | None],
    ) -> None:
        self._task = task
        self._objective = objective
        self._fitter = fitter
        self._on_better = on_better
        self._rounds = ROUNDS if fitter.kept else READING_ROUNDS
        self.judged = 0
        self.best: Score | None = None
        self.base = objective.score(before.plan) if before is not None and before.plan else None
        # On top of what is left out anyway, where that pays, and by themselves.
        self._bases = [SkipPlan(weights=kind) for kind in weights]
        if self.base is not None and self.base.speedup > 1:
            self._bases.append(self.base.plan)

    def run(self, most_plans: int) -> None:
        """Find the runs; then leave out more, or less, beside them."""
        similarity = self._fitter.similarity()
        for _ in range(MOST_BLOCKS):
            taken = self.best.plan.replaced if self.best else frozenset()
            stand_ins = self.best.plan.stand_ins if self.best else ()
            if not self._add_run(candidates(similarity, taken), taken, stand_ins):
                break
        if self.best is not None and not self._task.out_of_time:
            refiner = Refiner(
                self._objective,
                single_sub_layers=len(self._task.decoder.sub_layers) == 2,
                on_progress=lambda score, judged: self._on_better(score, self.judged + judged),
                most_plans=most_plans,
                out_of_time=lambda: self._task.out_of_time,
            )
            try:
                refiner.refine(self.best.plan)
            finally:
                self.judged += refiner.judged
                if refiner.best is not None:  # told about on the way
                    self.best = refiner.best

    def _add_run(
        self, blocks: list[Block], taken: frozenset[int], stand_ins: tuple[StandIn, ...]
    ) -> bool:
        """Look for one more run beside those of ``stand_ins``; whether there is one that gains.

        A round looks at the neighbours of the best few runs: where one alone is followed, the
        search ends at the first hill it meets.
        """
        start = self.best
        worth: dict[Block, float] = {}
        opened: set[Block] = set()
        for _ in range(self._rounds + 1):
            fresh = [block for block in dict.fromkeys(blocks) if block not in worth]
            if not fresh or self._task.out_of_time:
                break
            before = max(worth.values(), default=0.0)
            worth |= self._judged(fresh, stand_ins)
            if max(worth.values()) <= before * (1 + LEAST_GAIN):
                break
            best = sorted(worth, key=worth.__getitem__, reverse=True)[:FOLLOWED]
            depth = self._task.decoder.depth
            blocks = [
                block
                for each in best
                if each not in opened
                for block in neighbours(each, depth, taken)
            ]
            opened |= set(best)
        return self.best is not start

    def _judged(self, blocks: list[Block], stand_ins: tuple[StandIn, ...]) -> dict[Block, float]:
        """The predicted speed-up with each of the runs added."""
        worth: dict[Block, float] = {}
        for block, stand_in in self._fitter.maps(blocks).items():
            for base in self._bases:
                maps = (*stand_ins, stand_in)
                plan = SkipPlan.of(base.attention, base.mlp, maps, base.weights)
                self.judged += 1
                score = self._objective.score(plan)
                worth[block] = max(score.speedup, worth.get(block, 0.0))
                self._take(score)
        kept = [(each.begin, each.end) for each in self.best.plan.stand_ins] if self.best else []
        self._fitter.forget(kept)
        if self.best is not None and len(self._bases) > 1:
            # With what the best one has: in a first round that is clear.
            same = [base for base in self._bases if base.weights == self.best.plan.weights]
            self._bases = same or self._bases
        return worth

    def _take(self, score: Score) -> None:
        if self.best is None or score.speedup > self.best.speedup * (1 + LEAST_GAIN):
            self.best = score
            self._on_better(score, self.judged)


def blocks_of(stand_ins: Iterable[StandIn]) -> list[Block]:
    """The layers that they stand for."""
    return [(each.begin, each.end) for each in stand_ins]
