"""A model in memory, with its tokenizer and properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conflayers_cli.errors import InputError
from conflayers_cli.models.device import describe_spread, input_device
from conflayers_cli.models.peft_modules import unwrap_peft
from conflayers_cli.models.support import context_length
from conflayers_cli.models.weight_sketch import WeightSketch, sketch_weights

if TYPE_CHECKING:
    from conflayers_cli.models.generation_settings import GenerationSettings


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model on its device, in evaluation mode.

    Attributes:
        name: in profiles: the built-in name, the Hub id, or the path as it was given.
        device: where tokens go; ``spread`` says how a model is spread over several devices.
        end_tokens: all ids that end a text.
        context_length: None where the config names none.
        sketch: of its weights, None where this process does not hold all of them.
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
    sketch: WeightSketch | None = None

    @property
    def settings(self) -> GenerationSettings:
        """What the model's generation config says of its texts."""
        from conflayers_cli.models.generation_settings import GenerationSettings

        return GenerationSettings(getattr(self.model, "generation_config", None), self.end_tokens)

    @property
    def device_label(self) -> str:
        return f"{self.device}, {self.spread}" if self.spread else str(self.device)


def wrap_model(model: Any, tokenizer: Any, name: str, dtype_reason: str) -> LoadedModel:
    """Wrap a transformers causal language model on its device, or a `PeftModel` of one.

    ``tokenizer`` may be None where no text is read or written.
    """
    from conflayers_cli.models.generation_settings import GenerationSettings, check_settings

    model = unwrap_peft(model)
    ends = end_tokens(model, tokenizer, name)
    settings = GenerationSettings(getattr(model, "generation_config", None), ends)
    check_settings(settings, model.config.get_text_config().vocab_size, name)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        device=input_device(model),
        dtype=model.dtype,
        dtype_reason=dtype_reason,
        end_tokens=ends,
        context_length=context_length(model.config.get_text_config()),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        spread=describe_spread(model),
        sketch=sketch_weights(model),  # now: a decoder may rearrange the weights
    )


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> frozenset[int]:
    """All end tokens of the generation config, the config and the tokenizer."""
    text = model.config.get_text_config()
    ids: list[Any] = []
    for holder in (model.generation_config, model.config, text, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        own = value if isinstance(value, list | tuple) else [value]
        if not all(end is None or isinstance(end, int) for end in own):
            raise InputError(
                f"{source} is broken: its end token (eos_token_id) is {str(value)[:60]!r}"
            )
        ids.extend(own)
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < text.vocab_size)
