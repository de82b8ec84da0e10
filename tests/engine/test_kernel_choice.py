"""Kernels are taken where they give the modules' logits; why others are not is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conflayers_cli.engine import kernel_choice
from conflayers_cli.engine.attach import Attachment, attach
from conflayers_cli.engine.kernel_choice import (
    choose_forward,
    choose_kernels,
    gives_modules_logits,
    pack_weights,
)
from conflayers_cli.kernels.fused_forward import FusedForward
from conflayers_cli.kernels.kv_cache import KV_BLOCK
from conflayers_cli.kernels.packed_linear import PackedWeight, Packing
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native")


@pytest.fixture
def attached() -> Attachment:
    return attach(tiny.build(tiny.CONFIGS["llama"]()), KV_BLOCK)


def test_a_known_family_is_packed_and_fused(attached: Attachment) -> None:
    kernels = choose_kernels(attached)
    assert type(kernels.fused) is FusedForward
    assert not kernels.flash  # there is no GPU
    assert kernels.disabled_paths == ()
    assert (kernels.packing is None) == (Packing.existing(attached.model) is None)
    assert attached.passes.fused is None  # using them is the caller's matter


def test_one_that_is_not_known_runs_its_modules() -> None:
    other = attach(tiny.build(tiny.CONFIGS["gpt2"]()), KV_BLOCK)
    assert choose_forward(other) == (None, False, ())


def test_a_forward_that_errs_is_disabled(
    attached: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(FusedForward, "__call__", fail)
    assert choose_forward(attached) == (None, False, ("FusedForward: no such kernel",))
    assert attached.passes.fused is None


def test_a_forward_with_other_logits_is_not_used(
    attached: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, _, _ = choose_forward(attached)
    assert fused is not None and gives_modules_logits(attached, fused, flash=False)
    monkeypatch.setattr(kernel_choice, "logits_match", lambda model, one, other: False)
    assert choose_forward(attached) == (None, False, ())


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_packed_weights_that_are_wrong_are_taken_back(
    attached: Attachment, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(self: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no such product")
        return torch.ones((*rows.shape[:-1], sum(self.sizes)), dtype=rows.dtype)

    if pack_weights(attached) is None:
        pytest.skip("weights can't be packed here")
    monkeypatch.setattr(PackedWeight, "__call__", product)
    assert pack_weights(attached) is None
    assert Packing.existing(attached.model) is None
    torch.testing.assert_close(attached.sample_logits(), attached.expected, rtol=1e-4, atol=1e-4)
