"""A calibration as a whole: model, prompts and strategies, run under a journal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from conflayers_cli.engine.cost_cache import get_costs
from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.weight_sketch import hash_weight_sample
from conflayers_cli.profile.check import current_environment, fingerprint_model
from conflayers_cli.profile.schema import ModelFingerprint
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Calibration, OnStage, calibrate, split_prompts
from conflayers_cli.search.journal import Journal
from conflayers_cli.search.local_search import OnBetter, OnLook, ignore_look
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.options import AUTO, DraftWeights, SearchOptions
from conflayers_cli.search.problem import OnTrial, SearchProblem, Strategy
from conflayers_cli.search.strategies.registry import make_strategies, strategy_key
from conflayers_cli.search.texts import NUM_TEXTS, balanced, num_texts, num_tokens
from conflayers_cli.skip_plan import Weights
from conflayers_cli.spec_decode.tree import PAPER_SHAPE


@dataclass(frozen=True)
class CalibrationJob:
    """What a calibration runs on.

    Attributes:
        options: of the search.
        load_options: how the model was loaded.
        loaded, decoder, fingerprint: the model.
        weights_hash: of a sample of its weights.
        prompts, requests: texts, and their token ids.
        strategies: in the order they run.
    """

    options: SearchOptions
    load_options: LoadOptions
    loaded: LoadedModel
    decoder: Decoder
    fingerprint: ModelFingerprint
    weights_hash: str
    prompts: list[Prompt]
    requests: list[GenerationRequest]
    strategies: list[Strategy]

    @classmethod
    def open(
        cls,
        model: str,
        load_options: LoadOptions,
        prompts: list[Prompt],
        prompt_options: PromptOptions,
        options: SearchOptions,
    ) -> CalibrationJob:
        """Load the model and encode the prompts.

        Raises:
            InputError, ConfLayersError: a prompt, the strategy or the model is no good.
        """
        strategies = make_strategies(options)
        hashes: list[str] = []
        loaded, decoder = open_model(
            model, load_options, lambda loaded: hashes.append(hash_weight_sample(loaded.model))
        )
        return cls(
            options=options,
            load_options=load_options,
            loaded=loaded,
            decoder=decoder,
            fingerprint=fingerprint_model(loaded),
            weights_hash=hashes[0],
            prompts=prompts,
            requests=encode_prompts(loaded, prompts, prompt_options),
            strategies=strategies,
        )

    @property
    def max_new_tokens(self) -> int:
        """Tokens decoded per prompt: the smallest budget of all prompts."""
        return min((prompt.max_new_tokens for prompt in self.requests), default=0)

    @property
    def draft_weights(self) -> tuple[Weights | None, ...]:
        """The weights that drafts may use; None: the model's own.

        Raises:
            InputError: int4 was asked for and can't be had.
        """
        wanted = self.options.draft_weights
        if wanted is DraftWeights.OWN or not (self.options.max_refined and self.prompts):
            return (None,)
        int4 = self.decoder.stack.int4
        if wanted is DraftWeights.INT4:
            if int4.reason is not None:
                raise InputError(
                    f"draft_weights int4: {int4.reason}", names=("draft_weights int4",)
                )
            return ("int4",)
        return (None, "int4") if int4.worthwhile else (None,)

    def header(self) -> dict[str, Any]:
        """Everything that decides what is measured; a journal is resumed where it is equal.

        The names of the model and the profile are no part of it: files may have moved.
        """
        tokens = [(request.prompt, request.max_new_tokens) for request in self.requests]
        options = self.options
        return {
            "model": self.fingerprint.model_dump(mode="json", exclude={"name", "sketch"}),
            "weights": self.weights_hash,
            "environment": current_environment(self.loaded).model_dump(mode="json"),
            "quantize": self.load_options.quantize,
            "keep_quantized": self.load_options.keep_quantized,
            "compile": self.load_options.compiled,
            "prompts": sha256(repr(tokens).encode()).hexdigest()[:16],
            "strategy": strategy_key(options.strategy),
            "settings": {
                **self._strategy_settings(),
                "refine_limit": options.max_refined,
                "tree": options.tree,
                "draft_weights": options.draft_weights.value,
                "max_new_tokens": self.max_new_tokens,
                "budget": options.budget,
                "judged_prompts": options.judged_prompts,
                "memory": options.memory,
                "seed": options.seed,
            },
        }

    def _strategy_settings(self) -> dict[str, Any]:
        """The strategy's settings; of several strategies, each one's by its name."""
        each = [asdict(strategy) for strategy in self.strategies]  # type: ignore[call-overload]
        if len(each) == 1:
            return dict(each[0])
        names = [
            " ".join([strategy.name, *(str(own[k]) for k in ("target_speedup",) if k in own)])
            for strategy, own in zip(self.strategies, each, strict=True)
        ]
        return dict(zip(names, each, strict=True))

    def run(
        self,
        journal: Journal,
        *,
        on_stage: OnStage,
        on_trial: OnTrial,
        on_better: OnBetter,
        on_look: OnLook = ignore_look,
    ) -> Calibration:
        """Search, refine and check; what is measured goes into the journal, which was begun.

        Raises:
            InputError: the model or the prompts can't be searched; the journal is removed.
        """
        memo = Memo(self.decoder, journal.entries, journal.append)
        try:
            return self._run(memo, on_stage, on_trial, on_better, on_look)
        except InputError:
            journal.remove()
            raise

    def _run(
        self,
        memo: Memo,
        on_stage: OnStage,
        on_trial: OnTrial,
        on_better: OnBetter,
        on_look: OnLook,
    ) -> Calibration:
        options, budget, memory = self.options, self.options.budget, self.options.memory << 20
        used, held_out = split_prompts(
            [tuple(request.prompt) for request in self.requests], options.seed
        )
        ordered = balanced(used, self._categories)
        wanted = options.judged_prompts or NUM_TEXTS
        tokens = num_tokens(self.max_new_tokens, budget)
        count = num_texts(self.decoder, ordered, wanted, memory, budget, tokens=tokens)
        problem = SearchProblem(
            decoder=self.decoder,
            prompts=used,
            costs=self._costs(on_stage, memo, used, tokens),
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.loaded.end_tokens,
            on_trial=on_trial,
            seed=options.seed,
            judged=tuple(ordered[:count]),
            judged_tokens=tokens,
            states_bytes=memory // 4,
            shared_memo=memo,
        )
        run: Callable[..., Calibration]
        if options.strategy == AUTO:
            run = partial(auto, self.strategies, budget=options.budget_seconds)
        else:
            on_stage("searching")
            run = partial(calibrate, self.strategies[0], budget=budget)
        return run(
            problem=problem,
            held_out=held_out,
            refine=options.max_refined,
            tree=PAPER_SHAPE if options.tree else None,
            weights=self.draft_weights,
            on_stage=on_stage,
            on_better=on_better,
            on_look=on_look,
        )

    @property
    def _categories(self) -> dict[tuple[int, ...], str | None]:
        pairs = zip(self.requests, self.prompts, strict=True)
        return {tuple(request.prompt): prompt.category for request, prompt in pairs}

    def _costs(
        self, on_stage: OnStage, memo: Memo, prompts: Sequence[tuple[int, ...]], tokens: int
    ) -> PassCosts:
        """What passes cost on this device in the middle of an answer of so many tokens to a prompt
        of the usual length; not measured where there are no prompts."""
        if not self.prompts:
            return PassCosts({1: 1.0}, floor=0.0, attention=0.0, mlp=0.0, context=0)
        on_stage("measuring what passes cost")

        def measure() -> dict[str, Any]:
            int4 = "int4" in self.draft_weights
            found = get_costs(self.loaded, self.decoder, int4=int4, recheck=True)
            costs = asdict(found.table.by_batch[1])
            return {**costs, "verify": list(costs["verify"].items())}

        found = memo.cached("costs", measure)
        costs = PassCosts(**{**found, "verify": dict(map(tuple, found["verify"]))})
        usual = round(statistics.median(map(len, prompts))) + tokens // 2
        return costs.at(max(usual, costs.context), self.decoder.depth)
