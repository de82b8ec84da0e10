"""``conflayers calibrate``: find the layers a model can leave out while drafting."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import calibrate_options as search_options
from conflayers_cli.cli import options
from conflayers_cli.cli.calibrate_job import CalibrationJob, JobOptions, open_job
from conflayers_cli.cli.calibrate_journal import header_of, open_journal
from conflayers_cli.cli.calibrate_options import DraftWeights
from conflayers_cli.cli.calibrate_profile import profile_of, tensors_path
from conflayers_cli.cli.common import read_prompt_file
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.strategies import AUTO, UNIFIED, check_options
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.engine.cost_model import Costs
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.calibrate import Calibration
    from conflayers_cli.search.journal import Journal
    from conflayers_cli.search.memo import Memo

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-deep"

HELP = """Find the layers a model can leave out while it drafts, and write them to a profile.

A strategy searches for a set of layers, losslessly decoding your prompts. The
set is improved layer by layer under predicted tokens per second on this
device, and checked by real decoding on prompts the search has not seen. Where
no set beats plain decoding it says so, and the profile is empty. Ctrl-C ends
the search with the best set so far and writes it. Whatever ended a search,
kill -9 or a power cut, --resume goes on from the last set looked at.

\b
  conflayers calibrate --model smollm2-deep --data prompts.jsonl -o summ.yaml
  conflayers calibrate --model ./my-model --data prompts.jsonl --strategy auto
  conflayers calibrate -m ./my-model --strategy unified --target-speedup 1.5
"""


@with_groups
def calibrate(
    *,
    model: options.Model = None,
    data: options.Data = None,
    output: search_options.Output = None,
    resume: search_options.Resume = None,
    strategy: search_options.StrategyName = "conflayers",
    search: search_options.SearchFlags,
    refine: search_options.Refine = None,
    refine_limit: search_options.RefineLimit = 500,
    tree: search_options.Tree = True,
    draft_weights: search_options.DraftWeightsOption = DraftWeights.AUTO,
    max_prompts: options.MaxPrompts = None,
    prompt_options: search_options.PromptFlags = PromptOptions(max_new_tokens=128),
    seed: search_options.Seed = 0,
    load: search_options.LoadFlags,
    as_json: options.Json = False,
) -> None:
    check_options(strategy, search)
    refining = refine_limit if (strategy != UNIFIED if refine is None else refine) else 0
    if draft_weights is DraftWeights.INT4 and not refining:
        raise InputError("--draft-weights int4 is for refinement to use: not with --no-refine")
    if model is None:
        model = DEFAULT_MODEL
        logger.info(f"no --model given: calibrating {model}")
    target = output or Path(f"{_short_name(model)}.yaml")
    _check_profile(target)
    with open_journal(target, resume) as journal:
        if journal.writes != tensors_path(target).name:
            _check_tensors(target)
        # Unified's rule needs no text; with --data its plan is measured.
        by_rule = strategy == UNIFIED and data is None
        job = open_job(
            model,
            load,
            [] if by_rule else read_prompt_file(data, max_prompts),
            prompt_options,
            JobOptions(
                strategy=strategy,
                search=search,
                refine=refining,
                tree=tree,
                draft_weights=draft_weights,
                seed=seed,
            ),
        )
        journal.begin(header_of(job))
        _conclude(job, _searched(job, journal), target, journal, as_json)


def _searched(job: CalibrationJob, journal: Journal) -> Calibration:
    """Search, and have everything measured kept in the journal."""
    from conflayers_cli.search.memo import Memo

    try:
        return _run(job, Memo(job.decoder, journal.entries, journal.append))
    except InputError:  # a model or prompts that can't be searched: that stays so
        journal.remove()
        raise


def _conclude(
    job: CalibrationJob, done: Calibration, target: Path, journal: Journal, as_json: bool
) -> None:
    """Write what was found, and say it."""

    tensors = _tensors_of(done, job.decoder.depth)
    profile = profile_of(job, done, target, tensors)
    kept = f"--resume goes on with {journal.path}"
    try:
        _write(profile, tensors, target, journal)
    except ConfLayersError:
        _tell(profile, done, None, as_json)  # what took so long must not be lost with the file
        if journal.goes_on:
            logger.warning(f"note: the search is kept, too: {kept}")
        raise
    _tell(profile, done, target, as_json)
    if done.interrupted:
        if journal.goes_on:
            logger.warning(f"note: the search is not over: {kept}")
        raise KeyboardInterrupt
    journal.remove()


def _short_name(model: str) -> str:
    """What a profile is called by default: the last part of the model's name."""
    name = Path(model).resolve().name.removesuffix(".gguf")
    return name.lstrip(".") or "profile"


def _check_profile(profile: Path) -> None:
    """Refuse, before any work, names that the profile can't be written to."""
    from conflayers_cli.profile.schema import check_replaceable

    if profile.suffix == ".safetensors" or profile.name.startswith("."):
        raise InputError(f"--output {profile}: a name such as summ.yaml is needed")
    check_replaceable(profile)


def _check_tensors(profile: Path) -> None:
    """The same of its tensors: only those that an older profile names are replaced."""
    from conflayers_cli.profile.schema import check_replaceable

    check_replaceable(profile, tensors_path(profile))


def _run(job: CalibrationJob, memo: Memo) -> Calibration:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.search.auto import auto
    from conflayers_cli.search.calibrate import calibrate as run_calibration
    from conflayers_cli.search.calibrate import split_prompts
    from conflayers_cli.search.problem import Task

    options = job.options
    used, held_out = split_prompts(
        [tuple(request.prompt) for request in job.requests], options.seed
    )
    with Display(job.decoder.depth) as display:
        task = Task(
            decoder=job.decoder,
            prompts=used,
            costs=_costs(job, display, memo),
            max_new_tokens=job.max_new_tokens,
            end_tokens=job.loaded.end_tokens,
            on_trial=display.trial,
            seed=options.seed,
            shared_memo=memo,
        )
        if options.strategy == AUTO:
            run = partial(auto, job.strategies, budget=options.budget)
        else:
            display.stage("searching")
            run = partial(run_calibration, job.strategies[0])
        return run(
            task=task,
            held_out=held_out,
            refine=options.refine,
            tree=job.shape,
            weights=job.kinds,
            on_stage=display.stage,
            on_better=display.better,
        )


def _costs(job: CalibrationJob, display: Display, memo: Memo) -> Costs:
    """What passes cost on this device; nothing is measured where no prompt asks for it."""
    from dataclasses import asdict

    from conflayers_cli.engine.cost_cache import costs_of
    from conflayers_cli.engine.cost_model import Costs

    if not job.prompts:
        return Costs({1: 1.0}, floor=0.0, attention=0.0, mlp=0.0, context=0)
    display.stage("measuring what passes cost")

    def measured() -> dict[str, Any]:
        found = costs_of(job.loaded, job.decoder, int4="int4" in job.kinds)
        costs = asdict(found.table.by_batch[1])
        return {**costs, "verify": list(costs["verify"].items())}

    found = memo.cached("costs", measured)
    return Costs(**{**found, "verify": dict(map(tuple, found["verify"]))})


def _tensors_of(done: Calibration, depth: int) -> bytes | None:
    """What goes beside the profile, as a safetensors file; None where there is nothing."""
    from safetensors.torch import save

    from conflayers_cli.search.tensors import tensors_of

    found = tensors_of(done.result, depth)
    return save(found) if found else None


def _write(profile: Profile, tensors: bytes | None, target: Path, journal: Journal) -> None:
    from conflayers_cli.cli.calibrate_journal import temporary_of
    from conflayers_cli.utils.files import write_atomically

    if tensors is not None:
        beside = tensors_path(target)
        journal.will_write(beside.name)
        write_atomically(beside, tensors, temporary=temporary_of(beside))
    write_atomically(target, profile.to_yaml(), temporary=temporary_of(target))


def _tell(profile: Profile, done: Calibration, target: Path | None, as_json: bool) -> None:
    from conflayers_cli.cli.calibrate_display import as_document, strategy_table, summary_lines
    from conflayers_cli.cli.terminal import emit, emit_json, emit_rich

    if as_json:
        emit_json(as_document(profile, done, target))
    else:
        if done.others:
            emit_rich(strategy_table(done, profile.model.depth))
        emit("".join(f"{line}\n" for line in summary_lines(profile, done, target)))
