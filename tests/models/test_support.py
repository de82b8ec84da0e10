"""Models that can't be decoded exactly are refused, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.models.support import find_layers
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def bloom() -> Any:
    config = hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=3, n_head=4)
    return hf.BloomForCausalLM(config)


def convolutional() -> Any:
    config = hf.Lfm2Config(
        **SIZES,
        intermediate_size=64,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    return hf.Lfm2ForCausalLM(config)


def encoder_decoder() -> Any:
    config = hf.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (bloom, "BloomForCausalLM does not use transformers' attention interface"),
        (convolutional, "layers of the kind conv, whose state can't be rolled back"),
        (encoder_decoder, "encoder-decoder"),
    ],
)
def test_refused_by_kind(build: Any, reason: str) -> None:
    model = build().eval()
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=reason):
        Decoder(model)
    assert model.config._attn_implementation == before


class _OwnPositions(hf.LlamaForCausalLM):
    """Ignores the positions it is given, as if it counted them itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return super().forward(*args, **kwargs)


class _OwnMask(hf.LlamaForCausalLM):
    """Wants its mask in a form of its own."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("masks have two dimensions here")
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_OwnPositions, "does not give its own logits"),
        (_OwnMask, "does not run on this engine's cache and masks: masks have two dimensions"),
    ],
)
def test_refused_by_the_self_check(kind: type, reason: str) -> None:
    model = kind(tiny.CONFIGS["llama"]()).eval()
    tiny.draw_weights(model, 0)
    with pytest.raises(InputError, match=reason):
        Decoder(model)


def test_no_list_of_layers() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    model.config.num_hidden_layers = 17
    with pytest.raises(InputError, match="no list of 17 decoder layers found in LlamaForCausalLM"):
        find_layers(model)
