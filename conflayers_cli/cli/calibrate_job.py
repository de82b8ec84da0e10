"""What ``calibrate`` is asked for, and the model and the prompts that it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conflayers_cli.cli.calibrate_options import DraftWeights
from conflayers_cli.cli.strategies import SearchOptions, make_strategies
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompt_encoding import PromptOptions
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.generation.request import GenerationRequest
    from conflayers_cli.models.load_options import LoadOptions
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import ModelFingerprint
    from conflayers_cli.search.problem import Strategy
    from conflayers_cli.skip_plan import Weights
    from conflayers_cli.spec_decode.tree import TreeShape

DEFAULT_BUDGET = 600.0


@dataclass(frozen=True)
class JobOptions:
    """How plans are searched for.

    Attributes:
        strategy: its name.
        search: the strategy's own options.
        refine: plans judged in refinement at the most; 0: none.
        tree: whether side candidates are considered.
        draft_weights: what drafts compute with.
        seed: of whatever is drawn at random.
    """

    strategy: str
    search: SearchOptions
    refine: int
    tree: bool
    draft_weights: DraftWeights
    seed: int

    @property
    def budget(self) -> float:
        """Seconds that several strategies share."""
        return self.search.budget or DEFAULT_BUDGET


@dataclass(frozen=True)
class CalibrationJob:
    """What a calibration runs on.

    Attributes:
        options: of the search.
        loading: how the model was loaded.
        loaded, decoder, fingerprint: the model.
        weights: a digest of a sample of its weights.
        prompts, requests: texts, and their token ids.
        strategies: in the order they run.
    """

    options: JobOptions
    loading: LoadOptions
    loaded: LoadedModel
    decoder: Decoder
    fingerprint: ModelFingerprint
    weights: str
    prompts: list[Prompt]
    requests: list[GenerationRequest]
    strategies: list[Strategy]

    @property
    def max_new_tokens(self) -> int:
        """Tokens per prompt: what the prompt with the least room has room for."""
        return min((prompt.max_new_tokens for prompt in self.requests), default=0)

    @property
    def kinds(self) -> tuple[Weights | None, ...]:
        """The weights that drafts may use, None being the model's own.

        Raises:
            InputError: there are none of the kind asked for.
        """
        wanted = self.options.draft_weights
        if wanted is DraftWeights.OWN or not (self.options.refine and self.prompts):
            return (None,)
        int4 = self.decoder.stack.int4
        if wanted is DraftWeights.INT4:
            if int4.reason is not None:
                raise InputError(f"--draft-weights int4: {int4.reason}")
            return ("int4",)
        return (None, "int4") if int4.worthwhile else (None,)

    @property
    def shape(self) -> TreeShape | None:
        """The side candidates to be considered, the papers'; None: not wanted."""
        from conflayers_cli.spec_decode.tree import GREEDY_SHAPE

        return GREEDY_SHAPE if self.options.tree else None


def open_job(
    model: str,
    loading: LoadOptions,
    prompts: list[Prompt],
    prompt_options: PromptOptions,
    options: JobOptions,
) -> CalibrationJob:
    """Load the model and encode the prompts.

    Raises:
        InputError, ConfLayersError: a prompt, the strategy or the model is no good.
    """
    from conflayers_cli.engine.open_model import open_model
    from conflayers_cli.generation.prompt_encoding import encode_prompts
    from conflayers_cli.models.weight_sketch import sample_of
    from conflayers_cli.profile.check import fingerprint_of

    strategies = make_strategies(options.strategy, options.search)
    weights: list[str] = []
    loaded, decoder = open_model(
        model, loading, lambda loaded: weights.append(sample_of(loaded.model))
    )
    return CalibrationJob(
        options=options,
        loading=loading,
        loaded=loaded,
        decoder=decoder,
        fingerprint=fingerprint_of(loaded),
        weights=weights[0],
        prompts=prompts,
        requests=encode_prompts(loaded, prompts, prompt_options),
        strategies=strategies,
    )
