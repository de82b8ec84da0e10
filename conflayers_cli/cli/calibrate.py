"""``conflayers calibrate``: find the layers a model can leave out while drafting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import calibrate_options as search_options
from conflayers_cli.cli import options
from conflayers_cli.cli.strategies import (
    AUTO,
    UNIFIED,
    SearchOptions,
    check_options,
    make_strategies,
)
from conflayers_cli.errors import ConfLayersError, InputError

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.cli.common import EncodedPrompt
    from conflayers_cli.engine.costs import Costs
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.engine.tree import TreeShape
    from conflayers_cli.profile import DraftSettings, ModelFingerprint, Profile, RangeSection
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.search.calibrate import Calibration, Candidate
    from conflayers_cli.search.objective import Setting
    from conflayers_cli.search.task import RangePlan, Strategy

DEFAULT_MODEL = "smollm2-deep"
DEFAULT_BUDGET = 600.0

HELP = """Find the layers a model can leave out while it drafts, and write them to a profile.

A strategy searches for a set of layers, losslessly decoding your prompts. The
set is improved layer by layer under predicted tokens per second on this
device, and checked by real decoding on prompts the search has not seen. Where
no set beats plain decoding it says so, and the profile is empty.

\b
  conflayers calibrate --model smollm2-deep --data prompts.jsonl -o summ.yaml
  conflayers calibrate --model ./my-model --data prompts.jsonl --strategy auto
  conflayers calibrate -m ./my-model --strategy unified --target-speedup 1.5

Ctrl-C ends the search with the best set so far and writes it.
"""


@dataclass(frozen=True)
class _Work:
    """What a calibration runs on."""

    loaded: LoadedModel
    decoder: Decoder
    fingerprint: ModelFingerprint
    prompts: list[Prompt]
    encoded: list[EncodedPrompt]
    name: str
    strategies: list[Strategy]
    budget: float
    tree: bool
    refine: int
    seed: int

    @property
    def max_new_tokens(self) -> int:
        """Tokens per prompt: what the prompt with the least room has room for."""
        return min((prompt.max_new_tokens for prompt in self.encoded), default=0)

    @property
    def shape(self) -> TreeShape | None:
        """The side candidates to be considered, the papers'; None: not wanted."""
        from conflayers_cli.engine.tree import GREEDY_SHAPE

        return GREEDY_SHAPE if self.tree else None


def calibrate(
    model: options.Model = None,
    data: options.Data = None,
    output: search_options.Output = None,
    strategy: search_options.StrategyName = "conflayers",
    target_speedup: search_options.TargetSpeedup = None,
    budget: search_options.Budget = None,
    skip_ratio: search_options.SkipRatio = None,
    search_interval: search_options.SearchInterval = None,
    max_iterations: search_options.MaxIterations = None,
    patience: search_options.Patience = None,
    context_window: search_options.ContextWindow = None,
    refine: search_options.Refine = None,
    refine_limit: search_options.RefineLimit = 500,
    tree: search_options.Tree = True,
    max_prompts: options.MaxPrompts = None,
    max_new_tokens: search_options.MaxNewTokens = 128,
    system: options.System = None,
    raw: options.Raw = False,
    seed: search_options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    compile_: options.Compile = False,
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    search = SearchOptions(
        skip_ratio=skip_ratio,
        search_interval=search_interval,
        max_iterations=max_iterations,
        patience=patience,
        context_window=context_window,
        target_speedup=target_speedup,
        budget=budget,
    )
    check_options(strategy, search)
    from conflayers_cli.cli import common
    from conflayers_cli.cli.terminal import note

    if model is None:
        model = DEFAULT_MODEL
        note(f"no --model given: calibrating {model}")
    target = output or Path(f"{_short_name(model)}.yaml")
    _check_targets(target)
    # Unified's rule needs no text; with --data its plan is measured.
    prompts = [] if _by_rule(strategy, data) else common.read_prompt_file(data, max_prompts)
    strategies = make_strategies(strategy, search)
    loaded, decoder = common.open_model(
        model,
        common.Loading(
            device,
            dtype,
            trust_remote_code,
            device_map=device_map,
            compiled=compile_,
            quantize=quantize,
        ),
    )
    work = _Work(
        loaded=loaded,
        decoder=decoder,
        fingerprint=common.fingerprint_of(loaded),
        prompts=prompts,
        encoded=common.encode_prompts(
            loaded, prompts, system=system, raw=raw, max_new_tokens=max_new_tokens
        ),
        name=strategy,
        strategies=strategies,
        budget=budget or DEFAULT_BUDGET,
        tree=tree,
        refine=refine_limit if (strategy != UNIFIED if refine is None else refine) else 0,
        seed=seed,
    )
    done = _run(work)
    profile = _profile_of(work, done, target)
    try:
        _write(profile, done, target)
    except ConfLayersError:
        _tell(profile, done, None, as_json)  # what took so long must not be lost with the file
        raise
    _tell(profile, done, target, as_json)
    if done.interrupted:
        raise KeyboardInterrupt


def _by_rule(strategy: str, data: Path | None) -> bool:
    return strategy == UNIFIED and data is None


def _short_name(model: str) -> str:
    """What a profile is called by default: the last part of the model's name."""
    name = Path(model).resolve().name.removesuffix(".gguf")
    return name.lstrip(".") or "profile"


def tensors_path(profile: Path) -> Path:
    """Where the per-iteration tensors of a profile go: beside it."""
    return profile.with_name(f"{profile.stem}.safetensors")


def _check_targets(profile: Path) -> None:
    """Refuse, before any work, names that the profile and its tensors can't be written to."""
    from conflayers_cli.profile import check_replaceable

    if profile.suffix == ".safetensors" or profile.name.startswith("."):
        raise InputError(f"--output {profile}: a name such as summ.yaml is needed")
    check_replaceable(profile, tensors_path(profile))


def _run(work: _Work) -> Calibration:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.search.auto import auto
    from conflayers_cli.search.calibrate import calibrate as run_calibration
    from conflayers_cli.search.calibrate import split_prompts
    from conflayers_cli.search.task import Task

    used, held_out = split_prompts([prompt.tokens for prompt in work.encoded], work.seed)
    with Display(work.decoder.depth) as display:
        task = Task(
            decoder=work.decoder,
            prompts=used,
            costs=_costs(work, display),
            max_new_tokens=work.max_new_tokens,
            end_tokens=work.loaded.end_tokens,
            on_trial=display.trial,
            seed=work.seed,
        )
        if work.name == AUTO:
            return auto(
                work.strategies,
                task,
                held_out,
                budget=work.budget,
                refine=work.refine,
                tree=work.shape,
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
            on_stage=display.stage,
            on_better=display.better,
        )


def _costs(work: _Work, display: Display) -> Costs:
    """What passes cost on this device; nothing is measured where no prompt asks for it."""
    from conflayers_cli.engine.costs import Costs
    from conflayers_cli.engine.latencies import costs_of

    if not work.prompts:
        return Costs({1: 1.0}, floor=0.0, attention=0.0, mlp=0.0, context=0)
    display.stage("measuring what passes cost")
    return costs_of(work.loaded, work.decoder).table.by_batch[1]


def _profile_of(work: _Work, done: Calibration, target: Path) -> Profile:
    from conflayers_cli.profile import Profile, SkipSection

    return Profile(
        model=work.fingerprint,
        skip=SkipSection.of(done.plan),
        draft=_draft_section(done.setting, done.candidate),
        ranges=tuple(_range_section(each, done) for each in done.ranges) or None,
        tensors=tensors_path(target).name if done.result.tensors else None,
        **_provenance(work, done),
    )


def _range_section(each: RangePlan, done: Calibration) -> RangeSection:
    """A plan for longer contexts, as the profile takes it."""
    from conflayers_cli.profile import RangeSection, SkipSection
    from conflayers_cli.search.objective import PAPER

    return RangeSection(
        from_context=each.from_context,
        skip=SkipSection.of(each.plan),
        draft=_draft_section(each.setting or PAPER, done.candidate),
    )


def _draft_section(setting: Setting, found: Candidate) -> DraftSettings:
    """A way of drafting, as the profile takes it.

    Where nothing pays to be left out, n-grams may still draft. A plan that was searched for but not
    refined is kept with its method's own way of drafting.
    """
    from conflayers_cli.profile import DraftSettings

    skips = setting.max_tokens > 0
    own = skips and not (found.refined or found.by_rule)
    return DraftSettings(
        by="skip" if own else "mixed" if skips else "ngram",
        lookahead=False if own else None,
        max_tokens=setting.max_tokens,
        stop_probability=setting.stop_probability,
        tree=setting.tree.rungs if setting.tree else None,
    )


def _provenance(work: _Work, done: Calibration) -> dict[str, Any]:
    """How it was found, what was measured, and on what."""
    from dataclasses import asdict

    from conflayers_cli.cli.common import environment_of
    from conflayers_cli.profile import FoundBy, Measured, PromptsUsed
    from conflayers_cli.prompts import fingerprint

    check, pays, expected = done.check, bool(done.plan), done.candidate.expected
    settings = {
        **_plain_settings(asdict(done.candidate.method)),  # type: ignore[call-overload]
        "refine_limit": work.refine,
        "max_new_tokens": work.max_new_tokens,
    }
    if work.name == AUTO:
        settings["budget"] = work.budget
    return {
        "found_by": FoundBy(
            strategy=done.candidate.strategy,
            refined=done.candidate.refined,
            settings=settings,
            seed=work.seed,
            prompts=PromptsUsed(count=len(work.prompts), sha256=fingerprint(work.prompts)),
        ),
        "measured": Measured(
            acceptance_rate=check.acceptance_rate if check and pays else None,
            tokens_per_step=check.tokens_per_step if check and pays else None,
            expected_speedup=expected.speedup if expected and pays else None,
            measured_speedup=check.speedup if check and pays else None,
            iterations=len(done.result.trials),
            seconds=done.seconds,
            conclusion=done.conclusion,
        ),
        "environment": environment_of(work.loaded),
    }


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a profile takes them: single values."""
    return {
        key: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for key, value in settings.items()
    }


def _write(profile: Profile, done: Calibration, target: Path) -> None:
    from conflayers_cli.outputs import write_atomically

    if done.result.tensors:
        from safetensors.torch import save

        write_atomically(tensors_path(target), save(dict(done.result.tensors)))
    profile.save(target)


def _tell(profile: Profile, done: Calibration, target: Path | None, as_json: bool) -> None:
    from conflayers_cli.cli.calibrate_display import as_document, strategy_table, summary_lines
    from conflayers_cli.cli.terminal import emit, emit_json, emit_rich

    if as_json:
        emit_json(as_document(profile, done, target))
    else:
        if done.others:
            emit_rich(strategy_table(done, profile.model.depth))
        emit("".join(f"{line}\n" for line in summary_lines(profile, done, target)))
