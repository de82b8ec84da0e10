"""Older forms of a profile: each is read through its migration, and newer ones are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from conflayers_cli.errors import InputError
from conflayers_cli.profile.migrations import (
    MIGRATIONS,
    SCHEMA_VERSION,
    from_flat,
    read_version,
    to_newest,
)
from conflayers_cli.profile.schema import DraftSettings, Profile, SkipSection

OLD = Path(__file__).parents[1] / "data" / "profiles" / "version-0.yaml"
LEAST: dict[str, Any] = {
    "version": 0,
    "model": "m",
    "num_layers": 6,
    "skip_attn_layers": [1, 4],
    "skip_mlp_layers": [],
}


def test_there_is_a_migration_for_every_older_version() -> None:
    assert sorted(MIGRATIONS) == list(range(SCHEMA_VERSION))


def test_version_0_is_read_as_what_it_meant() -> None:
    profile, version = Profile.load_versioned(OLD)
    assert version == 0 and profile.schema_version == SCHEMA_VERSION
    assert profile.skip == SkipSection(attention=(2, 4, 6, 11, 34), mlp=(2, 4, 6, 14))
    assert profile.draft == DraftSettings(max_tokens=12, stop_probability=0.6)
    assert profile.source == "A notebook of 2024"
    model = profile.model
    assert (model.name, model.depth) == ("meta-llama/Llama-2-13b-hf", 40)
    assert model.lacks_sizes and model.sketch is None and model.config_hash is None
    assert model.architecture is None and model.intermediate_size is None


def test_what_it_becomes_is_written_and_read_as_the_newest(tmp_path: Path) -> None:
    profile = Profile.load(OLD)
    profile.save(tmp_path / "new.yaml")
    again, version = Profile.load_versioned(tmp_path / "new.yaml")
    assert (again, version) == (profile, SCHEMA_VERSION)
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["model"]["hidden_size"] is None


def test_what_may_be_left_out_is_the_papers() -> None:
    migrated = Profile.model_validate(from_flat(LEAST))
    assert (migrated.draft.max_tokens, migrated.draft.stop_probability) == (25, 0.8)
    assert migrated.source is None


def test_migrating_is_pure_and_ends_at_the_newest() -> None:
    given = copy.deepcopy(LEAST)
    newest = to_newest(given)
    assert given == LEAST
    assert read_version(newest) == SCHEMA_VERSION and to_newest(newest) == newest
    newest["skip"]["attention"].append(3)
    assert given == LEAST


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"skip_atn_layers": [1]}, "skip_atn_layers: is no known key, did you mean skip_attn_lay"),
        ({"skip_attn_layers": [1, 5]}, "skip_attn_layers.1: 5 is out of range, allowed are 1–4"),
        ({"skip_mlp_layers": [0]}, "skip_mlp_layers.0: 0 is out of range, allowed are 1–4"),
        ({"skip_mlp_layers": [2, 2]}, "skip_mlp_layers.1: 2 is repeated"),
        ({"skip_mlp_layers": "2"}, "skip_mlp_layers: '2' should be a list"),
        ({"skip_mlp_layers": [True]}, "skip_mlp_layers.0: true should be a valid integer"),
        ({"num_layers": None}, "num_layers: null should be a valid integer"),
        ({"threshold": 1.5}, "threshold: 1.5 should be less than or equal to 1"),
        ({"draft_len": 65}, "draft_len: 65 should be less than or equal to 64"),
    ],
)
def test_what_does_not_fit_version_0_is_named_by_its_own_keys(
    change: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError) as caught:
        to_newest({**LEAST, **change})
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith("(schema 0)")


@pytest.mark.parametrize("key", ["schema_version", "version"])
def test_newer_ones_are_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "p.yaml").write_text(f"{key}: 7\nwhatever: 1\n")
    with pytest.raises(InputError) as caught:
        Profile.load(tmp_path / "p.yaml")
    told = f"written by a newer conflayers (schema 7; this one reads up to {SCHEMA_VERSION})"
    assert str(caught.value) == f"{tmp_path / 'p.yaml'}: {told}"
