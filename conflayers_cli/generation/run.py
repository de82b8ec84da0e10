"""A run over prompts: a model ready to decode, results of each prompt, and statistics of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from conflayers_cli.generation.generator import TextGenerator
    from conflayers_cli.generation.request import GenerationRequest
    from conflayers_cli.generation.response import GenerationResult
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.utils.memory import PeakMemory


@dataclass(frozen=True)
class RunStats:
    """What ``--stats`` says of a run beside the figures of its texts.

    Attributes:
        batch_size: prompts decoded at once.
        lossy: what was left out for good; None: nothing.
        peak_bytes: the most memory in use over the model's weights; None: nobody watched.
        told: sentences on the model and how it ran.
    """

    batch_size: int
    lossy: str | None
    peak_bytes: int | None
    told: tuple[str, ...]


@dataclass(frozen=True)
class PromptResult:
    """What came of one prompt of a file.

    Attributes:
        number: the prompt's, from 0.
        result: its text and figures.
        document: what its line says of it.
        without_text: how many of its tokens the tokenizer doesn't know, and how many it does know.
    """

    number: int
    result: GenerationResult
    document: dict[str, Any]
    without_text: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A model ready to decode, and the prompts as it gets them.

    Attributes:
        loaded: the model.
        generator: decodes with it.
        requests: all prompts.
        memory: watches the memory in use; None: nobody asked.
    """

    loaded: LoadedModel
    generator: TextGenerator
    requests: list[GenerationRequest]
    memory: PeakMemory | None = None

    def run_stats(self) -> RunStats:
        """As of now."""
        return run_stats(self.loaded, self.generator, self.memory)

    def results(self, begin: int, end: int) -> Iterator[PromptResult]:
        """The results of the prompts from one number to before another, each as soon as it is done.

        Raises:
            LogitsError: a text can't go on; it names the prompt where there are several.
        """
        from conflayers_cli.generation.generator import naming_prompts

        with naming_prompts(self.requests, begin):
            for response in self.generator.stream(self.requests[begin:end]):
                if response.result is not None:
                    yield self._result(begin + response.number, response.result)

    def _result(self, number: int, result: GenerationResult) -> PromptResult:
        document = {**truncation_note(self.requests[number]), **self.as_json(result)}
        return PromptResult(number, result, document, self.without_text(result))

    def without_text(self, result: GenerationResult) -> tuple[int, int]:
        """(tokens of the output beyond the tokenizer's vocabulary, its size)."""
        from conflayers_cli.generation.detokenizer import without_text

        tokenizer = self.loaded.tokenizer
        return without_text(tokenizer, result.token_ids), len(tokenizer)

    def as_json(self, result: GenerationResult) -> dict[str, Any]:
        """A result as JSON takes it; one that is not the model's own says so."""
        document = result.as_json()
        skipped = self.generator.skip_plan
        if skipped is not None:
            document["lossless"] = not skipped
            document["skipped"] = {"attention": skipped.attention, "mlp": skipped.mlp}
            document["kept_layers"] = _kept_layers(self.generator)
        return document


def run_stats(
    loaded: LoadedModel, generator: TextGenerator, memory: PeakMemory | None = None
) -> RunStats:
    """What ``--stats`` says of a model and its generator, as of now."""
    from conflayers_cli.engine.run_info import remarks

    decoder, lossy = generator.decoder, None
    if generator.skip_plan:
        kept = " ".join(map(str, _kept_layers(generator)))
        lossy = f"lossy: decoded with layers {kept} of {decoder.depth} alone"
    return RunStats(
        batch_size=generator.batch_size,
        lossy=lossy,
        peak_bytes=memory.peak() if memory else None,
        told=(f"{loaded.name} on {loaded.place}; {loaded.dtype_reason}", *remarks(decoder)),
    )


def _kept_layers(generator: TextGenerator) -> list[int]:
    """Layers of which something is left where others are left out for good."""
    gone = set(generator.skip_plan.layers) if generator.skip_plan else set()
    return [layer for layer in range(generator.decoder.depth) if layer not in gone]


class Prepare(Protocol):
    """Loads the model and encodes the prompts.

    Args:
        dtype: which the model is loaded in; None: as the command line says.
    """

    def __call__(self, dtype: str | None = None) -> Prepared: ...


def truncation_note(request: GenerationRequest) -> dict[str, int]:
    """How many tokens of a prompt were left out, where any were."""
    return {"truncated": request.truncated} if request.truncated else {}
