"""What is installed along: pinned, accounted for in the docs, and licensed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# PyTorch's CUDA builds bring these in versions of their own.
OF_TORCH = ("triton", "nvidia-", "cuda-")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _project() -> dict[str, list[Requirement]]:
    """What the project asks for, by extra; ``""`` is without one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    split = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", pin) for pin in pins]
    assert all(split), "a constraint is no pin"
    found = {_normal(match[1]): match[2] for match in split if match}
    assert len(found) == len(pins), "a package is pinned twice"
    return found


def _reached(requirements: list[Requirement]) -> set[str]:
    """All distributions installed here that the requirements need, themselves included."""
    reached: set[str] = set()
    waiting = list(requirements)
    while waiting:
        wanted = waiting.pop()
        name = _normal(wanted.name)
        if name in reached or name.startswith(OF_TORCH):
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system, or an extra that is not installed
        reached.add(name)
        for need in map(Requirement, needs):
            extras = ("", *wanted.extras)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(need)
    return reached


def test_all_that_an_installation_brings_is_pinned() -> None:
    wanted = [requirement for group in _project().values() for requirement in group]

    reached = _reached(wanted)

    assert {"torch", "transformers", "sympy"} <= reached
    assert reached - set(_pins()) == set()


def test_pins_lie_within_what_the_project_accepts() -> None:
    pins = _pins()

    for requirement in (each for group in _project().values() for each in group):
        pin = pins.get(_normal(requirement.name))
        if not _normal(requirement.name).startswith(OF_TORCH):
            assert pin is not None and requirement.specifier.contains(pin), requirement.name


@pytest.mark.parametrize("extra", sorted(set(_project()) - {"dev"}))
def test_the_docs_say_what_each_dependency_is_for(extra: str) -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    column = 2 if extra else 1
    told = {row[column].strip() for row in rows if not extra or row[1].strip() == f"`{extra}`"}

    assert {requirement.name for requirement in _project()[extra]} <= told


def test_the_docs_name_all_that_is_brought_along() -> None:
    words = set(re.findall(r"[a-z][a-z0-9-]+", (ROOT / "docs" / "dependencies.md").read_text()))

    assert _reached(_project()[""]) - words == set()


def test_the_licence_is_in_the_package() -> None:
    text = (ROOT / "LICENSE").read_text()

    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == (
        "Apache-2.0"
    )
