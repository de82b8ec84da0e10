"""The JSON Schema: it is that of the classes, and says of files what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conflayers_cli.profile.json_schema import generate_schema, packaged_schema
from conflayers_cli.profile.schema import Profile
from tests.profile.test_schema import BARE, FULL, HAND_WRITTEN, edited

jsonschema = pytest.importorskip("jsonschema")
SHIPPED = sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(packaged_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_one_in_the_package_is_the_newest() -> None:
    """Otherwise: python -m conflayers_cli.profile.json_schema > conflayers_cli/data/…"""
    assert json.loads(packaged_schema()) == json.loads(generate_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_are_valid(validator: Any, path: Path) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("text", [FULL.to_yaml(), BARE.to_yaml(), HAND_WRITTEN])
def test_what_is_read_is_valid(validator: Any, text: str) -> None:
    validator.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("wat",), 1),
        (("skip", "mpl"), [3]),
        (("skip", "mlp"), [0]),
        (("draft", "max_tokens"), 65),
        (("draft", "stop_probability"), "high"),
        (("draft", "tree"), [[0.8, 3, 1]]),
        (("draft", "by"), "nobody"),
        (("found_by", "settings"), {"x": [1]}),
        (("found_by", "prompts", "sha256"), "xyz"),
        (("model", "depth"), None),
        (("measured", "iterations"), -1),
        (("tensors_sha256",), "12"),
    ],
)
def test_what_is_refused_is_not_valid(
    validator: Any, tmp_path: Path, path: tuple[str, ...], value: object
) -> None:
    assert not validator.is_valid(yaml.safe_load(edited(*path, value=value)))


def test_the_version_is_asked_for(validator: Any) -> None:
    data = yaml.safe_load(BARE.to_yaml())
    del data["schema_version"]
    assert not validator.is_valid(data)


def test_every_key_is_there_and_no_other_allowed() -> None:
    schema = json.loads(packaged_schema())
    assert list(schema["properties"]) == list(Profile.model_fields)
    sections = [s for s in _objects(schema) if "properties" in s]
    assert len(sections) > 8
    assert all(section["additionalProperties"] is False for section in sections)


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from _objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _objects(value)
