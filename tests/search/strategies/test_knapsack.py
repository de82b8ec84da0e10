"""Knapsack selection on a tiny model, and its choice among made-up paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.search.problem import SearchProblem, Trial
from conflayers_cli.search.strategies import knapsack as module
from conflayers_cli.search.strategies.knapsack import NOTED, Knapsack, fit_weights, score_paths
from conflayers_cli.search.strategies.knapsack_dp import DynamicProgram, KnapsackWeights, SkipPath
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted

GROWING = replace(planted.COSTS, attention_per_position=0.001)


def is_planted(plan: SkipPlan) -> bool:
    return plan == SkipPlan.of_layers(planted.PLANTED)


@pytest.mark.parametrize("strategy", [Knapsack(), Knapsack.clasp()])
def test_finds_the_planted_layers_and_nothing_else(strategy: Knapsack) -> None:
    result = strategy.search(planted.problem())
    assert is_planted(result.plan)
    assert result.setting is not None and result.setting.max_tokens > 1
    assert result.setting.stop_probability == 0
    assert not result.interrupted
    assert result.ranges == (), "attention does not grow with the context here"


def test_names() -> None:
    assert Knapsack().name == "knapsack"
    assert Knapsack.clasp().name == "clasp"


def test_is_reproducible() -> None:
    first, second = (Knapsack().search(planted.problem()) for _ in range(2))
    assert first.trials == second.trials
    assert first.setting == second.setting


def test_trials_are_the_fastest_budgets() -> None:
    result = Knapsack(most_saved=1.0).search(planted.problem())
    assert len(result.trials) == NOTED
    saved = [trial.figures["saved"] for trial in result.trials]
    assert saved == sorted(saved)
    speeds = [trial.speedup or 0.0 for trial in result.trials]
    assert result.plan == result.trials[speeds.index(max(speeds))].plan
    speedups = result.tensors["speedup"]
    assert float(speedups[~speedups.isnan()].max()) == pytest.approx(max(speeds))
    assert len(speedups[~speedups.isnan()]) > NOTED, (
        "the case must arise for the test to mean anything"
    )


def test_tensors_tell_every_budget() -> None:
    result = Knapsack().search(planted.problem())
    budgets = int(0.65 * (planted.DEPTH - 2) * 2) + 1
    assert result.tensors["similarity"].shape == (planted.DEPTH, budgets)
    assert result.tensors["agreement"].shape == result.tensors["speedup"].shape == (budgets,)
    assert float(result.tensors["similarity"][-1, 2 * len(planted.PLANTED)]) > 0.999
    assert float(result.tensors["agreement"][2 * len(planted.PLANTED)]) == 1.0


@pytest.mark.parametrize(
    ("attention", "mlp", "pair"),
    [
        (1.0, 1.0, (1, 1)),
        (1.04, 1.0, (1, 1)),
        (1.0, 2.0, (1, 2)),
        (1.0, 1.5, (2, 3)),
        (3.1, 1.0, (3, 1)),
        (4.0, 3.0, (4, 3)),
        (0.0, 0.0, (1, 1)),
        (0.0, 1.0, (1, 16)),
        (1.0, 0.0, (16, 1)),
    ],
)
def test_weights_are_the_smallest_pair_close_to_the_ratio(
    attention: float, mlp: float, pair: tuple[int, int]
) -> None:
    costs = replace(planted.COSTS, attention=attention, mlp=mlp)
    assert fit_weights(costs, max_sum=40) == KnapsackWeights.of(*pair)


def test_weights_are_as_close_as_the_budgets_allow() -> None:
    costs = replace(planted.COSTS, attention=4.0, mlp=3.0)
    assert fit_weights(costs, max_sum=6) == KnapsackWeights.of(3, 2)
    assert fit_weights(replace(costs, attention=1.0), max_sum=3) == KnapsackWeights.of(1, 2)
    assert fit_weights(costs, max_sum=1) == KnapsackWeights.of(1, 1)


def path(layers: int, agreement: float) -> SkipPath:
    return SkipPath(SkipPlan.of_layers(range(1, layers + 1)), layers, 0.9, agreement)


def test_the_choice_has_most_expected_tokens_per_second() -> None:
    costs, tokens = planted.COSTS, 30
    full, *others = paths = [path(0, 1.0), path(3, 0.9), path(5, 0.8), path(8, 0.3)]
    chosen = score_paths(paths, costs, planted.DEPTH, tokens, max_draft=10)
    assert [choice.path for choice in chosen] == others
    for choice in chosen:
        alpha = (choice.path.agreement * tokens + 1) / (tokens + 2)
        draft = costs.draft_cost(choice.path.plan, planted.DEPTH)
        speeds = {
            length: sum(alpha**k for k in range(length + 1))
            / (length * draft + costs.verify_cost(length + 1))
            for length in range(1, 11)
        }
        assert choice.setting.max_tokens == max(speeds, key=lambda length: speeds[length])
        assert choice.speedup == pytest.approx(max(speeds.values()) * costs.verify_cost(1))
    assert chosen[2].setting.max_tokens == 1
    assert full not in [choice.path for choice in chosen]


def test_agreement_is_taken_as_falling() -> None:
    """A token of luck with much left out is shared with the neighbours."""
    paths = [path(0, 1.0), path(3, 0.8), path(4, 0.9), path(8, 0.3)]
    pooled = [path(0, 1.0), path(3, 0.85), path(4, 0.85), path(8, 0.3)]
    choices = [score_paths(p, planted.COSTS, planted.DEPTH, 30, 10) for p in (paths, pooled)]
    for one, other in zip(*choices, strict=True):
        assert one.setting == other.setting
        assert one.speedup == pytest.approx(other.speedup)


class Made:
    """Stands for the dynamic programme: paths by weights, and which weights were asked for."""

    def __init__(self, paths: Mapping[KnapsackWeights, Sequence[SkipPath]]) -> None:
        self.paths = paths
        self.asked: list[KnapsackWeights] = []

    def __call__(
        self, decoder: Decoder, window: object, weights: KnapsackWeights, **options: Any
    ) -> Made:
        self.asked.append(weights)
        self.similarity = torch.ones(decoder.depth, options["max_saved"] + 1)
        return self

    def run(self) -> tuple[SkipPath, ...]:
        return tuple(self.paths[self.asked[-1]])


FULL = SkipPath(SkipPlan(), 0, 1.0, 1.0)
SHORT = SkipPath(SkipPlan.of_layers((2, 3, 4)), 3, 0.99, 1.0)
LONG = SkipPath(SkipPlan.of((2, 3, 4, 6, 7, 8), ()), 6, 0.99, 1.0)
LONGER = replace(LONG, plan=SkipPlan.of((2, 3, 4, 6, 7, 9), (4,)), saved=7)


def look(
    monkeypatch: pytest.MonkeyPatch, problem: SearchProblem | None = None, **settings: Any
) -> tuple[list[tuple[int, SkipPlan]], list[KnapsackWeights]]:
    """Ranges found, with these paths: attention weighs 1, 2.5 and 8.5 times an MLP."""
    paths = {KnapsackWeights.of(1, 1): (FULL, SHORT), KnapsackWeights.of(5, 2): (FULL, LONG)}
    made = Made(
        {**paths, KnapsackWeights.of(17, 2): (FULL, LONGER), KnapsackWeights.whole(): (FULL, SHORT)}
    )
    monkeypatch.setattr(module, "DynamicProgram", made)
    result = Knapsack(**settings).search(problem or planted.problem(costs=GROWING))
    assert result.plan == SHORT.plan
    return [(each.from_context, each.plan) for each in result.ranges], made.asked


def roomy(problem: SearchProblem) -> SearchProblem:
    """A model that takes longer texts."""
    decoder = Decoder(problem.decoder.model)
    decoder.config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "max_position_embeddings": 4096})
    return replace(problem, decoder=decoder)


def test_a_longer_context_has_a_range_where_its_plan_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = roomy(planted.problem(costs=GROWING))
    ranges, asked = look(monkeypatch, problem, context_lengths=(1006, 266, 4256))
    # 266 has the weights of 256, and what is not a plan of its own is no range
    assert asked == [KnapsackWeights.of(1, 1), KnapsackWeights.of(5, 2)]
    assert ranges == [(1006, LONG.plan)]


def test_contexts_that_the_model_does_not_take_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert look(monkeypatch)[0] == []
    ranges, asked = look(
        monkeypatch, roomy(planted.problem(costs=GROWING)), context_lengths=(5000,)
    )
    assert (ranges, len(asked)) == ([], 1)


def test_clasp_looks_at_one_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = roomy(planted.problem(costs=GROWING))
    monkeypatch.setattr(PassCosts, "at", lambda *args: pytest.fail("a longer context is looked at"))
    options = {"whole_layers": True, "unit_weights": True, "context_lengths": (1006,)}
    assert look(monkeypatch, problem, **options) == ([], [KnapsackWeights.whole()])


def test_plans_known_from_other_contexts_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a longer context's own programme was cut short, or found something slower."""
    problem = roomy(planted.problem(costs=GROWING))
    slower = SkipPath(SkipPlan.of_layers((5,)), 7, 0.5, 0.0)
    for own in ((), (FULL, slower)):
        paths = {KnapsackWeights.of(1, 1): (FULL, SHORT), KnapsackWeights.of(5, 2): own}
        monkeypatch.setattr(module, "DynamicProgram", Made(paths))
        result = Knapsack(context_lengths=(1006,)).search(problem)
        assert result.plan == SHORT.plan
        assert result.ranges == ()


def test_default_contexts_are_four_and_sixteen_times_the_measured_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs = replace(GROWING, attention_per_position=0.75 / 768)
    problem = roomy(planted.problem(costs=costs))
    asked: list[int] = []
    at = PassCosts.at

    def noted(self: PassCosts, context: int, depth: int) -> PassCosts:
        asked.append(context)
        return at(self, context, depth)

    monkeypatch.setattr(PassCosts, "at", noted)
    ranges, _ = look(monkeypatch, problem)
    assert asked == [1024, 4096]
    assert ranges == [(1024, LONG.plan), (4096, LONGER.plan)]


def test_an_interrupt_keeps_the_best_so_far() -> None:
    seen: list[Trial] = []

    def interrupt(trial: Trial, best: Trial | None) -> None:
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt

    result = Knapsack().search(planted.problem(interrupt))
    assert result.interrupted
    assert len(result.trials) == 3
    assert result.plan == max(seen, key=lambda trial: trial.speedup or 0.0).plan


def test_interrupted_before_a_path_was_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DynamicProgram, "run", interrupt)
    result = Knapsack().search(planted.problem())
    assert result.interrupted
    assert not result.plan and result.setting is None


def test_ends_when_the_time_is_over() -> None:
    problem = planted.problem()
    problem.deadline = 0.0
    result = Knapsack().search(problem)
    assert result.stopped_because == "out of time"
    assert not result.plan


def test_no_text_to_judge_by() -> None:
    problem = replace(planted.problem(), prompts=())
    result = Knapsack().search(problem)
    assert result.stopped_because == "no text to judge by"
    assert not result.plan


def test_only_whole_layers_where_sub_layers_cannot_be_told_apart() -> None:
    decoder = tiny.decoder("opt")
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(3))
    problem = SearchProblem(decoder, prompts, planted.COSTS, 40, frozenset())
    result = Knapsack(least_similarity=-1.0, most_saved=1.0).search(problem)
    assert len(result.trials) == tiny.DEPTH - 2
    assert all(not trial.plan.partial for trial in result.trials)


def test_too_shallow_a_model_is_refused() -> None:
    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": 3})
    problem = SearchProblem(Decoder(tiny.build(config)), (), planted.COSTS, 40, frozenset())
    with pytest.raises(InputError, match="3 layers are too few"):
        Knapsack().search(problem)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"most_draft": 0}, {"most_saved": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Knapsack(**wrong)
