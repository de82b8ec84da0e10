"""The measurement behind the choice of a dtype."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig

from conflayers_cli.kernels import native_speed
from conflayers_cli.kernels.native_speed import native_bfloat16_ratio
from tests.kernels import native

SMALL = LlamaConfig(hidden_size=64, intermediate_size=128)


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_ratio_for_families_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_speed, "_WORKING_SET", 1 << 18)
    ratio = native_bfloat16_ratio(SMALL)
    assert ratio is not None and 0 < ratio < float("inf")
    assert native_bfloat16_ratio(GPT2Config()) is None


def test_none_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_speed, "unavailable_reason", lambda: "not built")
    assert native_bfloat16_ratio(SMALL) is None
