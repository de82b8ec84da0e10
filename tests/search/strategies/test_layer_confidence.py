"""The adaptive threshold against a worked example, and its edge cases."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.search.strategies.layer_confidence import certainty, select_layers

EXAMPLE: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "confidence_smollm2.json").read_text()
)


@pytest.mark.parametrize("lam", list(EXAMPLE["selected_by_lambda"]))
def test_selects_the_worked_example_layers_at_every_lambda(lam: str) -> None:
    selection = select_layers(np.array(EXAMPLE["total"]), float(lam), 30)
    assert list(selection.layers) == EXAMPLE["selected_by_lambda"][lam]


def test_intermediate_values_of_the_worked_example() -> None:
    selection = select_layers(np.array(EXAMPLE["total"]), 0.0, 30)
    np.testing.assert_allclose(selection.z, EXAMPLE["z_float16"], atol=1e-2)
    np.testing.assert_allclose(selection.gradient, EXAMPLE["gradient_rescaled_float16"], atol=1e-2)
    assert selection.window.tolist() == EXAMPLE["window"]
    np.testing.assert_allclose(selection.threshold, EXAMPLE["threshold_float16"], atol=1e-2)


def test_certainty_is_zero_for_a_flat_output_and_one_for_a_sharp_one() -> None:
    assert certainty(torch.zeros(1, 3, 64)) == pytest.approx(0.0, abs=1e-6)
    sharp = torch.zeros(1, 3, 64)
    sharp[..., 5] = 1e4
    assert certainty(sharp) == pytest.approx(1.0, abs=1e-6)


def test_certainty_averages_the_entropy_over_tokens() -> None:
    output = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    entropy = (math.log(2) + (0.75 * math.log(4 / 3) + 0.25 * math.log(4))) / 2
    assert certainty(output) == pytest.approx(1 - entropy / math.log(2), abs=1e-6)


def test_equal_confidences_select_nothing() -> None:
    assert select_layers(np.full(10, 0.3), 0.0, 12).layers == ()


def test_qwen_caps_the_window() -> None:
    # a straight start makes the second gradient's first values equal, hence a large amplitude
    confidence = np.concatenate([np.arange(6.0), [2.0, 9.0, 1.0, 4.0, 2.0, 7.0]])
    free = select_layers(confidence, 0.0, 14)
    capped = select_layers(confidence, 0.0, 14, qwen=True)
    assert capped.window.max() < free.window.max()


def test_too_shallow_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="four layers"):
        select_layers(np.array([0.5]), 0.0, 3)


@given(
    st.lists(st.floats(0, 2, allow_nan=False), min_size=2, max_size=60),
    st.floats(-2, 2),
    st.floats(0.1, 1.5),
)
def test_larger_lambda_never_selects_more(values: list[float], lam: float, more: float) -> None:
    confidence = np.array(values)
    few = select_layers(confidence, lam + more, len(values) + 2)
    many = select_layers(confidence, lam, len(values) + 2)
    assert set(few.layers) <= set(many.layers)
    assert all(1 <= layer <= len(values) for layer in many.layers)
