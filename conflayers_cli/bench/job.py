"""A bench as a whole: model, prompts and systems, and what they ran with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conflayers_cli.bench import runner
from conflayers_cli.bench.hf_baselines import TransformersSystem
from conflayers_cli.bench.schema import SCHEMA_VERSION, SKIP_ONLY, BenchContext, BenchDocument
from conflayers_cli.bench.serialize import build_document
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, System
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.engine.run_info import run_details
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.prompts import Prompt, fingerprint
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.build_proposer import as_batch_proposer
from conflayers_cli.profile.schema import Profile, SkipSection
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.objective import PAPER
from conflayers_cli.search.open_proposer import open_proposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.by_context import ContextLengthProposer
from conflayers_cli.spec_decode.options import DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured, before a model is loaded.

    Attributes:
        model, load: the model, and how it is loaded.
        profile, profile_path, force: the profile, its file, and whether it may be another model's.
        prompts, data, prompt_options: the prompts, their file, and how they are encoded.
        sampling, drafting: how tokens are chosen and drafts made.
        batch_size: prompts decoded at once.
        runs, warmup: decodings of each prompt by each system, and of each system before them.
        against: names of `hf_baselines.HF_BASELINES` to measure, too.
        target_speedup: also measure the model with its depth over this kept for good; None: not.
    """

    model: str
    load: LoadOptions
    profile: Profile | None
    profile_path: Path | None
    force: bool
    prompts: Sequence[Prompt]
    data: Path | None
    prompt_options: PromptOptions
    sampling: SamplingParams
    drafting: DraftOptions
    batch_size: int
    runs: int
    warmup: int
    against: Sequence[str]
    target_speedup: float | None

    def __post_init__(self) -> None:
        if self.sampling.seed is None:  # not drawn: what is measured can be measured again
            object.__setattr__(self, "sampling", replace(self.sampling, seed=0))

    @property
    def prompt_hashes(self) -> list[str]:
        """SHA-256 of each prompt's content."""
        return [fingerprint([prompt]) for prompt in self.prompts]


@dataclass(frozen=True)
class BenchJob:
    """What a bench runs on.

    Attributes:
        request: what is to be measured.
        loaded, decoder: the model.
        proposer: drafts for the speculative system; None: it decodes vanilla.
        lossy: what the lossy system leaves out for good; None: there is no such system.
        as_paper: the lossy system's plan also drafts, as the papers do.
        encoded: the prompts as token ids.
    """

    request: BenchRequest
    loaded: LoadedModel
    decoder: Decoder
    proposer: Proposer | None
    lossy: SkipPlan | None
    as_paper: bool
    encoded: list[GenerationRequest]

    @classmethod
    def open(cls, request: BenchRequest) -> BenchJob:
        """Load the model, build what drafts, encode the prompts.

        Raises:
            InputError, ConfLayersError: the model, the profile or a prompt is no good.
        """
        loaded, decoder = open_model(request.model, request.load)
        target = request.target_speedup
        lossy = None if target is None else SkipPlan.unified(decoder.depth, target)
        as_paper = lossy is not None and request.profile is None and request.drafting.method is None
        proposer: Proposer | None = None
        if lossy and as_paper:
            proposer = SkipProposer(decoder, lossy, PAPER.max_tokens, PAPER.stop_probability)
        elif not as_paper:
            proposer = open_proposer(
                loaded,
                decoder,
                request.profile,
                request.profile_path,
                request.force,
                request.drafting,
                remember=False,
            )
        encoded = encode_prompts(loaded, request.prompts, request.prompt_options, request.sampling)
        request = replace(
            request,
            # with the model's own repetition penalty, where it has one
            sampling=encoded[0].sampling if encoded else request.sampling,
        )
        if proposer is None:
            logger.warning("note: nothing is left out while drafting, so both arms decode vanilla")
        return cls(request, loaded, decoder, proposer, lossy, as_paper, encoded)

    def context(self) -> BenchContext:
        """The model, the machine and the settings, before anything is measured."""
        return BenchContext(
            schema_version=SCHEMA_VERSION,
            model=self.loaded.name,
            model_hash=str(config_fingerprint(self.loaded.model.config)["config_hash"]),
            device=self.loaded.device_label,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            environment=describe_environment(self.loaded.device),
            settings=self._settings(),
            engine={},
        )

    def measure(self, context: BenchContext) -> BenchDocument:
        """Measure all systems, with a bar on stderr.

        Args:
            context: as `context` gives it.
        """
        request = self.request
        if len(self.encoded) < request.batch_size:
            logger.warning(
                f"note: {len(self.encoded)} prompts never fill a batch of {request.batch_size}"
            )
        with progress_bar() as on_progress:
            result = runner.measure(
                self._systems(),
                self._bench_prompts(),
                self.decoder,
                request.sampling,
                batch_size=request.batch_size,
                runs=request.runs,
                warmup=request.warmup,
                on_progress=on_progress,
            )
        ran_with = context.model_copy(update={"engine": run_details(self.decoder)})
        return build_document(result, ran_with, request.prompt_hashes)

    def _bench_prompts(self) -> list[BenchPrompt]:
        return [
            BenchPrompt(
                each.id,
                each.category,
                tuple(each.prompt),
                each.max_new_tokens,
                each.processors,
            )
            for each in self.encoded
        ]

    def _systems(self) -> list[System]:
        decoder, sampling, ends = self.decoder, self.request.sampling, self.loaded.end_tokens
        size = self.request.batch_size
        proposer = as_batch_proposer(self.proposer) if size > 1 else self.proposer
        systems: list[System] = [
            EngineSystem("vanilla", decoder, None, sampling, ends, size),
            EngineSystem("speculative", decoder, proposer, sampling, ends, size),
        ]
        if self.lossy is not None:
            systems.append(
                EngineSystem(SKIP_ONLY, decoder, None, sampling, ends, skip_plan=self.lossy)
            )
        for name in dict.fromkeys(self.request.against):
            systems.append(TransformersSystem.baseline(name, decoder, sampling, ends))
        return systems

    def _settings(self) -> dict[str, Any]:
        """Everything that was asked for, so that it can be measured again."""
        request, profile = self.request, self.request.profile
        settings: dict[str, Any] = {
            "profile": str(request.profile_path) if request.profile_path else None,
            "skip": _skip_json(profile.skip) if profile else None,
            "draft": profile.draft.model_dump(mode="json") if profile else None,
            "ranges": [r.model_dump(mode="json") for r in profile.ranges or ()] if profile else [],
            "data": str(request.data) if request.data else None,
            "prompts": {"count": len(request.prompts), "sha256": fingerprint(request.prompts)},
            "sampling": asdict(request.sampling),
            "repeatable_drafts": _repeatable(self.proposer),
        }
        if self.lossy is not None:
            settings["skip_only"] = _skip_json(SkipSection.of(self.lossy))
            if self.as_paper:
                settings |= {"skip": settings["skip_only"], "draft": asdict(PAPER)}
        return {
            **settings,
            "draft_by": request.drafting.method.value if request.drafting.method else None,
            "lookahead": request.drafting.adaptive_draft_length,
            "tree": request.drafting.tree,
            "batch_size": request.batch_size,
            "target_speedup": request.target_speedup,
            "system": request.prompt_options.system,
            "raw": request.prompt_options.raw,
            "truncate": request.prompt_options.truncate,
            "exact": request.load.exact,
            "quantize": request.load.quantize,
            "keep_quantized": request.load.keep_quantized,
            "merge_adapter": request.load.merge_adapter,
            "compile": request.load.compiled,
            "device_map": request.load.device_map,
            "max_new_tokens": request.prompt_options.max_new_tokens,
            "runs": request.runs,
            "warmup": request.warmup,
        }


def _skip_json(skip: SkipSection) -> dict[str, Any]:
    return skip.model_dump(mode="json", exclude_defaults=True)


def _repeatable(proposer: Proposer | None) -> bool:
    """Whether drafts are the same in every run: they depend on nothing that is measured."""
    if isinstance(proposer, ContextLengthProposer):
        return all(_repeatable(each) for _, each in proposer.proposers)
    return proposer is None or (isinstance(proposer, SkipProposer) and proposer.tree is None)
