"""Every snippet of ``docs/python.md`` is run, in order, on tiny models under the names it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.kernels.packed_linear import MergedLinearPart
from conflayers_cli.models import source
from tests.cli.conftest import save_model, save_profile

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the models and profiles of the page, at work in it."""
    deep = save_model(tmp_path / "smollm2-deep")
    own = save_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    save_profile(tmp_path / "deep.yaml", deep)
    save_profile(tmp_path / "summ.yaml", own)
    monkeypatch.setattr(source, "BUILTIN", {})  # the folder has the name then
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, Any] = {}
    printed = []
    for number, snippet in enumerate(SNIPPETS, 1):
        exec(compile(snippet, f"{PAGE.name}, snippet {number}", "exec"), known)
        printed.append(capsys.readouterr().out)
        assert printed[-1] or "print(" not in snippet
    assert len(printed) == 10
    assert known["answer"].stats.accepted > 0
    assert known["pieces"].answer.text in printed[4]
    assert known["tokenizer"].decode(known["output"][0]) in printed[5]
    assert not any(isinstance(each, MergedLinearPart) for each in known["own"].modules())
    said = re.search(r"print\(error\)  # (.*)", SNIPPETS[-1])
    assert said
    assert printed[-1] == f"{said[1]}\n"
