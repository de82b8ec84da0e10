"""SWIFT's search on a model whose answer is known."""

import numpy as np
import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.search.problem import SearchProblem, Trial
from conflayers_cli.search.strategies import swift as module
from conflayers_cli.search.strategies.swift import Swift, SwiftLoop
from conflayers_cli.skip_plan import SkipPlan
from tests.search import planted

INNER = planted.DEPTH - 2


def test_keeps_the_better_set_and_skips_as_many_as_it_says() -> None:
    result = Swift(skip_ratio=0.3, max_steps=60).search(planted.problem())
    scores = [trial.figures["matchness"] for trial in result.trials]
    assert len(scores) == 60
    kept = next(trial for trial in result.trials if trial.plan == result.plan)
    assert kept.figures["matchness"] >= scores[0]
    assert {len(trial.plan) for trial in result.trials[1:]} == {int(0.3 * 2 * INNER)}
    assert result.tensors["matchness"].tolist() == pytest.approx(scores)
    for row, trial in zip(result.tensors["skipped"], result.trials, strict=True):
        assert int(row.sum()) == len(trial.plan)


def test_the_starting_set_is_scored_before_it_can_be_replaced() -> None:
    start = SkipPlan.of_layers(planted.PLANTED)  # as good as can be: nothing random beats it
    loop = SwiftLoop(Swift(skip_ratio=0.5, max_score=1.0), planted.decoder(), start=start)
    generation = planted.problem().continuations.begin(planted.problem().prompts[0])
    while len(generation.output) < 30:
        generation.step()
    loop.consider(generation)
    assert loop.best is not None and loop.best.plan == start
    for _ in range(30):
        loop.consider(generation)
    assert loop.plan == start
    assert all(trial.figures["matchness"] <= 1.0 for trial in loop.trials)


def test_a_lucky_set_must_win_on_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = SwiftLoop(Swift(), planted.decoder(), start=SkipPlan.of_layers([2]))
    generation = planted.problem().continuations.begin(planted.problem().prompts[0])
    while len(generation.output) < 30:
        generation.step()
    easy = {"start": 0.5}

    def scored(decoder: object, plan: SkipPlan, *rest: object) -> float:
        return easy["start"] if plan == SkipPlan.of_layers([2]) else 0.7

    monkeypatch.setattr(module, "matchness", scored)
    loop.consider(generation)
    easy["start"] = 0.8  # the text has become easy: the kept set does better on it, too
    loop.consider(generation)
    assert loop.plan == SkipPlan.of_layers([2])
    easy["start"] = 0.6
    loop.consider(generation)
    assert loop.plan != SkipPlan.of_layers([2])


def test_stop_rules() -> None:
    assert "reached 12 steps" in Swift(max_steps=12).search(planted.problem()).stopped_because
    impatient = Swift(patience=3, max_score=1.0).search(planted.problem())
    assert impatient.stopped_because == "no better set in 3 steps"
    good = SwiftLoop(Swift(), planted.decoder(), start=SkipPlan.of_layers(planted.PLANTED[:1]))
    generation = planted.problem().continuations.begin(planted.problem().prompts[0])
    while len(generation.output) < 30:
        generation.step()
    good.consider(generation)
    assert good.stopped_because.startswith("matchness")


def test_a_seed_makes_it_reproducible() -> None:
    def plans(seed: int) -> list[SkipPlan]:
        problem = planted.problem()
        problem.seed = seed
        return [trial.plan for trial in Swift(max_steps=30).search(problem).trials]

    assert plans(1) == plans(1)
    assert plans(1) != plans(2)


def test_the_process_suggests_what_it_has_learned() -> None:
    """Sets are scored by a known rule: sub-layer i is worth leaving out the more, the larger i."""
    loop = SwiftLoop(Swift(skip_ratio=0.5), planted.decoder())
    worth = np.linspace(-1, 1, 2 * INNER)
    for _ in range(80):
        plan = loop._plan_of(loop._random_point())
        loop._note(plan, float(loop._point_of(plan) @ worth))
    random = [float(point @ worth) for point in loop._points()]
    suggested = float(loop._suggestion(0) @ worth)
    assert suggested > np.quantile(random, 0.95)


def test_an_interrupt_keeps_the_best_so_far() -> None:
    seen: list[Trial] = []

    def interrupt(trial: Trial, best: Trial | None) -> None:
        seen.append(trial)
        if len(seen) == 4:
            raise KeyboardInterrupt

    result = Swift().search(planted.problem(interrupt))
    assert result.interrupted
    assert result.plan in [trial.plan for trial in seen]


def test_outputs_too_short_to_judge_by_end_it() -> None:
    problem = planted.problem()
    short = SearchProblem(problem.decoder, problem.prompts, problem.costs, 10, frozenset())
    result = Swift().search(short)
    assert "no output has more than 16 tokens" in result.stopped_because
    assert not result.trials


def test_without_scikit_learn_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_sklearn", lambda: False)
    with pytest.raises(InputError, match="pip install"):
        Swift().search(planted.problem())
