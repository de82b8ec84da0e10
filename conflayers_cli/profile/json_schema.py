"""The JSON Schema of a profile, made from the classes that check it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from conflayers_cli.profile.schema import Profile

FILE = "profile.schema.json"
"""In the package's data; made anew by ``python -m conflayers_cli.profile.json_schema > FILE``."""


class _WithoutTitles(GenerateJsonSchema):
    """Keys are their own titles."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def generate_schema() -> str:
    """The schema as JSON text, from `Profile` as it is now."""
    schema = Profile.model_json_schema(mode="validation", schema_generator=_WithoutTitles)
    described = str(schema.pop("description")).split("\n\nRaises:")[0]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A conflayers profile",
        "description": described,
    }
    # it has a default for who makes one in Python; files have to name it
    required = ["schema_version", *schema["required"]]
    return f"{json.dumps({**schema, **head, 'required': required}, indent=2)}\n"


def packaged_schema() -> str:
    """The schema that comes with the package."""
    return files("conflayers_cli").joinpath("data", FILE).read_text(encoding="utf-8")


if __name__ == "__main__":
    import sys

    sys.stdout.write(generate_schema())
