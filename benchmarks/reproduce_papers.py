"""The papers' settings, every strategy on each: the published figures beside the measured ones.

For a large GPU and the hub (or a folder with the data, see --data-folder). A cell is a model, a
task and a strategy: the strategy searches on prompts of its own, and what it found decodes others,
by turns with plain decoding and transformers' eager `generate` (see `paper_cells` for the arms,
`paper_tasks` for the prompts, `paper_figures` for what is published). Results are saved after each
cell; --resume goes on with them.

    python -m benchmarks.reproduce_papers --output papers.json
    python -m benchmarks.reproduce_papers --models llama-2-13b --tasks cnndm gsm8k \\
        --strategies published conflayers swift --budget 14400 --output papers.json --resume

Without either, to see that all of it runs: the built-in model, Spec-Bench's prompts by category.

    python -m benchmarks.reproduce_papers --local --data spec_bench.jsonl --quick
"""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, paper_cells, paper_tasks
from benchmarks.gpu_bench import first_line
from benchmarks.gpu_timing import Budget, OutOfTimeError, free
from benchmarks.paper_cells import ARMS
from benchmarks.paper_results import Results, Setting, table
from benchmarks.paper_search import PUBLISHED, published_file
from benchmarks.paper_tasks import TASKS, TaskPrompts
from benchmarks.paper_work import Amount, Work
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.device import find_device
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.profile.build_proposer import costs_for
from conflayers_cli.search.strategies.registry import STRATEGIES
from conflayers_cli.utils.files import check_target

MODELS: Mapping[str, str] = {
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "codellama-13b": "codellama/CodeLlama-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
}
"""By the name used here. Any other name, folder or file that the tool takes may be given, too."""
ASKED_FOR = frozenset({"llama-2-70b", "llama-3-70b"})
"""Run only where they are named: they take several cards (``--device-map auto``)."""
SHOTS: Mapping[str, int] = {"cnndm": 1, "gsm8k": 5, "wmt14": 0, "alpaca": 0}
TOKENS, TEMPERATURE = 512, 0.0
SETTINGS = tuple(
    Setting(model, task, shots, TOKENS, TEMPERATURE)
    for model in MODELS
    for task, shots in SHOTS.items()
)
LOCAL = "smollm2-deep"
QUICK: Mapping[str, Any] = {
    "prompts": 2,
    "search_prompts": 2,
    "max_new_tokens": 24,
    "search_tokens": 24,
    "search_seconds": 10.0,
    "warmup": 0,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    own = common.plain_parser(__doc__)
    add = own.add_argument
    own_help = f"of {', '.join(MODELS)} (all but {', '.join(sorted(ASKED_FOR))}), or any other"
    add("--models", nargs="+", metavar="MODEL", help=own_help)
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    every = [*STRATEGIES, PUBLISHED]
    add("--strategies", nargs="+", choices=every, default=every)
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--max-new-tokens", type=int, help=f"else as in the papers: {TOKENS}")
    add("--temperature", type=float, help=f"else as in the papers: {TEMPERATURE:g}")
    add("--prompts", type=int, default=20, help="measured per task (20)")
    add("--search-prompts", type=int, default=8, help="searched on (8)")
    add("--search-tokens", type=int, default=128, help="decoded of each of them (128)")
    add("--search-seconds", type=float, default=600.0, help="for one search (600)")
    add("--target-speedup", type=float, default=1.5, help="of unified (1.5)")
    add("--runs", type=int, default=1, help="of each prompt in each arm (1)")
    add("--warmup", type=int, default=1, help="prompts decoded by each arm before (1)")
    add("--seed", type=int, default=0, help="of the rows that are drawn")
    add(
        "--data-folder",
        type=Path,
        default=Path("out/papers"),
        help="where prompts are kept, and found by a run without a network (out/papers)",
    )
    add("--local", action="store_true", help=f"{LOCAL} with prompts from --data, by category")
    add("--data", type=Path, help="Spec-Bench's prompts (JSONL), with --local")
    add("--profiles", type=Path, default=common.PROFILES, help="the published sets (profiles)")
    add("--device", default="auto")
    add("--device-map", choices=["auto"], help="whole layers on all GPUs there are")
    add("--dtype", default="auto")
    add("--budget", type=float, metavar="SECONDS", help="end then; the running cell is given up")
    add("--output", type=Path, help="results as JSON, written after each cell")
    add("--resume", action="store_true", help="go on with the cells that --output lacks")
    add("--quick", action="store_true", help="next to nothing, to see that it runs")
    return own


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings, checked.

    Raises:
        InputError: they contradict each other.
    """
    options = common.parse_quick(parser(), arguments, QUICK)
    usual = [LOCAL] if options.local else [name for name in MODELS if name not in ASKED_FOR]
    options.models = options.models or usual
    if options.local and options.data is None:
        raise InputError("--local needs prompts with categories: --data FILE, Spec-Bench's for one")
    if options.data is not None and not options.local:
        raise InputError("--data is for --local; the papers' data are kept in --data-folder")
    if options.resume and options.output is None:
        raise InputError("--resume goes on with results: say which by --output FILE")
    for name in ("prompts", "search_prompts", "search_tokens", "runs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: 1 or more")
    options.device = str(find_device(options.device))
    if options.output:
        check_target(options.output)
    return options


def settings_for(options: argparse.Namespace) -> list[Setting]:
    """The rows asked for; a model that is none of the papers' has the tasks' settings."""
    known = {(setting.model, setting.task): setting for setting in SETTINGS}
    wanted = {
        "shots": 0 if options.local else None,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
    }
    changes = {key: value for key, value in wanted.items() if value is not None}
    return [
        replace(
            known.get((model, task)) or Setting(model, task, SHOTS[task], TOKENS, TEMPERATURE),
            **changes,
        )
        for model in dict.fromkeys(options.models)
        for task in dict.fromkeys(options.tasks)
    ]


def prompts_for(settings: Iterable[Setting], options: argparse.Namespace) -> dict[str, TaskPrompts]:
    """The prompts of all tasks, before any model is loaded."""
    found: dict[str, TaskPrompts] = {}
    for setting in settings:
        if setting.task in found:
            continue
        if options.local:
            found[setting.task] = paper_tasks.local_prompts(setting.task, options.data)
        else:
            where = options.seed, options.data_folder
            found[setting.task] = paper_tasks.paper_prompts(setting.task, setting.shots, *where)
    return found


def choose_amount(setting: Setting, options: argparse.Namespace) -> Amount:
    """How much is done for a cell of a setting."""
    return Amount(
        prompts=options.prompts,
        search_prompts=options.search_prompts,
        max_new_tokens=setting.max_new_tokens,
        search_tokens=options.search_tokens,
        search_seconds=options.search_seconds,
        target_speedup=options.target_speedup,
        temperature=setting.temperature,
        runs=options.runs,
        warmup=options.warmup,
        arms=tuple(options.arms),
    )


def run_model(
    model: str,
    settings: Sequence[Setting],
    prompts: Mapping[str, TaskPrompts],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """All cells of a model that are not done; one that fails leaves its reason, and the next runs.

    Where nobody published a set there is no cell for it.
    """
    wanted = [
        (setting, strategy)
        for setting in settings
        for strategy in dict.fromkeys(options.strategies)
        if not results.has(setting, strategy)
        and (
            strategy != PUBLISHED or published_file(model, setting.task, options.profiles).is_file()
        )
    ]
    if not wanted:
        return
    common.say(f"loading {model}")
    device = "auto" if options.device_map else options.device
    loading = LoadOptions(device=device, dtype=options.dtype, device_map=options.device_map)
    loaded, decoder = open_model(MODELS.get(model, model), loading)
    costs = costs_for(loaded, decoder)
    for setting, strategy in wanted:
        amount = choose_amount(setting, options)
        common.say(f"{model}, {setting.task}, {strategy}")
        try:
            source = prompts[setting.task]
            work = Work.of(model, setting.task, loaded, decoder, costs, source, amount)
            cell = paper_cells.run(strategy, work, amount, options.profiles)
        except Exception as error:  # noqa: BLE001 - the others are to be measured all the same
            cell = failed(setting, strategy, error)
        results.add(setting, cell)


def failed(setting: Setting, strategy: str, error: Exception) -> dict[str, Any]:
    """The cell of what failed, with the traceback where the error is no expected one."""
    common.say(f"  failed: {first_line(error)}")
    message = str(error) if isinstance(error, ConfLayersError) else traceback.format_exc()
    return {"model": setting.model, "task": setting.task, "strategy": strategy, "failed": message}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cells that there are not yet, save each, print all; 1 where one failed."""
    try:
        options = parse_options(arguments)
        settings, results = settings_for(options), Results(options)
        prompts = prompts_for(settings, options)
    except ConfLayersError as error:
        common.say(f"error: {error}")
        return error.exit_code
    code = measure_all(options, settings, prompts, results)
    table(results.cells)
    return code or int(any("failed" in cell for cell in results.cells))


def measure_all(
    options: argparse.Namespace,
    settings: Sequence[Setting],
    prompts: Mapping[str, TaskPrompts],
    results: Results,
) -> int:
    """All models, one at a time; the exit code of what ended it early, else 0."""
    budget = Budget(options.budget) if options.budget else None
    for model in dict.fromkeys(setting.model for setting in settings):
        own = [setting for setting in settings if setting.model == model]
        try:
            if budget is None:
                run_model(model, own, prompts, options, results)
            else:
                with budget.enforced():
                    run_model(model, own, prompts, options, results)
        except OutOfTimeError:
            common.say("the time is used up (--budget); --resume goes on")
            return 0
        except KeyboardInterrupt:
            common.say("interrupted; --resume goes on")
            return 130
        except ConfLayersError as error:  # the model can't be had; the others may be
            common.say(f"error: {model}: {error}")
            for setting in own:
                results.add(setting, failed(setting, "all", error))
        gc.collect()
        free(torch.device(options.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
