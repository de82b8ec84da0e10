"""Dropping one sub-layer at a time."""

from conflayers_cli.search.problem import Trial
from conflayers_cli.search.strategies.greedy import Greedy
from conflayers_cli.skip_plan import SkipPlan
from tests.search import planted


def test_finds_the_planted_layers_and_nothing_else() -> None:
    result = Greedy().search(planted.problem())
    assert result.plan == SkipPlan.of_layers(planted.PLANTED)
    assert result.setting is not None and result.setting.max_tokens > 1
    assert not result.interrupted


def test_every_drop_takes_one_more_sub_layer() -> None:
    result = Greedy().search(planted.problem())
    sizes = [len(trial.plan) for trial in result.trials]
    assert sizes == list(range(1, len(sizes) + 1))
    best = max(result.trials, key=lambda trial: trial.speedup or 0.0)
    assert best.plan == result.plan


def test_the_hopeless_are_not_tried_again() -> None:
    judged = []
    problem = planted.problem()
    score = problem.objective.score

    def noted(plan: SkipPlan, texts: int | None = None) -> object:
        judged.append(plan)
        return score(plan, texts)

    problem.objective.score = noted  # type: ignore[method-assign, assignment]
    result = Greedy(hopeless=0.9).search(problem)
    alone = result.tensors["agreement_without"]
    hopeless = {i for i in range(1, planted.DEPTH - 1) if float(alone[0, i]) < 0.9}
    assert hopeless, "the case must arise for the test to mean anything"
    assert not any(hopeless & set(plan.attention) for plan in judged if len(plan) > 1)


def test_gives_up_where_no_sub_layer_can_be_spared() -> None:
    result = Greedy(hopeless=1.01).search(planted.problem())
    assert not result.plan
    assert "no sub-layer alone" in result.stopped_because


def test_an_interrupt_keeps_the_best_so_far() -> None:
    seen: list[Trial] = []

    def interrupt(trial: Trial, best: Trial | None) -> None:
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt

    result = Greedy().search(planted.problem(interrupt))
    assert result.interrupted
    assert result.plan in [trial.plan for trial in seen]


def test_ends_when_the_time_is_over() -> None:
    problem = planted.problem()
    problem.deadline = 0.0
    result = Greedy().search(problem)
    assert result.stopped_because == "out of time"
    assert not result.plan
