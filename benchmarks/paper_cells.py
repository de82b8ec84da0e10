"""A cell of the papers' table: one strategy searched for and measured on one model and task.

Systems, by turns at each prompt:
  vanilla        this engine, nothing drafted
  own            the strategy's plan, drafted as its paper does; ConfLayers and SWIFT with all the
                 side candidates of theirs
  tuned          what `calibrate` makes of it: refined, and drafted as far as it pays
  mixed          the same, n-grams drafting beside
  transformers   eager `generate`, which the papers' speed-ups are over
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.paper_figures import published
from benchmarks.paper_search import DraftPlan, StrategyPlans, search
from benchmarks.paper_work import Amount, Work
from benchmarks.strategies import shown
from conflayers_cli.bench.hf_baselines import TransformersSystem
from conflayers_cli.bench.runner import BenchResult, measure
from conflayers_cli.bench.systems import EngineSystem, System
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.utils.statistics import Spread

ARMS = ("vanilla", "own", "tuned", "mixed", "transformers")
PLANNED = ("own", "tuned", "mixed")


def make_systems(work: Work, found: StrategyPlans, amount: Amount) -> list[System]:
    """The systems asked for that the plans allow for; vanilla is always among them."""
    decoder, ends = work.decoder, work.loaded.end_tokens
    sampling = SamplingParams(temperature=amount.temperature)
    drafters: dict[str, Proposer | None] = {
        "own": _fixed(decoder, found.own),
        "tuned": _adaptive(work, found.tuned, ngram=False),
        "mixed": _adaptive(work, found.tuned, ngram=True),
    }
    systems: list[System] = [EngineSystem("vanilla", decoder, None, sampling, ends)]
    systems += [
        EngineSystem(name, decoder, proposer, sampling, ends)
        for name, proposer in drafters.items()
        if proposer is not None and name in amount.arms
    ]
    if "transformers" in amount.arms:
        systems.append(TransformersSystem.baseline("transformers", decoder, sampling, ends))
    return systems


def _fixed(decoder: Decoder, draft_plan: DraftPlan) -> Proposer | None:
    """Drafts of the papers' kind: all the side candidates that are wanted, whatever they cost."""
    setting = draft_plan.setting
    if not draft_plan.plan or setting.max_tokens == 0:
        return None
    return SkipProposer(
        decoder, draft_plan.plan, setting.max_tokens, setting.stop_probability, setting.tree
    )


def _adaptive(work: Work, draft_plan: DraftPlan, *, ngram: bool) -> Proposer | None:
    """Drafts as far as they pay; None where that is n-grams alone and they are not asked for."""
    if not draft_plan.plan and not ngram:
        return None
    tree = draft_plan.setting.tree if draft_plan.plan else None
    return MixedProposer(work.decoder, draft_plan.plan, work.costs, ngram=ngram, tree=tree)


def run(strategy: str, work: Work, amount: Amount, profiles: Path) -> dict[str, Any]:
    """Search, measure; the cell of the results.

    Raises:
        InputError: as :func:`search`.
    """
    begin = time.perf_counter()
    found = search(strategy, work, amount, profiles)
    for name, draft_plan in (("own", found.own), ("tuned", found.tuned)):
        common.say(f"  {name}: skips {shown(draft_plan.plan) or 'nothing'}")
    result = measure(
        make_systems(work, found, amount),
        work.figures,
        work.decoder,
        SamplingParams(temperature=amount.temperature),
        runs=amount.runs,
        warmup=amount.warmup,
        on_progress=common.show_progress,
    )
    return {
        "model": work.name,
        "task": work.task,
        "strategy": strategy,
        "dtype": str(work.loaded.dtype).removeprefix("torch."),
        "prompts": {
            "search": [prompt.id for prompt in work.search],
            "figures": [prompt.id for prompt in work.figures],
        },
        "search": dict(found.search),
        "plans": {
            "own": found.own.as_json("as the paper does"),
            "tuned": found.tuned.as_json("as far as it pays"),
        },
        "arms": {name: arm_figures(result, name) for name in result.systems},
        "identical": common.matches(result),
        "published": [each.as_json() for each in published(strategy, work.name, work.task)],
        "seconds": time.perf_counter() - begin,
    }


def arm_figures(result: BenchResult, arm: str) -> dict[str, Any]:
    """What an arm came to, over `generate`, too, where that was measured."""
    figures = common.figures(result, arm)
    if "transformers" in result.systems:
        over = Spread.of(common.ratios(result, arm, "transformers"))
        figures["over_transformers"] = over.model_dump()
    return figures
