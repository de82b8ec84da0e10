"""The picture of a terminal: what a command prints there, as an SVG that fetches nothing."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.terminal_picture import CELL, main, picture

TEXT = "{http://www.w3.org/2000/svg}text"


def test_a_command_on_a_terminal(tmp_path: Path) -> None:
    code = "import sys; print('\\x1b[1mbold\\x1b[0m', sys.stdout.isatty());"
    code += "print('no', file=sys.stderr)"
    main([str(tmp_path / "a.svg"), "--typed", "say it", "--", sys.executable, "-c", code])
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    told = "".join(each.text or "" for each in ET.fromstring(drawn).iter(TEXT))
    assert "$\xa0say\xa0it" in told and "bold" in told and "True" in told
    assert "no\n" not in told
    assert re.findall(r"url\((?!#)|@import|@font-face|href", drawn) == []


def test_margins_are_places_and_not_spaces() -> None:
    texts = {
        each.text: each for each in ET.fromstring(picture(["   three", "none"], 20)).iter(TEXT)
    }
    assert float(texts["three"].get("x", "")) == pytest.approx(3 * CELL)
    assert float(texts["none"].get("x", "")) == 0


def test_a_command_that_fails_draws_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        main([str(tmp_path / "a.svg"), "--", sys.executable, "-c", "raise SystemExit(3)"])
    assert not (tmp_path / "a.svg").exists()
