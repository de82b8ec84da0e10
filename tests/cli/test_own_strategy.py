"""``--strategy FILE.py:CLASS``: the worked example of the docs, and files that hold no strategy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.strategies import custom
from tests.cli.conftest import Run, write_prompts

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "every_other.py"
QUICK = ("-n", 32, "--refine-limit", 20, "--dtype", "float32")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(5)))


def test_the_example_of_the_docs_finds_a_plan(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK)
    result = run(*arguments, "--strategy", "every_other.py:EveryOther", "--no-refine", "--json")
    assert result.code == 0, result.err
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.found_by is not None
    assert profile.found_by.strategy == "every-other"
    assert profile.found_by.settings["strides"] == "2 3 4"
    assert profile.measured is not None and profile.measured.iterations == 3
    candidate = result.document["candidate"]
    layers = [set(range(1, 4, stride)) for stride in (2, 3, 4)]
    assert set(candidate["attention"]) in layers
    assert candidate["attention"] == candidate["mlp"]
    assert not candidate["refined"]
    generated = run("generate", "Hello", "-p", "p.yaml", "-n", 5)
    assert generated.code == 0, generated.err


def test_a_search_is_not_gone_on_with_where_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    shutil.copy(EXAMPLE, path)
    before = custom.hash_strategy(f"{path}:EveryOther")
    assert custom.hash_strategy(f"{EXAMPLE}:EveryOther") == before
    path.write_text(path.read_text().replace("(2, 3, 4)", "(2, 3)"))
    assert custom.hash_strategy(f"{path}:EveryOther") != before


HEAD = "from dataclasses import dataclass, field\nfrom typing import Any\n"
WHOLE = """
@dataclass
class Mine:
    setting = None
    {more}
    name = {name!r}
    def {method}(self, task): ...
"""


def written(name: str = "mine", method: str = "search", more: str = "") -> str:
    return HEAD + WHOLE.format(name=name, method=method, more=more)


@pytest.mark.parametrize(
    ("text", "named", "told"),
    [
        (None, "mine.py:Mine", "mine.py: No such file"),
        ("", "mine.py", "which class? give FILE.py:CLASS"),
        ("", "mine.py:", "which class? give FILE.py:CLASS"),
        ("", "mine.py:a-b", "which class? give FILE.py:CLASS"),
        ("", "mine.py:Mine", "there is no class Mine in mine.py"),
        (written(), "mine.py:Mien", "did you mean Mine?"),
        ("import nothing_like_it", "mine.py:Mine", "ModuleNotFoundError: No module named"),
        ("1 +", "mine.py:Mine", "SyntaxError"),
        ("class Mine: ...", "mine.py:Mine", "has to be a dataclass"),
        (HEAD + "@dataclass\nclass Mine:\n    a: int", "mine.py:Mine", "TypeError"),
        (HEAD + "@dataclass\nclass Mine: ...", "mine.py:Mine", "no attribute 'name'"),
        (written(method="look"), "mine.py:Mine", "has no method search(task)"),
        (written(name="greedy"), "mine.py:Mine", "its name is 'greedy'"),
        (written(name=""), "mine.py:Mine", "its name is ''"),
        (
            written(more="a: Any = field(default_factory=dict)"),
            "mine.py:Mine",
            "its setting a is of the kind dict",
        ),
    ],
)
def test_files_that_hold_no_strategy_are_refused(
    run: Run, model: Path, tmp_path: Path, text: str | None, named: str, told: str
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    result = run("calibrate", "-m", model, "-o", "p.yaml", "--strategy", named)
    assert result.code == 2
    assert told in result.err
    assert result.err.strip().splitlines()[-1].startswith("conflayers: error")
    assert not list(tmp_path.glob("p.*"))


def test_options_of_other_strategies_are_refused(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("calibrate", "-m", model, "--strategy", f"{EXAMPLE}:EveryOther", "--patience", 3)
    assert result.code == 2
    assert "--patience goes with --strategy conflayers" in result.err
