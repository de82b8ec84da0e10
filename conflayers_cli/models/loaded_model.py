"""A model in memory, with what there is to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conflayers_cli.models.device import device_of, spread_of
from conflayers_cli.models.peft_modules import unwrapped
from conflayers_cli.models.tokenizer import end_tokens
from conflayers_cli.models.weight_sketch import WeightFingerprint, sketch_of


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model on its device, and how to talk to it.

    ``name`` is what a profile stores: the built-in name, the Hub id, or the path as it was given.
    ``model`` is in evaluation mode and needs no gradients. ``end_tokens`` are all ids that end a
    text. ``context_length`` is None where the model names none. ``spread`` says how the model is
    spread over several devices, None where it is on one: then ``device`` is where tokens go.
    ``sketch`` tells its weights from others, None where they are not all plain and here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    end_tokens: frozenset[int]
    context_length: int | None
    has_chat_template: bool
    spread: str | None = None
    sketch: WeightFingerprint | None = None

    @property
    def place(self) -> str:
        """Where the model is, in words."""
        return f"{self.device}, {self.spread}" if self.spread else str(self.device)


def as_loaded(model: Any, tokenizer: Any, name: str, dtype_reason: str) -> LoadedModel:
    """A model that is in memory already, with what there is to know about it.

    Args:
        model: a transformers causal language model on its device, or a `PeftModel` of one.
        tokenizer: its tokenizer; None where nobody is going to read or write text.
        name: what a profile calls it.
        dtype_reason: why it runs in its dtype.
    """
    model = unwrapped(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        device=device_of(model),
        dtype=model.dtype,
        dtype_reason=dtype_reason,
        end_tokens=end_tokens(model, tokenizer, name),
        context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        spread=spread_of(model),
        sketch=sketch_of(model),  # now: a decoder may rearrange the weights
    )
