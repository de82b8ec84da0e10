"""Prompts → the token ids that a model gets: its chat template, and room for the answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams

if TYPE_CHECKING:
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

_ADVICE = "(truncate shortens it)"


@dataclass(frozen=True)
class PromptOptions:
    """What becomes of prompts before a model gets them.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        system: a system message, in place of the prompts' own; None: those.
        raw: prompts are given as they are, without the chat template.
        truncate: shorten a prompt that leaves no room for ``max_new_tokens``.
    """

    max_new_tokens: int = 256
    system: str | None = None
    raw: bool = False
    truncate: bool = False


def encode_prompt(loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool) -> list[int]:
    """The token ids of a prompt: by the chat template of models that have one, unless ``raw``.

    Raises:
        InputError: the template refuses the messages, or no tokens come out.
    """
    from conflayers_cli.generation.prompts import as_messages, plain_text
    from conflayers_cli.models.tokenization import encode

    if raw or not loaded.has_chat_template:
        return encode(loaded, None, plain_text(prompt, system))
    return encode(loaded, as_messages(prompt, system), None)


def encode_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    options: PromptOptions,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
) -> list[GenerationRequest]:
    """Encode prompts and check that the model's context has room for them.

    Where a prompt leaves less room than ``max_new_tokens``, it gets what there is, and a note says
    so once; with ``truncate`` the prompt is shortened, and a note says by how much. Half of the
    context is the most that is kept free for the answer.

    Args:
        loaded: the model.
        prompts: texts or chats.
        options: what becomes of them, and how long answers may be.
        sampling: of the first prompt; each has a seed of its own, so that what is drawn for it
            doesn't depend on those before it. None: greedy.
        stop: strings that end the texts.

    Raises:
        InputError: a prompt can't be encoded or fills the context; it is named.
    """
    from conflayers_cli.models.tokenization import TooLongError

    context, wanted = loaded.context_length, options.max_new_tokens
    sampling = sampling or SamplingParams()
    requests = []
    for number, prompt in enumerate(prompts):
        which = f"prompt {prompt.id}" if len(prompts) > 1 else "the prompt"
        left_out = 0
        try:
            if options.truncate and context is not None:
                most = context - min(wanted, context // 2)
                tokens, left_out = _shortened(loaded, prompt, options.system, options.raw, most)
            else:
                tokens = encode_prompt(loaded, prompt, options.system, options.raw)
        except TooLongError as error:
            raise InputError(
                f"{which} {error.told} {_ADVICE}", names=("truncate shortens",)
            ) from error
        except InputError as error:
            raise InputError(f"{which}: {error}", names=error.names) from error
        room = sys.maxsize if context is None else context - len(tokens)
        if room < 1:
            raise InputError(
                f"{which} is too long: {len(tokens):,} tokens, and {loaded.name} takes "
                f"{context:,}, the answer included {_ADVICE}",
                names=("truncate shortens",),
            )
        if left_out:
            logger.warning(
                f"note: {left_out:,} tokens of {which} were left out, {len(tokens):,} are kept"
            )
        budget = min(wanted, room)
        requests.append(
            GenerationRequest(
                tokens,
                budget,
                replace(sampling, seed=sampling.seed + number),
                stop=tuple(stop),
                id=prompt.id,
                category=prompt.category,
                truncated=left_out,
            )
        )
    _note_reduced_budgets(loaded, [request.max_new_tokens for request in requests], wanted)
    return requests


def _shortened(
    loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool, most: int
) -> tuple[list[int], int]:
    """The tokens of a prompt, ``most`` of them at the most, and how many of its text's are not
    among them.
    """
    from conflayers_cli.generation.prompts import Message, Prompt, as_messages, plain_text
    from conflayers_cli.generation.truncation import fit, texts_of
    from conflayers_cli.models.tokenization import count_tokens, encode

    if raw or not loaded.has_chat_template:
        whole = Prompt(prompt.id, text=plain_text(prompt, system))
    else:
        chat = (Message(**message) for message in as_messages(prompt, system))
        whole = Prompt(prompt.id, messages=tuple(chat))

    def tokens_of(part: Prompt) -> list[int]:
        return encode(loaded, as_messages(part) if part.messages else None, part.text)

    fitted = fit(whole, tokens_of, most)
    if fitted.prompt == whole:
        return fitted.tokens, 0
    before, after = (
        sum(count_tokens(loaded.tokenizer, text) for text in texts_of(part))
        for part in (whole, fitted.prompt)
    )
    return fitted.tokens, max(before - after, 1)


def _note_reduced_budgets(loaded: LoadedModel, budgets: Sequence[int], wanted: int) -> None:
    cut = [budget for budget in budgets if budget < wanted]
    if not cut:
        return
    which = (
        f"{len(cut)} of {len(budgets)} prompts leave" if len(budgets) > 1 else "the prompt leaves"
    )
    logger.warning(
        f"note: {which} room for {min(cut):,} new tokens{' or more' if len(cut) > 1 else ''} "
        f"instead of {wanted:,} in the context of {loaded.name} ({loaded.context_length:,} tokens)"
    )
