"""``conflayers calibrate``: find the layers a model can leave out while drafting."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import calibrate_options as search_options
from conflayers_cli.cli import options
from conflayers_cli.cli.calibrate_journal import header_of, open_journal
from conflayers_cli.cli.calibrate_options import DraftWeights
from conflayers_cli.cli.calibrate_profile import profile_of, tensors_path
from conflayers_cli.cli.common import read_prompt_file
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.strategies import AUTO, UNIFIED, check_options, make_strategies
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.models.loading import open_model
from conflayers_cli.profile_check import fingerprint_of

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.engine.cost_model import Costs
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.request import GenerationRequest
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import ModelFingerprint, Profile
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.search.calibrate import Calibration
    from conflayers_cli.search.helpers import Helpers
    from conflayers_cli.search.journal import Journal
    from conflayers_cli.search.problem import Strategy
    from conflayers_cli.search.record import Record
    from conflayers_cli.skip_plan import Weights
    from conflayers_cli.spec_decode.tree import TreeShape

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-deep"
DEFAULT_BUDGET = 600.0

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


@dataclass(frozen=True)
class Work:
    """What a calibration runs on."""

    loaded: LoadedModel
    weights: str
    decoder: Decoder
    fingerprint: ModelFingerprint
    prompts: list[Prompt]
    encoded: list[GenerationRequest]
    name: str
    strategies: list[Strategy]
    budget: float
    tree: bool
    refine: int
    draft_weights: DraftWeights
    seed: int
    quantize: str | None
    compiled: bool

    @property
    def max_new_tokens(self) -> int:
        """Tokens per prompt: what the prompt with the least room has room for."""
        return min((prompt.max_new_tokens for prompt in self.encoded), default=0)

    @property
    def kinds(self) -> tuple[Weights | None, ...]:
        """The weights that drafts may use, None being the model's own.

        Raises:
            InputError: there are none of the kind asked for.
        """
        if self.draft_weights is DraftWeights.OWN or not (self.refine and self.prompts):
            return (None,)
        int4 = self.decoder.stack.int4
        if self.draft_weights is DraftWeights.INT4:
            if int4.reason is not None:
                raise InputError(f"--draft-weights int4: {int4.reason}")
            return ("int4",)
        return (None, "int4") if int4.worthwhile else (None,)

    @property
    def shape(self) -> TreeShape | None:
        """The side candidates to be considered, the papers'; None: not wanted."""
        from conflayers_cli.spec_decode.tree import GREEDY_SHAPE

        return GREEDY_SHAPE if self.tree else None


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
    ray: options.Ray = None,
    workers: options.Workers = None,
    seed: search_options.Seed = 0,
    load: search_options.LoadFlags,
    as_json: options.Json = False,
) -> None:
    check_options(strategy, search)
    refining = refine_limit if (strategy != UNIFIED if refine is None else refine) else 0
    if draft_weights is DraftWeights.INT4 and not refining:
        raise InputError("--draft-weights int4 is for refinement to use: not with --no-refine")
    from conflayers_cli.cluster.ray_cluster import cluster_of
    from conflayers_cli.cluster.workers import helping_workers
    from conflayers_cli.models.weight_sketch import sample_of

    cluster = cluster_of(ray, workers, device=load.device, device_map=load.device_map)
    if cluster and _by_rule(strategy, data):
        raise InputError("--ray: nothing is decoded for --strategy unified without --data")
    if model is None:
        model = DEFAULT_MODEL
        logger.info(f"no --model given: calibrating {model}")
    target = output or Path(f"{_short_name(model)}.yaml")
    _check_profile(target)
    with open_journal(target, resume) as journal:
        if journal.writes != tensors_path(target).name:
            _check_tensors(target)
        # Unified's rule needs no text; with --data its plan is measured.
        prompts = [] if _by_rule(strategy, data) else read_prompt_file(data, max_prompts)
        strategies = make_strategies(strategy, search)
        weights: list[str] = []
        loaded, decoder = open_model(
            model, load, lambda loaded: weights.append(sample_of(loaded.model))
        )
        work = Work(
            loaded=loaded,
            weights=weights[0],
            decoder=decoder,
            fingerprint=fingerprint_of(loaded),
            prompts=prompts,
            encoded=encode_prompts(loaded, prompts, prompt_options),
            name=strategy,
            strategies=strategies,
            budget=search.budget or DEFAULT_BUDGET,
            tree=tree,
            refine=refining,
            draft_weights=draft_weights,
            seed=seed,
            quantize=load.quantize,
            compiled=load.compiled,
        )
        journal.begin(header_of(work))
        with helping_workers(cluster, model, load, loaded) as helpers:
            done = _searched(work, journal, helpers)
        _conclude(work, done, target, journal, as_json)


def _searched(work: Work, journal: Journal, helpers: Helpers | None) -> Calibration:
    """Search, and have everything measured kept in the journal."""
    from conflayers_cli.search.record import Record

    record = Record(work.decoder, journal.entries, journal)
    try:
        return _run(work, record, helpers)
    except InputError:  # a model or prompts that can't be searched: that stays so
        journal.remove()
        raise
    finally:
        record.close()


def _conclude(work: Work, done: Calibration, target: Path, journal: Journal, as_json: bool) -> None:
    """Write what was found, and say it."""

    tensors = _tensors_of(done, work.decoder.depth)
    profile = profile_of(work, done, target, tensors)
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


def _by_rule(strategy: str, data: Path | None) -> bool:
    return strategy == UNIFIED and data is None


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


def _run(work: Work, record: Record, helpers: Helpers | None) -> Calibration:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.search.auto import auto
    from conflayers_cli.search.calibrate import calibrate as run_calibration
    from conflayers_cli.search.calibrate import split_prompts
    from conflayers_cli.search.problem import Task

    used, held_out = split_prompts([tuple(request.prompt) for request in work.encoded], work.seed)
    with Display(work.decoder.depth) as display:
        task = Task(
            decoder=work.decoder,
            prompts=used,
            costs=_costs(work, display, record),
            max_new_tokens=work.max_new_tokens,
            end_tokens=work.loaded.end_tokens,
            on_trial=display.trial,
            seed=work.seed,
            recorder=record,
            helpers=helpers,
        )
        if work.name == AUTO:
            return auto(
                work.strategies,
                task,
                held_out,
                budget=work.budget,
                refine=work.refine,
                tree=work.shape,
                weights=work.kinds,
                on_stage=display.stage,
                on_better=display.better,
            )
        display.stage("searching")
        return run_calibration(
            work.strategies[0],
            task,
            held_out,
            refine=work.refine,
            tree=work.shape,
            weights=work.kinds,
            on_stage=display.stage,
            on_better=display.better,
        )


def _costs(work: Work, display: Display, record: Record) -> Costs:
    """What passes cost on this device; nothing is measured where no prompt asks for it."""
    from dataclasses import asdict

    from conflayers_cli.engine.cost_cache import costs_of
    from conflayers_cli.engine.cost_model import Costs

    if not work.prompts:
        return Costs({1: 1.0}, floor=0.0, attention=0.0, mlp=0.0, context=0)
    display.stage("measuring what passes cost")

    def measured() -> dict[str, Any]:
        found = costs_of(work.loaded, work.decoder, int4="int4" in work.kinds)
        costs = asdict(found.table.by_batch[1])
        return {**costs, "verify": list(costs["verify"].items())}

    found = record.did("costs", measured)
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
