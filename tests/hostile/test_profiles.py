"""Profiles that are broken or mean harm, by the command line: one line, code 2, no code run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.conftest import Refuse

ADDED: dict[str, tuple[str, str]] = {
    "a bomb of aliases": ("a: &a [x, x]\nb: &b [*a, *a]\n", "anchors and aliases"),
    "a number key and its text": ("1: a\n'1': b\n", "the key '1'"),
    "a truth key": ("yes: 1\n", "the key 'yes' should be a text"),
    "a date key": ("2020-01-01: 1\n", "the key '2020-01-01' should be a text"),
    "a null key": ("~: 1\n", "the key '~' should be a text"),
    "a complex key": ("? [a]\n: b\n", "a key should be a text"),
    "merge keys": ("<<: {a: 1}\n", "merge keys"),
    "another document": ("---\na: 1\n", "is not a valid profile"),
    "a custom tag": ("a: !foo 1\n", "could not determine a constructor for the tag '!foo'"),
    "a long tag": (f"a: !{'t' * 99_999} 1\n", "could not determine a constructor"),
    "a date that there can't be": ("a: 2020-99-99\n", "month must be in 1..12"),
    "a zone that there can't be": ("a: 2001-12-14 21:59:43 -99:99\n", "can't be read"),
    "a false timestamp": ("a: !!timestamp x\n", "can't be read"),
    "a false truth": ("a: !!bool x\n", "can't be read"),
    "false base64": ("a: !!binary é\n", "failed to convert base64"),
    "sexagesimals to infinity": (f"a: 1{':59' * 50_000}\n", "is no plain decimal number"),
    "sexagesimal figures": ("a: 1:30.5\n", "'1:30.5' is no plain decimal number"),
    "a number of many digits": (f"a: {'9' * 5000}\n", "can't be read"),
    "half a pair": ('source: "\\ud800"\n', "source: '\\ud800' should be a valid string"),
    "no character": ('a: "\\U7fffffff"\n', "can't be read"),
    "a control character": ("a: \x07\n", "a character that YAML does not allow"),
    "escapes": ('"\\e[31m": 1\n', "'\\x1b[31m': is no known key"),
    "nested lists": ("a: " + "[" * 50_000, "is nested too deeply"),
    "nested maps": ("a: " + "{a: " * 20_000, "is nested too deeply"),
    "a long key": (f"? {'k' * 50_000}\n: 1\n", "is no known key"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(9999)), "k0: is no known key"),
    "too large": ("#" * 200_000, "is too large, allowed are 200,000 bytes"),
}
LAYERS: dict[str, str] = {
    "[0]": "skip.attention.0: 0 is out of range",
    "[-1]": "skip.attention.0: -1 is out of range",
    "[4]": "skip.attention.0: 4 is out of range, allowed are 1–3",
    "[99999999999999999999999]": "99999999999999999999999 is out of range",
    f"[{'9' * 4300}]": f"skip.attention.0: {'9' * 59}… is out of range",
    "[2, 2]": "skip.attention.1: 2 is repeated",
    f"[{', '.join(['1'] * 9999)}]": "skip.attention.1: 1 is repeated",
    "[2.0]": "2.0 should be a valid integer",
    "['2']": "'2' should be a valid integer",
    "[.nan]": "nan should be a valid integer",
    "[.inf]": "inf should be a valid integer",
    "[true]": "true should be a valid integer",
    "[no]": "false should be a valid integer",
    "[0x2]": "'0x2' is no plain decimal number",
    "[0b10]": "'0b10' is no plain decimal number",
    "[02]": "'02' is no plain decimal number",
    "[2_]": "'2_' is no plain decimal number",
    "[1:02]": "'1:02' is no plain decimal number",
    "[2020-01-01]": "2020-01-01 should be a valid integer",
    "!!python/tuple [2]": "could not determine a constructor",
    "!!set {2}": "a set should be a list",
    "!!set [[2, 3]]": "expected a mapping node, but found sequence",
    "!!omap [a: 1]": "a list should be a valid integer",
    "{2: 3}": "the key '2' should be a text",
    "2": "skip.attention: 2 should be a list",
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_to_a_profile(
    refused: Refuse, profile: Path, tmp_path: Path, name: str
) -> None:
    added, expected = ADDED[name]
    path = tmp_path / "p.yaml"
    path.write_text(profile.read_text(encoding="utf-8") + added, encoding="utf-8")
    told = refused("generate", "Hello", "-p", path)
    assert told.startswith(str(path))
    assert expected in told


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers[:20])
def test_layers(refused: Refuse, profile: Path, tmp_path: Path, layers: str) -> None:
    path = tmp_path / "p.yaml"
    lines = profile.read_text(encoding="utf-8").splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("  attention: ["))
    lines[at] = f"  attention: {layers}"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert LAYERS[layers] in refused("generate", "Hello", "-p", path)


def test_no_tag_runs_code(refused: Refuse, profile: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "p.yaml", tmp_path / "trace"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"):
        text = profile.read_text(encoding="utf-8")
        path.write_text(f"{text}a: !!python/{tag} [{trace}]\n", encoding="utf-8")
        assert "could not determine a constructor" in refused("generate", "Hello", "-p", path)
        assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"null", b"- a", b"x", b"...", b"\x00\x01", b"\xff\xfe"])
def test_what_is_no_profile(refused: Refuse, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    assert refused("generate", "Hello", "-p", path).startswith(str(path))


def test_devices(refused: Refuse) -> None:
    assert "/dev/zero" in refused("generate", "Hello", "-p", "/dev/zero")
    assert "holds null" in refused("generate", "Hello", "-p", "/dev/null")
