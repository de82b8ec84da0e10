"""Prompts → the token ids that a model gets: chat template, truncation, token budget."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import Prompt, as_messages, plain_text, with_system
from conflayers_cli.generation.request import GenerationRequest, with_seed
from conflayers_cli.sampling_params import SamplingParams

if TYPE_CHECKING:
    from conflayers_cli.models.generation_settings import GenerationSettings
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

_OWN_ARGUMENTS = frozenset(
    (
        *("conversation", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "return_dict", "truncation"),
    )
)
MODEL = "model"
"""Sampling as the model's generation config has it."""
_ADVICE = "(truncate shortens it)"


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are encoded.

    Attributes:
        max_new_tokens: the most tokens of an output.
        sampling: "model": tokens are chosen as the model's generation config says.
        system: a system message in place of the prompts' own; None: keep those.
        raw: no chat template.
        template: arguments of the chat template, such as ``enable_thinking``, ``tools`` or
            ``documents``.
        truncate: shorten a prompt that leaves no room for ``max_new_tokens``.
        continue_final_message: go on with the assistant's message that ends each chat, as with
            transformers' `apply_chat_template`; the output is what comes behind it.
    """

    max_new_tokens: int = 256
    system: str | None = None
    raw: bool = False
    truncate: bool = False
    sampling: str | None = None
    template: Mapping[str, Any] | None = None
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if self.raw and self.continue_final_message:
            raise InputError(
                "continue_final_message: goes by the chat template, which raw leaves out: give one",
                names=("continue_final_message", "raw leaves"),
            )
        if self.sampling not in (None, MODEL):
            raise InputError(
                f"sampling {self.sampling}: there is {MODEL}", names=(f"sampling {self.sampling}",)
            )
        if taken := sorted({*(self.template or ())} & _OWN_ARGUMENTS):
            raise InputError(f"template argument {taken[0]}: is given by other options")


def encode_prompt(loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool) -> list[int]:
    """Token ids by the chat template, if there is one, unless ``raw``; errors as of `encode`."""
    return _encode(loaded, _rendered(loaded, prompt, system, raw))


def _rendered(loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool) -> Prompt:
    """The prompt with its system message: a text, or messages for the chat template."""
    if raw or not loaded.has_chat_template:
        return Prompt(prompt.id, text=plain_text(prompt, system))
    return Prompt(prompt.id, messages=with_system(prompt, system))


def _encode(
    loaded: LoadedModel, rendered: Prompt, options: PromptOptions | None = None
) -> list[int]:
    from conflayers_cli.models.tokenization import encode

    messages = as_messages(rendered) if rendered.messages else None
    options = options or PromptOptions()
    return encode(
        loaded,
        messages,
        rendered.text,
        options.template,
        continue_final=options.continue_final_message,
    )


def encode_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    options: PromptOptions,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
) -> list[GenerationRequest]:
    """Encode prompts and check that they fit into the model's context.

    Where a prompt leaves less than ``max_new_tokens`` of the context, its budget is reduced, noted
    once; with ``truncate`` it is shortened, which is noted, but for no more than half the context.

    Where tokens are sampled (``sampling`` None: greedy) and no seed is given, one is drawn for all
    prompts: a text depends on the seed and its own prompt, not on its place or its neighbours.

    Raises:
        InputError: a prompt can't be encoded, can't be continued, or fills the context; it is
            named.
    """
    from conflayers_cli.models.tokenization import TooLongError

    context, wanted = loaded.context_length, options.max_new_tokens
    settings = loaded.settings
    own = options.sampling == MODEL
    sampling = with_seed(settings.complete(sampling or SamplingParams(), own=own))
    _note_ignored(loaded, settings)
    _note_no_template(loaded, prompts, options)
    if options.continue_final_message:
        _check_continued(loaded, prompts)
    requests = []
    for prompt in prompts:
        which = _name(prompt, prompts)
        try:
            rendered = _rendered(loaded, prompt, options.system, options.raw)
            if options.truncate and context is not None:
                limit = context - min(wanted, context // 2)
                tokens, left_out = _truncated(loaded, rendered, limit, options)
            else:
                tokens, left_out = _encode(loaded, rendered, options), 0
        except TooLongError as error:
            raise InputError(
                f"{which} {error.reason} {_ADVICE}", names=("truncate shortens",)
            ) from error
        except InputError as error:
            raise InputError(f"{which}: {error}", names=error.names) from error
        budget = min(wanted, _room(loaded, len(tokens), which))
        if left_out:
            logger.warning(
                f"note: {left_out:,} tokens of {which} were left out, {len(tokens):,} are kept"
            )
        requests.append(
            GenerationRequest(
                tokens,
                budget,
                sampling,
                stop=(*stop, *settings.stops),
                id=prompt.id,
                category=prompt.category,
                truncated=left_out,
                continues=rendered.messages is None or options.continue_final_message,
                processors=settings.processors(tokens, budget),
            )
        )
    _note_reduced_budgets(loaded, [request.max_new_tokens for request in requests], wanted)
    return requests


def _room(loaded: LoadedModel, length: int, which: str) -> int:
    """Tokens that the context leaves behind a prompt; InputError: none."""
    context = loaded.context_length
    remaining = sys.maxsize if context is None else context - length
    if remaining < 1:
        raise InputError(
            f"{which} is too long: {length:,} tokens, and {loaded.name} takes "
            f"{context:,}, the answer included {_ADVICE}",
            names=("truncate shortens",),
        )
    return remaining


def _name(prompt: Prompt, prompts: Sequence[Prompt]) -> str:
    return f"prompt {prompt.id}" if len(prompts) > 1 else "the prompt"


def _check_continued(loaded: LoadedModel, prompts: Sequence[Prompt]) -> None:
    """Raise InputError where a prompt has no final message that can be continued."""
    if not loaded.has_chat_template:
        raise InputError(
            f"continue_final_message: {loaded.name} has no chat template, which says where the "
            "message goes on: give plain text (raw)",
            names=("continue_final_message", "raw)"),
        )
    for prompt in prompts:
        prompt.check_continued(_name(prompt, prompts))


def _note_no_template(
    loaded: LoadedModel, prompts: Sequence[Prompt], options: PromptOptions
) -> None:
    if loaded.has_chat_template or options.raw:
        return
    if options.template:
        logger.warning(f"note: {loaded.name} has no chat template, so its arguments do nothing")
    if any(prompt.messages for prompt in prompts):
        logger.warning(
            f"note: {loaded.name} has no chat template: chats are given to it as plain text, their "
            "messages joined by blank lines"
        )


def _note_ignored(loaded: LoadedModel, settings: GenerationSettings) -> None:
    if ignored := settings.ignored:
        logger.warning(
            f"note: {', '.join(ignored)} in the generation config of {loaded.name} is not followed"
        )


def _truncated(
    loaded: LoadedModel, rendered: Prompt, limit: int, options: PromptOptions
) -> tuple[list[int], int]:
    """(at most ``limit`` tokens of a prompt, how many of its text are left out)."""
    from conflayers_cli.generation.truncation import prompt_texts, truncate_prompt
    from conflayers_cli.models.tokenization import count_tokens

    truncated = truncate_prompt(rendered, lambda part: _encode(loaded, part, options), limit)
    if truncated.prompt == rendered:
        return truncated.tokens, 0
    before, after = (
        sum(count_tokens(loaded.tokenizer, text) for text in prompt_texts(part))
        for part in (rendered, truncated.prompt)
    )
    return truncated.tokens, max(before - after, 1)


def _note_reduced_budgets(loaded: LoadedModel, budgets: Sequence[int], wanted: int) -> None:
    if not (cut := [budget for budget in budgets if budget < wanted]):
        return
    several = f"{len(cut)} of {len(budgets)} prompts leave"
    which = several if len(budgets) > 1 else "the prompt leaves"
    logger.warning(
        f"note: {which} room for {min(cut):,} new tokens{' or more' if len(cut) > 1 else ''} "
        f"instead of {wanted:,} in the context of {loaded.name} ({loaded.context_length:,} tokens)"
    )
