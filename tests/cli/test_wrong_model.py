"""Published profiles on the command line: whose model it is, and whose it isn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from tests.cli.conftest import Run, save_profile

PROFILES = Path(__file__).parents[2] / "profiles"
FAST = ("-n", "4", "--device", "cpu", "--dtype", "float32")


@pytest.mark.parametrize("name", ["llama-3-8b-gsm8k", "llama-2-70b-cnndm"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
def test_a_published_profile_on_another_model_is_refused(
    run: Run, model: Path, name: str, force: list[str]
) -> None:
    path = PROFILES / f"{name}.yaml"
    theirs = Profile.load(path).model
    result = run("generate", "x", "-m", model, "-p", path, *FAST, *force)
    assert result.code == 2
    assert result.out == ""
    [told] = result.err.splitlines()
    assert told.endswith(
        f"was made for another model than {model}: depth 5 here, {theirs.depth} in the profile; "
        f"hidden size 32 here, {theirs.hidden_size} in the profile"
    )
    assert str(path) in told


def test_a_profile_without_a_hash_takes_any_model_of_its_sizes(
    run: Run, model: Path, tmp_path: Path
) -> None:
    plain = run("generate", "x", "-m", model, *FAST, "--json").document
    path = save_profile(tmp_path / "p.yaml", model, config_hash=None)
    assert "config_hash" not in path.read_text(encoding="utf-8")
    result = run("generate", "x", "-m", model, "-p", path, *FAST, "--json")
    assert result.code == 0
    assert "warning" not in result.err
    assert result.document["token_ids"] == plain["token_ids"]
