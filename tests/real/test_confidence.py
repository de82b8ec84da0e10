"""ConfLayers' confidence on the real model, against the worked example."""

from pathlib import Path

import numpy as np
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.search.strategies.layer_confidence import measure_confidence, select_layers
from tests.search.strategies.test_layer_confidence import EXAMPLE


def test_confidence_equals_the_worked_example(smollm2: LoadedModel) -> None:
    decoder = Decoder(smollm2.model)
    tokens = EXAMPLE["token_ids"]
    cache = decoder.new_cache(len(tokens))
    confidence = measure_confidence(decoder, cache, tokens, len(tokens))
    np.testing.assert_allclose(confidence.attention, EXAMPLE["attention_confidence"], atol=1e-3)
    np.testing.assert_allclose(confidence.mlp, EXAMPLE["mlp_confidence"], atol=1e-3)
    for lam, layers in EXAMPLE["selected_by_lambda"].items():
        assert list(select_layers(confidence.total, float(lam), 30).layers) == layers


def test_bfloat16_logits_of_a_token_do_not_depend_on_the_others(real_cache: Path) -> None:
    decoder = Decoder(load_model("smollm2", LoadOptions(device="cpu", dtype="bfloat16")).model)
    tokens = torch.tensor([EXAMPLE["token_ids"][:64]])
    cache = decoder.new_cache(64)
    decoder.prefill(tokens[:, :40], cache)
    alone = [
        decoder.forward(tokens[:, i : i + 1], torch.tensor([[i]]), cache)[0, 0]
        for i in range(40, 56)
    ]
    for width in (2, 3, 4, 8, 16):
        at = torch.arange(40, 40 + width)[None]
        together = decoder.forward(tokens[:, 40 : 40 + width], at, cache)[0]
        assert all(torch.equal(one, row) for one, row in zip(alone, together, strict=False)), width
