"""``conflayers calibrate``: find the layers a model can leave out while drafting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import calibrate_options as search_options
from conflayers_cli.cli import options
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.cli.common import EncodedPrompt
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.profile import ModelFingerprint, Profile
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.search.calibrate import Calibration
    from conflayers_cli.search.conflayers import ConfLayers

DEFAULT_MODEL = "smollm2-deep"
STRATEGIES = ("conflayers",)

HELP = """Find the layers a model can leave out while it drafts, and write them to a profile.

The search decodes your prompts (losslessly) with one set of layers after the
other, improves the best set layer by layer under predicted tokens per second
on this device, and checks it by real decoding on prompts it has not seen.
Where no set beats plain decoding it says so, and the profile is empty.

\b
  conflayers calibrate --model smollm2-deep --data prompts.jsonl -o summ.yaml
  conflayers calibrate --model ./my-model --data prompts.jsonl --no-refine

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
    strategy: ConfLayers
    refine: int
    seed: int

    @property
    def max_new_tokens(self) -> int:
        """Tokens per prompt: what the prompt with the least room has room for."""
        return min(prompt.max_new_tokens for prompt in self.encoded)


def calibrate(
    model: options.Model = None,
    data: options.Data = None,
    output: search_options.Output = None,
    strategy: search_options.StrategyName = "conflayers",
    skip_ratio: search_options.SkipRatio = 0.4,
    search_interval: search_options.SearchInterval = 30,
    max_iterations: search_options.MaxIterations = 100,
    patience: search_options.Patience = 15,
    context_window: search_options.ContextWindow = 100,
    refine: search_options.Refine = True,
    refine_limit: search_options.RefineLimit = 500,
    max_prompts: options.MaxPrompts = None,
    max_new_tokens: search_options.MaxNewTokens = 128,
    system: options.System = None,
    raw: options.Raw = False,
    seed: search_options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy}: there is {', '.join(STRATEGIES)}")
    from conflayers_cli.cli import common
    from conflayers_cli.cli.terminal import note
    from conflayers_cli.search.conflayers import ConfLayers

    if model is None:
        model = DEFAULT_MODEL
        note(f"no --model given: calibrating {model}")
    target = output or Path(f"{_short_name(model)}.yaml")
    _check_targets(target)
    prompts = common.read_prompt_file(data, max_prompts)
    loaded, decoder = common.open_model(model, device, dtype, trust_remote_code)
    model_fingerprint = common.fingerprint_of(loaded)
    encoded = common.encode_prompts(
        loaded, prompts, system=system, raw=raw, max_new_tokens=max_new_tokens
    )
    method = ConfLayers(
        skip_ratio=skip_ratio,
        search_interval=search_interval,
        max_iterations=max_iterations,
        context_window=context_window,
        patience=patience,
    )
    work = _Work(
        loaded,
        decoder,
        model_fingerprint,
        prompts,
        encoded,
        method,
        refine_limit if refine else 0,
        seed,
    )
    done = _run(work)
    profile = _profile_of(work, done, target)
    _write(profile, done, target)
    _tell(profile, done, target, as_json)
    if done.interrupted:
        raise KeyboardInterrupt


def _short_name(model: str) -> str:
    """What a profile is called by default: the last part of the model's name."""
    name = Path(model).resolve().name.removesuffix(".gguf")
    return name.lstrip(".") or "profile"


def tensors_path(profile: Path) -> Path:
    """Where the per-iteration tensors of a profile go: beside it."""
    return profile.with_name(f"{profile.stem}.safetensors")


def _check_targets(profile: Path) -> None:
    """Refuse, before any work, names that the profile and its tensors can't be written to."""
    from conflayers_cli.outputs import check_target

    if profile.suffix == ".safetensors" or profile.name.startswith("."):
        raise InputError(f"--output {profile}: a name such as summ.yaml is needed")
    check_target(profile)
    check_target(tensors_path(profile))


def _run(work: _Work) -> Calibration:
    from conflayers_cli.cli.calibrate_display import Display
    from conflayers_cli.engine.costs import measure_costs
    from conflayers_cli.search.calibrate import calibrate as run_calibration
    from conflayers_cli.search.calibrate import split_prompts
    from conflayers_cli.search.objective import Setting
    from conflayers_cli.search.task import Task

    used, held_out = split_prompts([prompt.tokens for prompt in work.encoded], work.seed)
    with Display(work.decoder.depth, work.strategy.max_iterations) as display:
        display.stage("measuring what passes cost")
        costs = measure_costs(work.decoder)
        display.stage("searching")
        task = Task(
            decoder=work.decoder,
            prompts=used,
            costs=costs,
            max_new_tokens=work.max_new_tokens,
            end_tokens=work.loaded.end_tokens,
            on_trial=display.trial,
        )
        return run_calibration(
            work.strategy,
            task,
            held_out,
            refine=work.refine,
            paper_setting=Setting(work.strategy.max_draft, work.strategy.stop_probability),
            on_stage=display.stage,
            on_better=display.better,
        )


def _profile_of(work: _Work, done: Calibration, target: Path) -> Profile:
    from conflayers_cli.profile import DraftSettings, Profile, SkipSection

    return Profile(
        model=work.fingerprint,
        skip=SkipSection.of(done.plan),
        draft=DraftSettings(
            max_tokens=done.setting.max_tokens, stop_probability=done.setting.stop_probability
        ),
        tensors=tensors_path(target).name if done.result.tensors else None,
        **_provenance(work, done),
    )


def _provenance(work: _Work, done: Calibration) -> dict[str, Any]:
    """How it was found, what was measured, and on what."""
    from dataclasses import asdict

    import torch

    from conflayers_cli.environment import device_name, versions
    from conflayers_cli.profile import Environment, FoundBy, Measured, PromptsUsed
    from conflayers_cli.prompts import fingerprint

    check, pays = done.check, bool(done.plan)
    settings = {
        **asdict(work.strategy),
        "refine_limit": work.refine,
        "max_new_tokens": work.max_new_tokens,
    }
    return {
        "found_by": FoundBy(
            strategy=work.strategy.name,
            refined=done.refined,
            settings=settings,
            seed=work.seed,
            prompts=PromptsUsed(count=len(work.prompts), sha256=fingerprint(work.prompts)),
        ),
        "measured": Measured(
            acceptance_rate=check.acceptance_rate if check and pays else None,
            tokens_per_step=check.tokens_per_step if check and pays else None,
            expected_speedup=done.expected.speedup if done.expected and pays else None,
            measured_speedup=check.speedup if check and pays else None,
            iterations=len(done.result.trials),
            seconds=done.seconds,
            conclusion=done.conclusion,
        ),
        "environment": Environment(
            device=device_name(work.loaded.device),
            dtype=str(work.loaded.dtype).removeprefix("torch."),
            threads=torch.get_num_threads() if work.loaded.device.type == "cpu" else None,
            **versions(),
        ),
    }


def _write(profile: Profile, done: Calibration, target: Path) -> None:
    from conflayers_cli.outputs import write_atomically

    if done.result.tensors:
        from safetensors.torch import save

        write_atomically(tensors_path(target), save(dict(done.result.tensors)))
    profile.save(target)


def _tell(profile: Profile, done: Calibration, target: Path, as_json: bool) -> None:
    from conflayers_cli.cli.calibrate_display import as_document, summary_lines
    from conflayers_cli.cli.terminal import emit, emit_json

    if as_json:
        emit_json(as_document(profile, done, target))
    else:
        emit("".join(f"{line}\n" for line in summary_lines(profile, done, target)))
