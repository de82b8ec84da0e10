"""The sketch of a model's weights: the same for the same ones, and as far apart as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.weight_sketch import PROJECTIONS, _signs, sketch_weights
from conflayers_cli.profile.schema import WeightSketchSection
from tests import rounding, tiny
from tests.cli.conftest import byte_tokenizer

FAMILIES = ("llama", "gpt2", "gpt-neox", "mixtral", "gemma3")
FIRST = (0.1614, 0.08731, -0.08173, -0.1448)
"""Of the model that is filled with a fixed pattern, when sketches were first kept."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(tiny.CONFIGS["llama"]())


def taken(model: Any) -> WeightSketchSection:
    sketch = sketch_weights(model)
    assert sketch is not None
    return WeightSketchSection(**asdict(sketch))


def apart(one: Any, other: Any) -> float:
    distance = taken(one).distance(taken(other))
    assert distance is not None
    return distance


def test_signs_are_the_bits_of_splitmix64() -> None:
    """The generator's numbers from seed 0, as its authors publish them."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    for row, number in zip(_signs(3).tolist(), published, strict=True):
        assert row == [1.0 if number >> bit & 1 else -1.0 for bit in range(PROJECTIONS)]


def test_its_numbers_are_these(model: Any) -> None:
    """Sketches lie in files: a later version has to give the same ones."""

    def fill(weight: torch.Tensor) -> torch.Tensor:
        return (torch.arange(weight.numel()) * 37 % 101 - 50.0).reshape(weight.shape)

    sketch = sketch_weights(rounding.changed(model, fill))
    assert sketch is not None
    assert sketch.projections[:4] == FIRST


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_does_not_make_other_weights(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(tiny.CONFIGS[family]())
    narrow = copy.deepcopy(model).to(dtype)
    assert taken(model).rounding == taken(narrow).rounding == 0
    assert 0 < apart(model, narrow) < 0.0025
    assert not taken(narrow).differs(taken(model)) and not taken(model).differs(taken(narrow))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.005, 0.01, 0.03, 0.3])
def test_a_fine_tune_is_told_by_its_distance(family: str, share: float) -> None:
    model = tiny.build(tiny.CONFIGS[family]())
    other = rounding.changed(model, rounding.tuned(share))
    assert apart(model, other) == pytest.approx(rounding.relative_distance(model, other), rel=0.4)
    assert taken(model).differs(taken(other))


@pytest.mark.parametrize("share", [0.0001, 0.001])
def test_less_than_rounding_is_not_told(model: Any, share: float) -> None:
    assert not taken(model).differs(taken(rounding.changed(model, rounding.tuned(share))))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (rounding.q8_0, 0.0053),
        (rounding.int8_rows, 0.0055),
        (rounding.q6_k, 0.019),
        (rounding.q4_1, 0.078),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_few_bits_is_seen_and_forgiven(
    model: Any, change: rounding.Change, moved: float, dtype: torch.dtype
) -> None:
    rounded = rounding.changed(model, change).to(dtype)
    assert rounding.relative_distance(model, rounded) == pytest.approx(moved, rel=0.1)
    assert taken(rounded).rounding == pytest.approx(moved, rel=0.15)
    assert not taken(rounded).differs(taken(model)) and not taken(model).differs(taken(rounded))
    far = rounding.changed(model, rounding.tuned(4 * moved))
    assert taken(rounded).differs(taken(far)) and taken(far).differs(taken(rounded))


def test_what_was_trained_from_rounded_weights_is_told(model: Any) -> None:
    """It is nearer to them than what they were rounded from could be."""
    rounded = rounding.changed(model, rounding.q4_1)
    trained = rounding.changed(rounded, rounding.tuned(0.01))
    assert taken(trained).rounding == 0
    assert taken(trained).differs(taken(rounded)) and taken(rounded).differs(taken(trained))


def test_other_weights_of_the_same_sizes_are_far(model: Any) -> None:
    other = tiny.build(tiny.CONFIGS["llama"](), seed=1)
    assert 1 < apart(model, other) < 2


def test_a_file_shards_and_a_decoder_at_work_give_the_same(tmp_path: Path, model: Any) -> None:
    model = tiny.build(hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "vocab_size": 257}))
    sketch = sketch_weights(model)
    for name, size in (("one", "1GB"), ("shards", "50KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        byte_tokenizer(None).save_pretrained(tmp_path / name)
        loaded = load_model(str(tmp_path / name), LoadOptions(device="cpu", dtype="float32"))
        Decoder(loaded.model)  # which packs the weights
        assert loaded.sketch == sketch
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def _without_values(model: Any) -> Any:
    return model.to("meta")


def _zero(model: Any) -> Any:
    return rounding.changed(model, torch.zeros_like)


def _not_finite(model: Any) -> Any:
    return rounding.changed(model, lambda weight: weight * math.nan)


def _spread(model: Any) -> Any:
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


def _quantised(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "torchao"}
    return model


def _of_another_kind(model: Any) -> Any:
    class Rounded(torch.Tensor):
        pass

    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(
            layer.mlp.up_proj.weight.detach().as_subclass(Rounded), requires_grad=False
        )
    return model


@pytest.mark.parametrize(
    "change", [_without_values, _zero, _not_finite, _spread, _quantised, _of_another_kind]
)
def test_weights_that_are_not_plain_and_here_have_none(
    model: Any, change: Callable[[Any], Any]
) -> None:
    assert sketch_weights(change(copy.deepcopy(model))) is None


def test_sketches_of_other_lengths_are_not_compared() -> None:
    one, other = (WeightSketchSection(rounding=0.0, projections=(0.1,) * n) for n in (8, 16))
    assert one.distance(other) is None and not one.differs(other)
