"""``conflayers calibrate --strategy``: each method from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.strategies.registry import STRATEGIES
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import Run, write_prompts

QUICK = ("-n", 32, "--refine-limit", 20, "--dtype", "float32")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(5)))


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("local", ()),
        ("swift", ("--max-iterations", 5)),
        ("knapsack", ()),
        ("clasp", ()),
        ("greedy", ()),
        ("unified", ("--target-speedup", "1.5")),
    ],
)
def test_every_strategy_writes_a_profile_that_generate_takes(
    run: Run, model: Path, prompts: Path, tmp_path: Path, strategy: str, more: tuple[object, ...]
) -> None:
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK)
    result = run(*arguments, "--strategy", strategy, *more, "--json")
    assert result.code == 0, result.err
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.found_by is not None
    assert profile.found_by.strategy == strategy
    document = result.document
    found = bool(document["candidate"]["attention"] or document["candidate"]["mlp"])
    assert profile.found_by.refined is (found and strategy != "unified")
    assert document["candidate"]["strategy"] == strategy
    assert document["candidate"]["draft_passes"] > 0
    assert document["strategies"] == []
    generated = run("generate", "Hello", "-p", "p.yaml", "-n", 5)
    assert generated.code == 0, generated.err


def test_auto_reports_every_strategy(run: Run, model: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK)
    result = run(*arguments, "--strategy", "auto", "--budget", 60)
    assert result.code == 0, result.err
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.found_by is not None
    assert profile.found_by.strategy in STRATEGIES
    assert profile.found_by.settings["budget"] == 60
    for name in ("unified", "conflayers", "knapsack", "greedy"):
        assert name in result.out
    assert "full passes" in result.out and "→" in result.out


def test_unified_needs_no_data_and_decodes_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    result = run(
        "calibrate", "-m", model, "--strategy", "unified", "--target-speedup", 2, "-o", "u.yaml"
    )
    assert result.code == 0, result.err
    assert "not measured" in result.out
    profile = Profile.load(tmp_path / "u.yaml")
    assert profile.plan == SkipPlan.unified(5, 2.0)
    assert profile.measured is not None and profile.measured.measured_speedup is None
    assert profile.found_by is not None and profile.found_by.prompts.count == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--strategy", "knapsak"), "did you mean knapsack?"),
        (("--strategy", "unified"), "needs --target-speedup"),
        (("--strategy", "unified", "--target-speedup", "0.5"), "--target-speedup 0.5"),
        (("--strategy", "unified", "--target-speedup", "nan"), "--target-speedup nan"),
        (("--target-speedup", "2"), "--target-speedup goes with --strategy unified"),
        (("--strategy", "greedy", "--skip-ratio", "0.3"), "conflayers or swift"),
        (("--strategy", "knapsack", "--skip-ratio", "0.3"), "conflayers or swift"),
        (("--strategy", "auto", "--budget", "0"), "--budget"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    run: Run, model: Path, arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    result = run("calibrate", "-m", model, *arguments)
    assert result.code == 2
    assert told in result.err and result.err.strip().splitlines()[-1].startswith(
        "conflayers: error"
    )
    assert not list(tmp_path.glob("*.yaml"))
