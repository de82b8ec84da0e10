"""Reading a bench's results document from a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conflayers_cli.bench.schema import SCHEMA_VERSION, BenchDocument
from conflayers_cli.errors import InputError
from conflayers_cli.utils.text_files import read_text
from conflayers_cli.utils.yaml import first_problem, format_value

MAX_BYTES = 64 * 2**20
"""A document of 10,000 prompts and 5 runs has a tenth of it."""


def load_document(path: Path) -> BenchDocument:
    """A stored document, without what it was compared with then.

    Raises:
        InputError: the file can't be read, is larger than `MAX_BYTES`, is not JSON, or is not a
            bench's document of this schema version. One line, which names the place.
    """
    document = _parse(read_text(path, MAX_BYTES), path)
    document.pop("comparison", None)
    _check_version(document, path)
    try:
        return BenchDocument.model_validate(document)
    except ValidationError as error:
        problem = first_problem(error, BenchDocument).removeprefix(": ")
        raise InputError(f"{path}: {problem}") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    """Parse JSON; infinities and lone surrogates, which no bench writes, are refused."""
    try:
        document = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        text.encode()
        json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"{error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
        raise InputError(f"{path}:{error.lineno}: is not valid JSON: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: has half a surrogate pair, which is no text") from None
    except ValueError:
        raise InputError(f"{path}: has a number that is none or has too many digits") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: is no result of 'conflayers bench': {format_value(document)}")
    return document


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)


def _check_version(document: dict[str, Any], path: Path) -> None:
    version = document.get("schema_version")
    if not isinstance(version, int) or "arms" not in document:
        raise InputError(
            f"{path}: is no result of 'conflayers bench' (its export_json or json)",
            names=("export_json", "json)"),
        )
    if version < SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {format_value(version)} has no figures of single prompts; "
            "measure it again with this version"
        )
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {format_value(version)} is newer than what is read here "
            f"({SCHEMA_VERSION}); use a newer conflayers"
        )
