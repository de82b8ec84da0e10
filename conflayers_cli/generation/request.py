"""A generation request: a prompt, how tokens are chosen, and what ends the text."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.sampling_params import NO_ADJUSTMENTS, LogitAdjustments, SamplingParams
from conflayers_cli.utils.distributed import broadcast_rank0

if TYPE_CHECKING:
    from conflayers_cli.spec_decode.draft_store import DraftStore

SEED_BITS = 31
"""Of seeds that are drawn: short enough to be typed."""


def with_seed(sampling: SamplingParams) -> SamplingParams:
    """These, with a seed drawn by the system where tokens are sampled and none is given."""
    if sampling.greedy or sampling.seed is not None:
        return sampling
    return replace(sampling, seed=broadcast_rank0(secrets.randbits(SEED_BITS)))


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued.

    Attributes:
        prompt: token ids, at least one; kept as a tuple.
        max_new_tokens: at least one.
        sampling: how tokens are chosen; where they are sampled and no seed is given, one is drawn.
        stop: strings that end the text and are not part of it.
        on_token: called with every new token in order; True ends the text with it.
        id: the prompt's name in its file.
        category: what kind of prompt it is, if the file says so.
        truncated: tokens left out of the prompt so that it fits.
        continues: whether prompt and output are one text, without a chat template between.
        processors: transformers' logits processors that the model's settings ask for, of this text.
        text: a `ProcessedText`, for one decoding, with a program's processors and stopping criteria
            in place of ``processors``.
        answer: which of several answers to the same prompt it is: each has random numbers of its
            own.
        adjustments: what is added to the logits before tokens are chosen.
        prediction: tokens that the output may hold, from which n-grams draft, too.
        logprobs: log-probabilities of the tokens, and of so many of the likeliest beside them;
            None: none.
        owner: requests of the same owner may share what was read of their prompts.
        store: of earlier texts, from which n-grams draft; the text is added when it ends.

    Raises:
        InputError: no prompt, no budget, or an empty stop string.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    on_token: Callable[[int], bool] | None = field(default=None, compare=False)
    id: str = ""
    category: str | None = None
    truncated: int = 0
    continues: bool = False
    processors: tuple[Any, ...] = field(default=(), compare=False)
    text: Any = field(default=None, compare=False)
    answer: int = 0
    adjustments: LogitAdjustments = NO_ADJUSTMENTS
    prediction: tuple[int, ...] = ()
    logprobs: int | None = None
    owner: str = ""
    store: DraftStore | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "sampling", with_seed(self.sampling))
        if not self.prompt:
            raise InputError("the prompt has no tokens")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens}: at least 1 is needed")
        if "" in self.stop:
            raise InputError("stop: an empty text would end every answer at once")

    @property
    def length(self) -> int:
        """The most tokens of prompt and output."""
        return len(self.prompt) + self.max_new_tokens
