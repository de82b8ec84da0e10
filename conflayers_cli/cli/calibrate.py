"""``conflayers calibrate``: find the layers a model can leave out while drafting."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from conflayers_cli.cli import calibrate_options as search_options
from conflayers_cli.cli import options
from conflayers_cli.cli.data_options import DataFlags
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.terminal import emit, emit_json, emit_rich
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.search.options import UNIFIED, DraftWeights
from conflayers_cli.search.strategies.registry import check_options

if TYPE_CHECKING:
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.search.calibrate import Calibration
    from conflayers_cli.search.job import CalibrationJob
    from conflayers_cli.search.journal import Journal

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-deep"


@with_groups
def calibrate(
    *,
    model: options.Model = None,
    file: DataFlags,
    output: search_options.Output = None,
    resume: search_options.Resume = None,
    search: search_options.SearchFlags,
    prompt_options: search_options.PromptFlags = PromptOptions(max_new_tokens=128),
    load: search_options.LoadFlags,
    as_json: options.Json = False,
) -> None:
    """Find the layers a model can leave out while it drafts, and write them to a profile.

    Sets of layers are judged by predicted tokens per second on this device,
    on texts that the model wrote for a few of your prompts (--max-prompts:
    for all of as many), and the best one is checked by real decoding on
    prompts the search has not seen. Where no set beats plain decoding it
    says so, and the profile is empty. Ctrl-C ends the search with the best
    set so far and writes it. Whatever ended a search, kill -9 or a power
    cut, --resume goes on from the last set looked at. A paper's method may
    search for the set to begin with (--strategy).

    \b
      conflayers calibrate --model smollm2-deep --data prompts.jsonl -o summ.yaml
      conflayers calibrate --model ./my-model --data prompts.jsonl --strategy auto
      conflayers calibrate -m ./my-model --strategy unified --target-speedup 1.5
    """
    file.check_reading()
    check_options(search)
    if search.draft_weights is DraftWeights.INT4 and not search.max_refined:
        raise InputError("--draft-weights int4 is for refinement to use: not with --no-refine")
    if model is None:
        model = DEFAULT_MODEL
        logger.info(f"no --model given: calibrating {model}")
    target = output or Path(f"{default_name(model)}.yaml")
    if target.suffix == ".safetensors" or target.name.startswith("."):
        raise InputError(f"--output {target}: a name such as summ.yaml is needed")
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.profile.schema import check_replaceable
    from conflayers_cli.search.job import CalibrationJob
    from conflayers_cli.search.journal import open_journal
    from conflayers_cli.search.to_profile import tensors_path

    check_replaceable(target)
    with open_journal(target, resume) as journal:
        if journal.pending_file != tensors_path(target).name:
            # tensors of another profile are not overwritten
            check_replaceable(target, tensors_path(target))
        # Unified's rule needs no text; with --data its plan is measured.
        needs_text = search.strategy != UNIFIED or file.data is not None
        prompts = file.read() if needs_text else []
        search = replace(search, judged_prompts=file.max_prompts)
        with Display("loading the model") as display:
            job = CalibrationJob.open(model, load, prompts, prompt_options, search)
            journal.begin(job.header())
            display.begin(job.decoder.depth)
            found = job.run(
                journal,
                on_stage=display.stage,
                on_trial=display.trial,
                on_better=display.better,
                on_look=display.looked,
            )
        _conclude(job, found, target, journal, as_json)


def default_name(model: str) -> str:
    """The last part of a model's name or path, for its profile."""
    name = Path(model).resolve().name.removesuffix(".gguf")
    return name.lstrip(".") or "profile"


def _conclude(
    job: CalibrationJob, found: Calibration, target: Path, journal: Journal, as_json: bool
) -> None:
    """Write the profile and its tensors, and print the result."""
    from safetensors.torch import save

    from conflayers_cli.search.tensors import collect_tensors
    from conflayers_cli.search.to_profile import calibrated_profile

    collected = collect_tensors(found.result, job.decoder.depth)
    tensors = save(collected) if collected else None
    profile = calibrated_profile(job, found, target, tensors)
    kept = f"--resume goes on with {journal.path}"
    try:
        _write(profile, tensors, target, journal)
    except ConfLayersError:
        _print(profile, found, None, as_json)  # what took so long must not be lost with the file
        if journal.resumable:
            logger.warning(f"note: the search is kept, too: {kept}")
        raise
    _print(profile, found, target, as_json)
    if found.interrupted:
        if journal.resumable:
            logger.warning(f"note: the search is not over: {kept}")
        raise KeyboardInterrupt
    journal.remove()


def _write(profile: Profile, tensors: bytes | None, target: Path, journal: Journal) -> None:
    from conflayers_cli.search.journal import temporary_name
    from conflayers_cli.search.to_profile import tensors_path
    from conflayers_cli.utils.files import write_atomically

    if tensors is not None:
        beside = tensors_path(target)
        journal.set_pending_file(beside.name)
        write_atomically(beside, tensors, temporary=temporary_name(beside))
    write_atomically(target, profile.to_yaml(), temporary=temporary_name(target))


def _print(profile: Profile, found: Calibration, target: Path | None, as_json: bool) -> None:
    from conflayers_cli.cli.calibrate_display import strategy_table, summary_lines, to_json

    if as_json:
        emit_json(to_json(profile, found, target))
    else:
        if found.candidates:
            emit_rich(strategy_table(found, profile.model.depth))
        emit("".join(f"{line}\n" for line in summary_lines(profile, found, target)))
