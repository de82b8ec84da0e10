"""The table of families: its checks are real, and what the hard cases among them come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import EXACT, LACKING, Finding, look_at, main, markdown
from conflayers_cli.engine.decoder import Decoder


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which begin within the window and beyond it, and go beyond it."""
    monkeypatch.setattr(families, "NEW_TOKENS", 10)
    monkeypatch.setattr(families, "LENGTHS", (5, 20))


@pytest.mark.parametrize(
    "family",
    [
        "gemma4_text",  # head sizes that differ by layer
        "deepseek_v3",  # latent attention: values of another size than keys
        "gpt_bigcode",  # one key head for all
        "afmoe",  # takes a view of what attention gives
        "cohere2",  # windows, and layers that run attention and MLP side by side
    ],
)
def test_decoded_exactly(family: str) -> None:
    found = look_at(family)

    assert found.refused is None and found.untried is None
    assert set((found.checks or {}).values()) <= {EXACT, LACKING}
    assert (found.checks or {})["whole layers"] == EXACT


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n_text", "keys and values of layers before them"),
        ("qwen3_next", "linear_attention"),
        ("lfm2", "conv"),
        ("bloom", "attention interface"),
    ],
)
def test_refused_with_the_reason(family: str, reason: str) -> None:
    assert reason in (look_at(family).refused or "")


def test_a_family_whose_text_differs_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(decoder: Decoder, prompt: list[int]) -> list[int]:
        return [0] * families.NEW_TOKENS

    monkeypatch.setattr(families, "_generated", other)

    assert main(["--only", "llama"]) == 1
    assert "not exact: llama" in capsys.readouterr().err


def test_the_page(tmp_path: Path) -> None:
    page = tmp_path / "families.md"

    assert main(["--only", "llama", "bloom", "--table", str(page)]) == 0
    text = page.read_text()
    assert "## Decoded: 1" in text and "| llama | exact |" in text
    assert "| bloom | BloomForCausalLM" in text


def test_families_not_tried_are_named() -> None:
    findings = [Finding("llama", "L", checks={"plain": EXACT}), Finding("x", "", untried="sizes")]

    assert "Not tried: 1" in markdown(findings, "") and ": x." in markdown(findings, "")
