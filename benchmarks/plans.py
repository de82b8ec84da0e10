"""Plans of several profiles beside one another: which decodes fastest?

Each prompt is decoded with each profile's plan alone (no n-grams), by turns, in many short rounds;
who begins changes from turn to turn. A prompt counts with the least of its times, so that what else
the machine does hardly counts; all must give the same tokens. Shown are the ratios to the first
profile, the median over the prompts with its 95 % bootstrap interval.

    python -m benchmarks.plans before.yaml found.yaml --model smollm2-deep --data spec_bench.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.calibration import unseen_problem
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.generation.prompts import builtin_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.job import CalibrationJob
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.options import SearchOptions
from conflayers_cli.search.problem import SearchProblem
from conflayers_cli.search.validate import make_proposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.statistics import Interval

Plans = Mapping[str, tuple[SkipPlan, DraftParams]]


def read_plans(files: Sequence[Path]) -> Plans:
    """Each profile's plan and draft setting, by the file's name."""
    found = {}
    for file in files:
        profile = Profile.load(file)
        draft = profile.draft
        setting = DraftParams(draft.max_tokens, draft.stop_probability)
        found[file.stem] = (profile.plan, setting)
    if len(found) < 2:
        raise SystemExit("two profiles of different names are needed")
    return found


def decode_by_turns(
    problem: SearchProblem, plans: Plans, prompt: tuple[int, ...], rounds: int, first: int
) -> dict[str, list[float]]:
    """Seconds behind the prefill that each plan took in each round.

    Raises:
        SystemExit: the texts differ.
    """
    times: dict[str, list[float]] = {name: [] for name in plans}
    texts, names = set(), list(plans)
    for turn in range(first, first + rounds):
        at = turn % len(names)
        for name in (*names[at:], *names[:at]):
            proposer = make_proposer(problem, *plans[name], adaptive_draft_length=True)
            generation = Generation(
                problem.decoder,
                GenerationRequest(prompt, problem.max_new_tokens),
                end_tokens=problem.end_tokens,
                proposer=proposer,
            )
            generation.step()
            seconds = 0.0
            while generation.finish is None:
                seconds += generation.step().seconds
            times[name].append(seconds)
            texts.add(tuple(generation.output))
    if len(texts) > 1:
        raise SystemExit("drafts changed a text")
    return times


def compare_plans(
    problem: SearchProblem, plans: Plans, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for every prompt whose answer is long enough to be timed."""
    rows = []
    for number, prompt in enumerate(problem.prompts):
        times = decode_by_turns(problem, plans, prompt, options.runs, number)
        least = {name: min(own) for name, own in times.items()}
        if min(least.values()) <= 0:
            continue  # ended with its first token
        base = least[next(iter(plans))]
        speed = {name: base / one for name, one in least.items()}
        rows.append({"seconds": times, "speed": speed})
        line = ", ".join(f"{name} {ratio:.3f}" for name, ratio in speed.items())
        print(f"prompt {number}: {line}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.plain_parser(__doc__)
    parser.add_argument("profiles", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2-deep")
    parser.add_argument("--data", type=Path, required=True, help="prompts with categories")
    parser.add_argument("--categories", nargs="+", help="of those prompts; else the large ones")
    parser.add_argument("--per-category", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=12, help="of the file, at the most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="of every prompt with every plan")
    common.add_output(parser)
    options = common.parse_quick(parser, arguments, {"prompts": 1, "runs": 1})
    plans = read_plans(options.profiles)
    job = CalibrationJob.open(
        *(options.model, LoadOptions(), builtin_prompts()[:1]),
        *(PromptOptions(max_new_tokens=options.max_new_tokens), SearchOptions()),
    )
    problem = unseen_problem(job, options)
    if problem is None:
        return 2
    rows = compare_plans(problem, plans, options)
    found = {name: Interval.of([row["speed"][name] for row in rows]) for name in plans}
    for name, each in found.items():
        interval = "" if each.low is None else f" ({each.low:.3f}–{each.high:.3f})"
        print(f"{name}: {each.median:.3f}{interval}")
    if options.output:
        write_json(
            options.output,
            {
                "benchmark": "plans",
                "settings": common.describe_settings(options),
                "environment": describe_environment(job.loaded.device),
                "speed": {name: each.model_dump() for name, each in found.items()},
                "rows": rows,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
