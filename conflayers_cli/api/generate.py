"""The Python API: load a model, generate, stream.

```python
from conflayers_cli import generate, load

model = load("smollm2-deep")
print(generate(model, "Why is the sky blue?", "deep.yaml").text)
```

It prints nothing: notes are `ConfLayersWarning` s, failures `InputError` or another
`ConfLayersError`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

from conflayers_cli.api.attached_model import attach
from conflayers_cli.api.options import (
    LoadKeywords,
    ManyPrompts,
    OnePrompt,
    Options,
    ParsedOptions,
    as_paths,
    as_prompts,
    is_single_prompt,
    parse_options,
)
from conflayers_cli.api.proposers import (
    Engine,
    LoadedEngine,
    ProfileLike,
    get_proposer,
    notes_as_warnings,
)
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.generator import TextGenerator, name_failed_prompt
from conflayers_cli.generation.prompt_encoding import encode_prompts
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel, wrap_model
from conflayers_cli.profile.build_proposer import as_batch_proposer
from conflayers_cli.spec_decode.open_store import OpenStore


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to decode; needs no closing.

    Attributes:
        loaded: the transformers model and its tokenizer.
        engine: gives the engine on it, made anew where a user's own model has changed.
    """

    loaded: LoadedModel
    engine: Callable[[], Engine] = field(repr=False)


def load(
    model: str | Any,
    *,
    tokenizer: Any = None,
    in_place: bool = False,
    **keywords: Unpack[LoadKeywords],
) -> Model:
    """Load a model by its name, or attach the engine to a loaded one.

    Args:
        model: ``smollm2``, ``smollm2-deep``, a folder, a GGUF file or a Hugging Face id; or a
            transformers causal language model, or a `PeftModel` of one, which keeps its device and
            dtype and is restored whenever nothing is being decoded (see `AttachedEngine`).
        tokenizer: of a loaded model only.
        in_place: don't hold a loaded model's weights twice, see `AttachedEngine`.
        keywords: see `LoadOptions`; for a loaded model only ``exact`` matters.

    Raises:
        InputError: there is no such model, or it can't be decoded exactly.
        ConfLayersError: it does not fit into the memory.
    """
    options = LoadOptions(**keywords)
    with notes_as_warnings():
        if not isinstance(model, str):
            if tokenizer is None:
                raise InputError("tokenizer: is needed with a model that is loaded already")
            engine = partial(attach, model, exact=options.exact, in_place=in_place)
            known = engine().loaded
            return Model(wrap_model(model, tokenizer, known.name, known.dtype_reason), engine)
        if tokenizer is not None:
            raise InputError("tokenizer: comes with the model; give both loaded, or a name alone")
        owned = LoadedEngine(*open_model(model, options))
        return Model(owned.loaded, lambda: owned)


@overload
def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
    model: Model,
    prompt: OnePrompt,
    profile: ProfileLike | None = None,
    **options: Unpack[Options],
) -> GenerationResult: ...


@overload
def generate(
    model: Model,
    prompt: ManyPrompts,
    profile: ProfileLike | None = None,
    **options: Unpack[Options],
) -> list[GenerationResult]: ...


def generate(
    model: Model,
    prompt: OnePrompt | ManyPrompts,
    profile: ProfileLike | None = None,
    **options: Unpack[Options],
) -> GenerationResult | list[GenerationResult]:
    """Decode one prompt, or several, to the end.

    Args:
        model: from `load`.
        prompt: a text, a chat, or a list of either. A text is put into the model's chat template,
            if it has one, unless ``raw``.
        profile: a calibrated profile or its file; None: drafts adapt to the texts, unless
            ``draft`` says who drafts.
        options: see `Options`.

    Returns:
        The result; for a list of prompts a list in their order.

    Raises:
        InputError: wrong options, a prompt that is too long, a profile of another model.
        ConfLayersError: a failure while decoding.
    """
    prompts = as_prompts(prompt)
    with notes_as_warnings():
        run = _prepare(model, prompts, profile, parse_options(options))
        with run.engine.active(), run.saved, name_failed_prompt(run.requests):
            results = run.generator.generate(run.requests)
    return results[0] if is_single_prompt(prompt) else results


class Stream(Iterator[str]):
    """An output's text in non-empty pieces. Iteration may stop anywhere.

    ``answer``: the result, once the last piece was given; None before.
    """

    def __init__(self, responses: Generator[GenerationResponse, None, None]) -> None:
        self._responses = responses
        self.answer: GenerationResult | None = None

    def __next__(self) -> str:
        for response in self._responses:
            self.answer = response.result
            if response.text:
                return response.text
        raise StopIteration

    def close(self) -> None:
        self._responses.close()


def stream(
    model: Model,
    prompt: OnePrompt,
    profile: ProfileLike | None = None,
    **options: Unpack[Options],
) -> Stream:
    """Decode one prompt while its text is read; arguments and errors as of `generate`."""
    if not is_single_prompt(prompt):
        raise InputError("stream: takes one prompt, generate takes a list")
    with notes_as_warnings():
        run = _prepare(model, as_prompts(prompt), profile, parse_options(options))

    def responses() -> Generator[GenerationResponse, None, None]:
        with run.engine.active(), run.saved:
            yield from run.generator.stream(run.requests)

    return Stream(responses())


def open_store(
    model: Model, file: str | Path | None = None, corpus: str | Path | Sequence[str | Path] = ()
) -> OpenStore:
    """Earlier texts to draft from, for the option ``draft_store`` of any number of calls.

    Each call adds its prompts and answers. What is in a store changes speed alone.

    Args:
        model: whose drafts they are for.
        file: keeps the texts between programs: what is in it is read, and `OpenStore.save`, or the
            end of a ``with`` block, adds what was gained. None: they are held in memory alone.
        corpus: text files to be added at once.

    Raises:
        InputError: a file can't be read, is no store, or is one for another tokenizer.
    """
    path = None if file is None else Path(file)
    vocabulary = model.engine().decoder.vocabulary
    return OpenStore(model.loaded.tokenizer, vocabulary, path, as_paths(corpus))


@dataclass(frozen=True)
class _Call:
    """What one call decodes with; ``saved`` keeps its texts at the end."""

    engine: Engine
    generator: TextGenerator
    requests: list[GenerationRequest]
    saved: AbstractContextManager[object]


def _open_call_store(model: Model, options: ParsedOptions, several: bool) -> OpenStore | None:
    """The store of one call; None: nothing would ever be in it."""
    if isinstance(options.store, OpenStore):
        options.store.add_files(options.corpus)
        return options.store
    if options.store is None and not options.corpus and not several:
        return None
    return open_store(model, options.store, options.corpus)


def _prepare(
    model: Model, prompts: Sequence[Prompt], profile: ProfileLike | None, options: ParsedOptions
) -> _Call:
    """What the call decodes with, its prompts encoded."""
    options.sampling.note_unused()
    loaded, engine = model.loaded, model.engine()
    requests = encode_prompts(loaded, prompts, options.prompts, options.sampling, options.stops)
    batch_size = options.drafting.batch_size
    with engine.active():
        proposer = get_proposer(
            engine, profile, options.drafting, options.force, options.named_store
        )
    several = len(requests) > 1 and options.drafting.by_ngrams
    opened = _open_call_store(model, options, several)
    generator = TextGenerator(
        engine.decoder,
        loaded.tokenizer,
        end_tokens=loaded.end_tokens,
        proposer=as_batch_proposer(proposer) if batch_size > 1 else proposer,
        batch_size=batch_size,
        store=opened.store if opened else None,
    )
    saved = nullcontext() if opened is None or opened is options.store else opened
    return _Call(engine, generator, requests, saved)
