"""Every strategy on the same work: what it finds, what that is worth, and what the search costs.

For each model, every strategy searches on one half of the prompts, on its own, with its plan as it
is and refined. All plans then decode the other half, interleaved with vanilla, so that a busy
moment of the machine hits all alike. On smollm2-deep the layers that can be left out are known.

    python benchmarks/strategies.py --data spec_bench.jsonl --output strategies.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prompts import Prompt, as_messages, read_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tokenization import encode
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import search_and_refine
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.problem import SearchProblem, Strategy
from conflayers_cli.search.strategies.conflayers import ConfLayers
from conflayers_cli.search.strategies.greedy import Greedy
from conflayers_cli.search.strategies.knapsack import Knapsack
from conflayers_cli.search.strategies.swift import Swift
from conflayers_cli.search.strategies.unified import Unified
from conflayers_cli.search.validate import make_proposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

CATEGORIES = (
    "translation",
    "summarization",
    "qa",
    "math_reasoning",
    "rag",
    "writing",
    "reasoning",
    "coding",
)
REFINE = 500


@dataclass(frozen=True)
class Plan:
    """One row of the table: a plan and the search behind it."""

    strategy: str
    refined: bool
    plan: SkipPlan
    setting: DraftParams
    seconds: float
    full_passes: int
    draft_passes: int


def halves(data: Path, pairs: int) -> tuple[list[Prompt], list[Prompt]]:
    """(for the search, for the figures): prompts of every category, in turns."""
    prompts = read_prompts(data)
    search, figures = [], []
    for category in CATEGORIES:
        own = [prompt for prompt in prompts if prompt.category == category][: 2 * pairs]
        search += own[0::2]
        figures += own[1::2]
    return search, figures


def encode_all(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The prompts as the model gets them."""
    return [tuple(encode(loaded, as_messages(prompt, None), None)) for prompt in prompts]


def search(strategy: Strategy, problem: SearchProblem) -> list[Plan]:
    """The strategy's own plan and the refined one."""

    def say(message: str) -> None:
        print(f"  {strategy.name}: {message} …", flush=True)

    decoder = problem.decoder
    passes, begin = (decoder.full_passes, decoder.draft_passes), time.perf_counter()
    own: list[Plan] = []

    def note_own(message: str) -> None:
        """Refining begins: what was spent until then is the strategy's own."""
        own.append(
            Plan(
                strategy=strategy.name,
                refined=False,
                plan=SkipPlan(),
                setting=PAPER,
                seconds=time.perf_counter() - begin,
                full_passes=decoder.full_passes - passes[0],
                draft_passes=decoder.draft_passes - passes[1],
            )
        )
        say(message)

    refine = 0 if strategy.name == "unified" else REFINE  # its rule is all there is to it
    found = search_and_refine(
        strategy, problem, refine=refine, on_stage=note_own, on_better=lambda score, judged: None
    )
    result = found.result
    if not refine:
        note_own("done")
    first = replace(own[0], plan=result.plan, setting=result.setting or strategy.setting)
    if not refine:
        return [first]
    refined = Plan(
        strategy=strategy.name,
        refined=True,
        plan=found.plan,
        setting=found.setting,
        seconds=found.seconds,
        full_passes=found.full_passes,
        draft_passes=found.draft_passes,
    )
    for plan in (first, refined):
        print(
            f"    {'refined' if plan.refined else 'own':8}{plan.seconds:.0f} s  {shown(plan.plan)}",
            flush=True,
        )
    return [first, refined]


def search_auto(strategies: Sequence[Strategy], problem: SearchProblem, budget: float) -> Plan:
    """What auto keeps."""
    decoder = problem.decoder
    passes = decoder.full_passes, decoder.draft_passes
    done = auto(
        strategies,
        problem,
        (),
        budget=budget,
        refine=REFINE,
        on_stage=lambda message: print(f"  auto: {message}", flush=True),
        on_better=lambda score, judged: None,
    )
    candidate = done.candidate
    return Plan(
        strategy="auto",
        refined=True,
        plan=candidate.plan,
        setting=candidate.setting,
        seconds=done.seconds,
        full_passes=decoder.full_passes - passes[0],
        draft_passes=decoder.draft_passes - passes[1],
    )


def shown(plan: SkipPlan) -> str:
    """The layers of a plan, short."""
    text = " ".join(map(str, plan.layers))
    single = len(plan) - 2 * len(plan.layers)
    return f"{text} and {single} single sub-layers" if single else text


def decode(
    decoder: Decoder, prompt: tuple[int, ...], plan: Plan | None, problem: SearchProblem
) -> list[Step]:
    """The steps of one prompt behind the prefill."""
    proposer = make_proposer(problem, plan.plan, plan.setting) if plan else None
    generation = Generation(
        decoder,
        GenerationRequest(prompt, problem.max_new_tokens),
        proposer=proposer,
        end_tokens=problem.end_tokens,
    )
    return list(generation)[1:]


def measure(
    plans: Sequence[Plan], prompts: Sequence[tuple[int, ...]], problem: SearchProblem
) -> list[dict[str, Any]]:
    """Decode prompts with every plan and vanilla, in turns; the figures of each plan."""
    decoder = problem.decoder
    distinct = list(dict.fromkeys((plan.plan, plan.setting) for plan in plans))
    by_key = {key: next(p for p in plans if (p.plan, p.setting) == key) for key in distinct}
    arms: list[tuple[SkipPlan, DraftParams] | None] = [None, *distinct]
    steps: dict[Any, list[Step]] = {arm: [] for arm in arms}
    ratios: dict[Any, list[float]] = {arm: [] for arm in arms}
    for turn, prompt in enumerate(prompts):
        print(f"  decoding prompt {turn + 1} of {len(prompts)}", flush=True)
        first, speed = turn % len(arms), {}
        for arm in [*arms[first:], *arms[:first]]:
            done = decode(decoder, prompt, by_key[arm] if arm else None, problem)
            steps[arm] += done
            speed[arm] = sum(len(s.tokens) for s in done) / sum(s.seconds for s in done)
        for arm in arms:
            ratios[arm].append(speed[arm] / speed[None])
    return [figures(plan, ratios, steps, decoder) for plan in plans]


def figures(plan: Plan, ratios: Any, steps: Any, decoder: Decoder) -> dict[str, Any]:
    """One row."""
    planted = set(getattr(decoder.config, "conflayers_planted", None) or ())
    key = (plan.plan, plan.setting)
    own, drafted = steps[key], sum(s.drafted for s in steps[key])
    layers = set(plan.plan.layers)
    return {
        "strategy": plan.strategy,
        "refined": plan.refined,
        "attention": plan.plan.attention,
        "mlp": plan.plan.mlp,
        "draft": {
            "max_tokens": plan.setting.max_tokens,
            "stop_probability": plan.setting.stop_probability,
        },
        "layers": len(layers),
        "single_sub_layers": len(plan.plan) - 2 * len(layers),
        "planted_found": len(layers & planted) if planted else None,
        "others": len(layers - planted) if planted else None,
        "acceptance_rate": sum(s.accepted for s in own) / drafted if drafted else None,
        "tokens_per_step": sum(len(s.tokens) for s in own) / len(own),
        "speedup": statistics.median(ratios[key]),
        "speedup_by_prompt": ratios[key],
        "search_seconds": plan.seconds,
        "full_passes": plan.full_passes,
        "draft_passes": plan.draft_passes,
    }


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All strategies on one model."""
    print(name, flush=True)
    loaded = load_model(name)
    decoder = Decoder(loaded.model)
    search_half, figures_half = halves(options.data, options.pairs)
    prompts = tuple(encode_all(loaded, search_half))
    costs = measure_costs(decoder)

    def problem() -> SearchProblem:
        """Made anew for every strategy, so that none profits from another's texts."""
        return SearchProblem(decoder, prompts, costs, options.max_new_tokens, loaded.end_tokens)

    strategies: list[Strategy] = [ConfLayers(patience=8), Knapsack(), Knapsack.clasp(), Greedy()]
    strategies += [Swift(), Unified(1.5), Unified(2.0)]
    wanted = options.strategies
    plans = [
        plan
        for strategy in strategies
        if not wanted or strategy.name in wanted
        for plan in search(strategy, problem())
    ]
    if not wanted or "auto" in wanted:
        plans.append(search_auto([Unified(1.5), *strategies[:5]], problem(), options.budget))
    rows = measure(plans, encode_all(loaded, figures_half), problem())
    for row in rows:
        print(line(row), flush=True)
    return {
        "model": name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "environment": describe_environment(loaded.device),
        "prompts": {
            "search": [prompt.id for prompt in search_half],
            "figures": [prompt.id for prompt in figures_half],
        },
        "max_new_tokens": options.max_new_tokens,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    accepted = row["acceptance_rate"]
    found = f"{row['planted_found']}+{row['others']}" if row["others"] is not None else "–"
    return (
        f"{row['strategy']:11}{'refined' if row['refined'] else 'own':9}"
        f"{row['layers']:3} +{row['single_sub_layers']:2}  {found:6} "
        f"{'–' if accepted is None else format(accepted, '.1%'):>7} "
        f"{row['tokens_per_step']:5.2f}  {row['speedup']:5.2f}× "
        f"({min(row['speedup_by_prompt']):.2f}–{max(row['speedup_by_prompt']):.2f}) "
        f"{row['search_seconds']:5.0f} s  {row['full_passes']:5} {row['draft_passes']:5}"
    )


def main() -> None:
    """Search, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Spec-Bench's prompts (JSONL)")
    parser.add_argument("--models", nargs="+", default=["smollm2-deep", "smollm2"])
    parser.add_argument("--strategies", nargs="+", help="only these; auto is one")
    parser.add_argument("--pairs", type=int, default=1, help="prompts per category and half")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--budget", type=float, default=600.0, help="of auto, in seconds")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    results = []
    for name in options.models:
        results.append(run(name, options))
        if options.output:
            write_json(options.output, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
