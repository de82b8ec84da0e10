"""A run over prompts: a model ready to decode, each prompt's result, statistics of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from conflayers_cli.generation.generator import TextGenerator
    from conflayers_cli.generation.request import GenerationRequest
    from conflayers_cli.generation.response import GenerationResult
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.sampling_params import SamplingParams
    from conflayers_cli.utils.memory import PeakMemory


@dataclass(frozen=True)
class RunStats:
    """What ``--stats`` shows of a run beside the figures of its texts.

    Attributes:
        batch_size: prompts decoded at once.
        lossy: what was left out for good; None: nothing.
        peak_bytes: peak memory beyond the model's weights; None: not measured.
        notes: sentences on the model and how it ran.
    """

    batch_size: int
    lossy: str | None
    peak_bytes: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PromptResult:
    """The result of one prompt of a file, counted from 0; ``document`` is its line of JSON,
    ``unknown_tokens`` as of `GenerationRun.unknown_tokens`.
    """

    number: int
    result: GenerationResult
    document: dict[str, Any]
    unknown_tokens: tuple[int, int]


@dataclass(frozen=True)
class GenerationRun:
    """A model ready to decode, and its prompts, encoded; ``memory``: where the peak is measured."""

    loaded: LoadedModel
    generator: TextGenerator
    requests: list[GenerationRequest]
    memory: PeakMemory | None = None

    def run_stats(self) -> RunStats:
        sampling = self.requests[0].sampling if self.requests else None
        return run_stats(self.loaded, self.generator, sampling, self.memory)

    def results(self, begin: int, end: int) -> Iterator[PromptResult]:
        """The results of ``requests[begin:end]``, each as soon as it is complete.

        Raises:
            LogitsError: a text can't go on; it names the prompt where there are several.
        """
        from conflayers_cli.generation.generator import name_failed_prompt

        with name_failed_prompt(self.requests, begin):
            for response in self.generator.stream(self.requests[begin:end]):
                if (result := response.result) is not None:
                    number = begin + response.number
                    document = {**truncation_note(self.requests[number]), **self.as_json(result)}
                    yield PromptResult(number, result, document, self.unknown_tokens(result))

    def unknown_tokens(self, result: GenerationResult) -> tuple[int, int]:
        """(tokens of the output beyond the tokenizer's vocabulary, its size)."""
        size = len(self.loaded.tokenizer)
        return sum(token >= size for token in result.token_ids), size

    def as_json(self, result: GenerationResult) -> dict[str, Any]:
        """A result as JSON takes it, marked where layers were left out for good."""
        document = result.as_json()
        skipped = self.generator.skip_plan
        if skipped is not None:
            document["lossless"] = not skipped
            document["skipped"] = {"attention": skipped.attention, "mlp": skipped.mlp}
            document["kept_layers"] = _kept_layers(self.generator)
        return document


def run_stats(
    loaded: LoadedModel,
    generator: TextGenerator,
    sampling: SamplingParams | None = None,
    memory: PeakMemory | None = None,
) -> RunStats:
    """What ``--stats`` shows of a model and its generator, as of now."""
    from conflayers_cli.engine.run_info import run_notes

    decoder, lossy = generator.decoder, None
    if generator.skip_plan:
        kept = " ".join(map(str, _kept_layers(generator)))
        lossy = f"lossy: decoded with layers {kept} of {decoder.depth} alone"
    sampled = sampling and not sampling.greedy
    seed = (_sampled(sampling),) if sampling and sampled else ()
    return RunStats(
        batch_size=generator.batch_size,
        lossy=lossy,
        peak_bytes=memory.peak() if memory else None,
        notes=(
            f"{loaded.name} on {loaded.device_label}; {loaded.dtype_reason}",
            *run_notes(decoder),
            *seed,
        ),
    )


def _sampled(sampling: SamplingParams) -> str:
    given = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    how = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
    return f"sampled with seed {sampling.seed}: {how}"


def _kept_layers(generator: TextGenerator) -> list[int]:
    """Layers that are not left out as a whole."""
    gone = set(generator.skip_plan.layers) if generator.skip_plan else set()
    return [layer for layer in range(generator.decoder.depth) if layer not in gone]


class PrepareRun(Protocol):
    """Loads the model and encodes the prompts; ``dtype``: None: as the command line says."""

    def __call__(self, dtype: str | None = None) -> GenerationRun: ...


def truncation_note(request: GenerationRequest) -> dict[str, int]:
    """How many tokens of a prompt were left out, where any were."""
    return {"truncated": request.truncated} if request.truncated else {}
