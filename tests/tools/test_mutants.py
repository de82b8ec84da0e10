"""The mutants themselves: that they are still of this code, and what is made of a run of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conflayers_cli.errors import ConfLayersError
from tools import mutants as script
from tools.mutants import ROOT, Mutant, Verdict, known_mutants, main

ALL = known_mutants()
each_mutant = pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)


def test_there_are_many_and_their_names_differ() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 40
    assert len({mutant.file for mutant in ALL}) >= 10


@each_mutant
def test_its_text_is_there_once_and_what_comes_of_it_compiles(mutant: Mutant) -> None:
    before = (ROOT / mutant.file).read_text(encoding="utf-8")
    after = mutant.mutated(ROOT)
    assert before != after
    assert before.count(mutant.old) == 1
    compile(after, mutant.file, "exec")


@each_mutant
def test_its_tests_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, *names = test.split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"def {name}(" in text or f"class {name}" in text for name in names)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one in the place of this: a module, its tests, and a list of mutants."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef unused():\n    return 1\n"
    )
    (root / "tests" / "conftest.py").write_text(
        "from hypothesis import settings\n\nsettings.register_profile('unshrunk')\n"
    )
    (root / "tests" / "test_sums.py").write_text(
        "import sums\n\n\ndef test_of_nothing():\n    assert sums.add(0, 0) == 0\n\n\n"
        "def test_of_one():\n    assert sums.add(1, 1) == 2\n"
    )
    monkeypatch.setattr(script, "ROOT", root)
    monkeypatch.setattr(script, "LIST", tmp_path / "mutants.toml")
    listed(
        tmp_path,
        ("difference", "a + b", "a - b"),
        ("product", "a + b", "a * b"),
        ("unseen", "return 1", "return 2"),
    )
    return root


def listed(folder: Path, *entries: tuple[str, str, str], tests: str = "tests/test_sums.py") -> None:
    text = ""
    for name, old, new in entries:
        values = {"name": name, "file": "sums.py", "old": old, "new": new}
        text += "[[mutants]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
        text += f"tests = [{json.dumps(tests)}]\n"
    (folder / "mutants.toml").write_text(text)


Captured = pytest.CaptureFixture[str]


def test_a_fault_that_no_test_finds_survives(
    repository: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "result.json"
    before = (repository / "sums.py").read_text()
    assert main(["--only", "difference", "unseen", "--output", str(output)]) == 3
    assert (repository / "sums.py").read_text() == before  # it is broken in a copy
    found = json.loads(output.read_text())["mutants"]
    assert [(each["name"], each["status"], each["test"]) for each in found] == [
        ("difference", "killed", "tests/test_sums.py::test_of_one"),
        ("unseen", "survived", None),
    ]
    out, err = capsys.readouterr()
    assert "difference" in out and "tests/test_sums.py::test_of_one" in out
    assert err.splitlines()[-1] == "mutants: 1 of 2 survived: unseen"


def test_where_all_are_found_it_ends_well(repository: Path) -> None:
    assert main(["--only", "difference"]) == 0


@pytest.mark.parametrize("waits", [True, False])
def test_a_fault_that_takes_for_ever_is_told_apart(
    repository: Path, capsys: Captured, waits: bool
) -> None:
    """By the processor's time, or by the clock where it takes none."""
    (repository / "tests" / "conftest.py").write_text(
        "import time\n\nwhile True:\n" + ("    time.sleep(1)\n" if waits else "    pass\n")
    )
    found = script.run_tests(repository, ["tests/test_sums.py"], 1)
    assert (found.status, found.test) == ("timeout", None)
    script.report([(ALL[0], found)])  # killed, as it were
    assert "timeout" in capsys.readouterr().out


def test_tests_that_fail_anyway_say_nothing(repository: Path, capsys: Captured) -> None:
    (repository / "tests" / "test_sums.py").write_text("def test_one():\n    assert False\n")
    assert main(["--only", "difference"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("mutants: without any fault the tests fail: tests/test_sums.py::test_one")


@pytest.mark.parametrize("old", ["a * b", "a"])
def test_a_text_that_is_not_there_once_is_told(
    repository: Path, tmp_path: Path, capsys: Captured, old: str
) -> None:
    listed(tmp_path, ("gone", old, "b"))
    assert main([]) == 1
    err = capsys.readouterr().err
    assert f"occurs {0 if old == 'a * b' else 3} times" in err and "sums.py" in err


def test_tests_that_cannot_be_run_kill_nothing(repository: Path, capsys: Captured) -> None:
    with pytest.raises(ConfLayersError, match="ended with 4"):
        script.run_tests(repository, ["tests/test_none.py"], 60)
    (repository / "tests" / "test_sums.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(ConfLayersError, match="ended with 2"):
        script.run_tests(repository, ["tests/test_sums.py"], 60)


def test_wrong_usage(repository: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["--only", "sum"]) == 2
    assert capsys.readouterr().err == "mutants: no mutant “sum”: --list shows them\n"
    assert main(["--output", str(tmp_path / "none" / "file.json")]) == 2


def test_the_list_runs_nothing(
    repository: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> Verdict:
        raise AssertionError

    monkeypatch.setattr(script, "run_tests", refuse)
    assert main(["--list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:4]] == ["difference", "product", "unseen"]
