"""What ``calibrate`` writes: a sketch of the weights, and tensors that belong to the profile."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from conflayers_cli.profile.schema import Profile
from conflayers_cli.profile.tensors import read_tensors
from tests.cli.conftest import Run, write_prompts

SEARCH = ("--search-interval", 4, "--max-iterations", 3)
QUICK = ("-n", 24, "--refine-limit", 10, "--dtype", "float32", "--device", "cpu")


@pytest.mark.parametrize(
    ("strategy", "drawn"),
    [
        (("conflayers", *SEARCH), ("confidence of proposal", "expected speed-up")),
        (("greedy",), ("agreement with a sub-layer alone left out", "agreement  ")),
        (("clasp",), ("agreement  ", "expected speed-up")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_every_strategy_leaves_its_course_beside_the_profile(
    run: Run, model: Path, tmp_path: Path, strategy: tuple[object, ...], drawn: tuple[str, ...]
) -> None:
    prompts = write_prompts(
        tmp_path / "prompts.jsonl", *(f"Say a word about {i}." for i in range(5))
    )
    arguments = ("-m", model, "--data", prompts, "-o", "p.yaml", "--strategy", *strategy, *QUICK)
    result = run("calibrate", *arguments, "--json")
    assert result.code == 0, result.err
    trials = result.document["trials"]
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.model.sketch is not None and profile.tensors_sha256 is not None
    tensors = read_tensors(tmp_path / "p.yaml", profile)
    assert len(trials) == len(tensors["trial_speedup"]) > 0
    for row, trial in zip(tensors["trial_attention"], trials, strict=True):
        assert [int(i) for i in row.nonzero()[0]] == trial["attention"]
    assert tensors["trial_accepted"].tolist() == [trial["accepted"] for trial in trials]
    assert load_file(tmp_path / "p.safetensors").keys() == tensors.keys()
    result = run("profile", "validate", "p.yaml", "--model", model, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    plotted = run("profile", "plot", "p.yaml").out
    assert all(part in plotted for part in drawn)


def test_a_plan_by_rule_has_nothing_beside_it(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("-m", model, "-o", "p.yaml", "--strategy", "unified", "--target-speedup", 1.5)
    result = run("calibrate", *arguments, "--device", "cpu")
    assert result.code == 0, result.err
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.tensors is None and profile.tensors_sha256 is None
    assert profile.model.sketch is not None
    assert not list(tmp_path.glob("*.safetensors"))
