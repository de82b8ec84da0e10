"""Options and prompts of the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from conflayers_cli.api.proposers import DraftMethodName, resolve_lookahead
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.generation.prompts import Message, Prompt
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.open_store import OpenStore
from conflayers_cli.spec_decode.options import DraftMethod, DraftOptions

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A chat: ``{"role": …, "content": …}`` in order."""
OnePrompt: TypeAlias = str | Messages | Prompt
ManyPrompts: TypeAlias = Sequence[str] | Sequence[Messages] | Sequence[Prompt]


class LoadKeywords(TypedDict, total=False):
    """Keywords of `load`: the fields of `LoadOptions`."""

    device: str
    dtype: str
    exact: bool
    compiled: bool
    device_map: str | None
    quantize: str | None
    keep_quantized: bool | None
    merge_adapter: bool | None
    trust_remote_code: bool


class Options(TypedDict, total=False):
    """Keywords of `generate` and `stream`: fields of `SamplingParams`, `PromptOptions` and
    `DraftOptions`, with their defaults, and these:

    Attributes:
        seed: of sampling; None: one is drawn, for all prompts of the call; results name it.
        stop: texts that end an output and are not part of it.
        draft: who drafts; None: as the profile says, without one what pays.
        lookahead: the old name of ``adaptive_draft_length``, for one more version.
        force: take a profile of another model of the same depth.
        draft_store: earlier texts, from which n-grams draft, too: from `open_store`, or a file,
            which is read at the beginning of the call and gets its texts at the end.
        draft_corpus: text files from which n-grams draft, too.
    """

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    system: str | None
    sampling: str | None
    template: Mapping[str, Any] | None
    continue_final_message: bool
    raw: bool
    draft: DraftMethodName | None
    adaptive_draft_length: bool | None
    lookahead: bool | None
    tree: bool | None
    force: bool
    batch_size: int
    draft_store: str | Path | OpenStore | None
    draft_corpus: str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class ParsedOptions:
    """`Options`, checked, with defaults."""

    sampling: SamplingParams
    prompts: PromptOptions
    drafting: DraftOptions
    stops: tuple[str, ...]
    force: bool
    store: Path | OpenStore | None = None
    corpus: tuple[Path, ...] = ()

    @property
    def named_store(self) -> str | None:
        """The option that names earlier texts; None: there are none."""
        if self.store is not None:
            return "draft_store"
        return "draft_corpus" if self.corpus else None


def parse_options(options: Options) -> ParsedOptions:
    """Check options; TypeError: an unknown one, InputError: a value out of its range."""
    if unknown := sorted(options.keys() - Options.__optional_keys__):
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    sampling = SamplingParams(**_fields(SamplingParams, options))
    prompts = PromptOptions(**_fields(PromptOptions, options))
    draft = options.get("draft")
    drafting = DraftOptions(
        method=None if draft is None else DraftMethod.parse(draft),
        adaptive_draft_length=resolve_lookahead(
            options.get("adaptive_draft_length"), options.get("lookahead")
        ),
        tree=options.get("tree"),
        batch_size=options.get("batch_size", 1),
    )
    if drafting.batch_size < 1:
        raise InputError(f"batch_size {drafting.batch_size}: at least 1 is needed")
    stop = options.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    store, corpus = options.get("draft_store"), options.get("draft_corpus", ())
    return ParsedOptions(
        sampling,
        prompts,
        drafting,
        stops,
        options.get("force", False),
        Path(store) if isinstance(store, str) else store,
        as_paths(corpus),
    )


def as_paths(files: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """One file or several, as paths."""
    return tuple(map(Path, [files] if isinstance(files, str | Path) else files))


def _fields(kind: type, options: Options) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


def is_single_prompt(prompt: OnePrompt | ManyPrompts) -> bool:
    """Whether it is one prompt: a text, or a chat (a list of messages)."""
    return isinstance(prompt, str | Prompt) or (
        len(prompt) > 0 and all(isinstance(each, Mapping) for each in prompt)
    )


def as_prompts(given: OnePrompt | ManyPrompts) -> list[Prompt]:
    """The prompts, numbered from 1; InputError: something is no prompt."""
    several: Iterable[object] = [given] if is_single_prompt(given) else given  # type: ignore[assignment]
    return [_prompt(str(number), each) for number, each in enumerate(several, 1)]


def _prompt(number: str, given: object) -> Prompt:
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        if not given.strip():
            raise InputError(f"prompt {number} is empty")
        return Prompt(number, text=given)
    if not isinstance(given, Sequence) or not given:
        raise InputError(f"prompt {number}: is neither a text nor a chat")
    for message in given:
        known = isinstance(message, Mapping) and {"role", "content"} == message.keys()
        if not known or not all(isinstance(value, str) for value in message.values()):
            raise InputError(f'prompt {number}: messages are {{"role": TEXT, "content": TEXT}}')
    return Prompt(number, messages=tuple(Message(m["role"], m["content"]) for m in given))
