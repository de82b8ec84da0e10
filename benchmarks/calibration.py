"""What calibrating takes and what it is worth: seconds, passes, memory, plan, prediction.

Every model is loaded once and calibrated with each strategy, seed, budget and number of judged
prompts as `conflayers calibrate` would. With ``--data`` it is calibrated on prompts of that file,
and each plan then decodes others of it, the categories in turns, by turns with vanilla: that is the
measured speed-up of the row, in place of that of the few prompts which calibrate holds out.
``overall`` is that of all of them together, which is what is predicted, ``measured`` the median
over them. With ``--depths``, random Llamas of a width whose odd layers are nearly the identity are
searched instead, to see how seconds and passes grow.

    python -m benchmarks.calibration --models smollm2 smollm2-deep --seeds 0 1 2 --output found.json
    python -m benchmarks.calibration --strategies local swift --data spec_bench.jsonl
    python -m benchmarks.calibration --budgets 15 30 60 120 300
    python -m benchmarks.calibration --judged 2 4 6 12 24
    python -m benchmarks.calibration --depths 30 60 120 --hidden 576
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks import common
from conflayers_cli.engine.cost_cache import get_costs
from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.prompts import Prompt, builtin_prompts
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.search.calibrate import Candidate, search_and_refine
from conflayers_cli.search.job import CalibrationJob
from conflayers_cli.search.journal import open_journal
from conflayers_cli.search.options import LOCAL, UNIFIED, SearchOptions
from conflayers_cli.search.problem import SearchProblem
from conflayers_cli.search.strategies.local import Local
from conflayers_cli.search.strategies.registry import STRATEGIES, make_strategies
from conflayers_cli.search.validate import check_by_decoding
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.memory import PeakMemory

PROMPT_TOKENS = 32
PLANTED_SCALE = 0.02
TARGET = 1.5
"""Target speed-up of the unified rule."""


def ignore(*args: Any) -> None:
    """What is reported on the way is not shown."""


def plan_row(candidate: Candidate, planted: set[int]) -> dict[str, Any]:
    """What was found, beside the planted layers."""
    attention, mlp = set(candidate.plan.attention), set(candidate.plan.mlp)
    return {
        "skipped_whole": len(attention & mlp),
        "planted_sub_layers": f"{len(attention & planted) + len(mlp & planted)}"
        f" of {2 * len(planted)}",
        "planted_touched": len((attention | mlp) & planted),
        "other_layers": sorted((attention | mlp) - planted),
        "weights": candidate.plan.weights,
        "expected": candidate.expected.speedup if candidate.expected else None,
        "judged": candidate.judged,
        "full_passes": candidate.full_passes,
        "draft_passes": candidate.draft_passes,
    }


def calibrate_model(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each strategy, seed, budget and number of judged prompts."""
    prompts = builtin_prompts()
    if options.data is not None:
        prompts = data_prompts(options)[options.prompts :][: len(prompts)]
    prompt_options = PromptOptions(max_new_tokens=options.max_new_tokens)
    job = CalibrationJob.open(name, LoadOptions(), prompts, prompt_options, SearchOptions())
    planted = set(getattr(job.decoder.config, "conflayers_planted", ()))
    unseen = unseen_problem(job, options)
    for strategy, seed, budget, judged in itertools.product(
        options.strategies, options.seeds, options.budgets or [None], options.judged or [None]
    ):
        target = TARGET if strategy == UNIFIED else None
        wanted = SearchOptions(
            strategy=strategy,
            target_speedup=target,
            refine=not options.no_refine,
            seed=seed,
            budget=budget,
            judged_prompts=judged,
        )
        own = replace(job, options=wanted, strategies=make_strategies(wanted))
        row: dict[str, Any] = {"model": name, "strategy": strategy, "seed": seed}
        row |= {"budget": budget, "judged_prompts": judged}
        yield row | calibrate_once(own, planted, unseen)


def calibrate_once(
    job: CalibrationJob, planted: set[int], unseen: SearchProblem | None
) -> dict[str, Any]:
    """What one calibration takes and finds; ``unseen``: the prompts that its plan decodes."""
    memory = PeakMemory(job.decoder.device)
    memory.begin()
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_journal(Path(folder) / "p.yaml", None) as journal,
    ):
        journal.begin(job.header())
        found = job.run(journal, on_stage=ignore, on_trial=ignore, on_better=ignore)
        journal.remove()
    seconds, check = time.perf_counter() - begin, found.check
    peak = (memory.peak() or 0) >> 20
    if unseen is not None:
        candidate = found.candidate
        # With a memo of its own: the same plan is measured again for every row.
        (check,) = check_by_decoding(
            replace(unseen, shared_memo=None),
            [(candidate.plan, candidate.setting)],
            unseen.prompts,
            adaptive_draft_length=candidate.refined,
        )
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "measured": check.speedup if check else None,
        "overall": check.overall if check else None,
        "prompts": check.prompts if check else 0,
        "acceptance": check.acceptance_rate if check else None,
        **plan_row(found.candidate, planted),
    }


def unseen_problem(job: CalibrationJob, options: argparse.Namespace) -> SearchProblem | None:
    """The prompts of ``--data`` with the model's costs; None: there is no such file."""
    if options.data is None:
        return None
    prompts = data_prompts(options)[: options.prompts]
    encoded = encode_prompts(
        job.loaded, prompts, PromptOptions(max_new_tokens=options.max_new_tokens)
    )
    return SearchProblem(
        job.decoder,
        tuple(tuple(request.prompt) for request in encoded),
        get_costs(job.loaded, job.decoder, int4=True).table.by_batch[1],
        options.max_new_tokens,
        job.loaded.end_tokens,
    )


def data_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts of ``--data``, the categories in turns."""
    return common.interleave(common.prompts_by_category(options))


def errors_of_prediction(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How far each row's prediction is from what was measured, as a share of that."""
    pairs = ((row.get("expected"), row.get("overall")) for row in rows)
    return [abs(expected / measured - 1) for expected, measured in pairs if expected and measured]


def search_depth(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row for one random model."""
    torch.manual_seed(0)
    hidden = options.hidden
    heads = hidden // 64
    shared = max(n for n in range(1, heads // 3 + 2) if heads % n == 0)
    config = hf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=options.intermediate or 8 * hidden // 3 // 32 * 32,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    planted = set(range(1, depth - 1, 2))
    for i in planted:
        layer = model.model.layers[i]
        layer.self_attn.o_proj.weight.data *= PLANTED_SCALE
        layer.mlp.down_proj.weight.data *= PLANTED_SCALE
    decoder, draw = Decoder(model), random.Random(0)
    prompts = tuple(
        tuple(draw.randrange(options.vocabulary) for _ in range(PROMPT_TOKENS)) for _ in range(8)
    )
    memory = PeakMemory(decoder.device)
    memory.begin()
    begin = time.perf_counter()
    problem = SearchProblem(decoder, prompts, measure_costs(decoder), 128, frozenset())
    found = search_and_refine(Local(), problem, refine=500, on_stage=ignore, on_better=ignore)
    return {
        "depth": depth,
        "hidden": hidden,
        "seconds": time.perf_counter() - begin,
        "peak_mib": (memory.peak() or 0) >> 20,
        **plan_row(found, planted),
    }


def show(row: dict[str, Any]) -> None:
    """One row as a line."""
    values = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print("; ".join(values), flush=True)


def main() -> None:
    """Run and write."""
    parser = common.plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(common.MODELS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[LOCAL])
    parser.add_argument("--no-refine", action="store_true", help="the strategies' own plans")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budgets", nargs="+", type=float, help="seconds; else no bound")
    parser.add_argument("--judged", nargs="+", type=int, help="prompts; else as many as it takes")
    parser.add_argument("--data", type=Path, help="prompts with categories, to measure plans on")
    parser.add_argument("--categories", nargs="+", help="of those prompts; else the large ones")
    parser.add_argument("--per-category", type=int, default=10)
    parser.add_argument(
        "--prompts",
        type=int,
        default=20,
        help="of the file that are measured; of the next plans come",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--depths", nargs="+", type=int, help="of random models, in place of others"
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, help="size of the random models' MLPs")
    parser.add_argument("--vocabulary", type=int, default=49152)
    common.add_output(parser)
    options = parser.parse_args()
    if options.quick:
        options.depths, options.hidden, options.vocabulary = [6], 64, 256
    found: Iterable[dict[str, Any]]
    if options.depths:
        found = (search_depth(depth, options) for depth in options.depths)
    else:
        found = itertools.chain.from_iterable(
            calibrate_model(name, options) for name in options.models
        )
    environment, rows = describe_environment(torch.device("cpu")), []
    for row in found:
        show(row)
        rows.append(row)
        if options.output:
            write_json(options.output, {"environment": environment, "rows": rows})
    if errors := errors_of_prediction(rows):
        print(f"predictions are off by {statistics.median(errors):.1%} in the median")


if __name__ == "__main__":
    main()
