"""The Python API: load a model, generate, stream.

```python
from conflayers_cli import generate, load

model = load("smollm2-deep")
print(generate(model, "Why is the sky blue?", "deep.yaml").text)
```

It says nothing on the terminal: what the command line notes on stderr is a `ConfLayersWarning`
here, and what it fails with an `InputError` or another `ConfLayersError`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack, overload

from conflayers_cli.api.attached_model import borrow
from conflayers_cli.api.options import (
    LoadKeywords,
    ManyPrompts,
    OnePrompt,
    Options,
    Settings,
    as_prompts,
    is_one,
    settings_of,
)
from conflayers_cli.api.proposers import Opened, ProfileLike, drafter_of, in_python
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.generator import TextGenerator, naming_prompts
from conflayers_cli.generation.prompt_encoding import encode_prompts
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel, as_loaded
from conflayers_cli.profile.build_proposer import rows_drafter
from conflayers_cli.spec_decode.proposer import Proposer


@dataclass(frozen=True)
class _Owned:
    """A model that was loaded for the engine, which keeps it."""

    loaded: LoadedModel
    decoder: Decoder
    drafters: dict[Hashable, Proposer | None] = field(default_factory=dict)

    def at_work(self) -> AbstractContextManager[object]:
        return nullcontext()


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to be decoded with: a handle, nothing needs to be closed.

    Attributes:
        loaded: the transformers model, its tokenizer, and what is known of them.
        opened: the engine on it, as it has to be by now.
    """

    loaded: LoadedModel
    opened: Callable[[], Opened] = field(repr=False)


def load(
    model: str | Any,
    *,
    tokenizer: Any = None,
    in_place: bool = False,
    **keywords: Unpack[LoadKeywords],
) -> Model:
    """A model by its name, or the engine on one that is loaded already.

    Args:
        model: ``smollm2``, ``smollm2-deep``, a folder, a GGUF file or a Hugging Face id; or a
            transformers causal language model, or a `PeftModel` of one. Such a one stays where it
            is, in its dtype, and is as it was whenever nothing is being decoded (see `Borrowed`).
        tokenizer: of a transformers model; not to be given otherwise.
        in_place: don't hold a given model's weights twice, see `Borrowed`.
        keywords: how the model is loaded and run, see `LoadOptions`; of these only ``exact``
            matters to a model that is loaded already.

    Raises:
        InputError: there is no such model, or it can't be decoded exactly.
        ConfLayersError: it does not fit into the memory.
    """
    options = LoadOptions(**keywords)
    with in_python():
        if not isinstance(model, str):
            if tokenizer is None:
                raise InputError("tokenizer: is needed with a model that is loaded already")
            borrowing = partial(borrow, model, exact=options.exact, in_place=in_place)
            known = borrowing().loaded
            return Model(as_loaded(model, tokenizer, known.name, known.dtype_reason), borrowing)
        if tokenizer is not None:
            raise InputError("tokenizer: comes with the model; give both loaded, or a name alone")
        owned = _Owned(*open_model(model, options))
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
        profile: what `calibrate` wrote, or its file; None: nobody drafts unless ``draft`` says so.
        options: see `Options`.

    Returns:
        The answer; for a list of prompts a list of answers in their order.

    Raises:
        InputError: wrong options, a prompt that can't be read or is too long, a profile of another
            model.
        ConfLayersError: a failure while decoding.
    """
    prompts = as_prompts(prompt)
    with in_python():
        settings = settings_of(options)
        opened = model.opened()
        with opened.at_work():
            generator, requests = _prepared(model, opened, prompts, profile, settings)
            with naming_prompts(requests):
                answers = generator.generate(requests)
    return answers[0] if is_one(prompt) else answers


class Stream(Iterator[str]):
    """An answer's text, piece by piece, none of them empty; they add up to the text.

    Whoever has had enough stops asking; the model can be used again at once.

    Attributes:
        answer: the whole answer, once the last piece was given; None before.
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
        """Decode no further."""
        self._responses.close()


def stream(
    model: Model,
    prompt: OnePrompt,
    profile: ProfileLike | None = None,
    **options: Unpack[Options],
) -> Stream:
    """Decode a prompt while its text is read.

    Args:
        model, prompt, profile, options: as for `generate`, for one prompt.

    Raises:
        InputError, ConfLayersError: as `generate`; what is wrong with the arguments at once.
    """
    if not is_one(prompt):
        raise InputError("stream: takes one prompt, generate takes a list")
    with in_python():
        settings = settings_of(options)
        opened = model.opened()
        with opened.at_work():
            generator, requests = _prepared(model, opened, as_prompts(prompt), profile, settings)

    def responses() -> Generator[GenerationResponse, None, None]:
        with opened.at_work():
            yield from generator.stream(requests)

    return Stream(responses())


def _prepared(
    model: Model,
    opened: Opened,
    prompts: Sequence[Prompt],
    profile: ProfileLike | None,
    settings: Settings,
) -> tuple[TextGenerator, list[GenerationRequest]]:
    """Who answers, and the prompts as the model gets them."""
    settings.sampling.note_unused()
    requests = encode_prompts(
        model.loaded, prompts, settings.prompts, settings.sampling, settings.stops
    )
    drafter = drafter_of(opened, profile, settings.drafting, settings.force)
    batch_size = settings.drafting.batch_size
    generator = TextGenerator(
        opened.decoder,
        model.loaded.tokenizer,
        end_tokens=model.loaded.end_tokens,
        drafter=rows_drafter(drafter) if batch_size > 1 else drafter,
        batch_size=batch_size,
    )
    return generator, requests
