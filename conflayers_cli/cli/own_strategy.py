"""A strategy of one's own, named on the command line as ``FILE.py:CLASS``.

The file is run, with all the rights of whoever names it: like a script, not like a model.
"""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.utils.suggest import did_you_mean

if TYPE_CHECKING:
    from conflayers_cli.search.problem import Strategy

FORM = "FILE.py:CLASS"
_KEPT = (bool, int, float, str, type(None))


def is_own(name: str) -> bool:
    """Whether a strategy's name is a file and a class in it."""
    return split(name) is not None


def split(name: str) -> tuple[Path, str] | None:
    """(file, class) of a name of the form ``FILE.py:CLASS``; None: it is of another form."""
    file, colon, kind = name.rpartition(":")
    if not colon:
        file, kind = name, ""
    return (Path(file).expanduser(), kind) if file.endswith(".py") else None


def content_of(name: str) -> str:
    """What tells one state of a strategy's file from another: the class, and a hash of the file.

    Raises:
        InputError: the file can't be read.
    """
    file, kind = _parts(name)
    return f"{kind} {sha256(_read(file, name)).hexdigest()[:16]}"


def own_strategy(name: str, taken: tuple[str, ...]) -> Strategy:
    """The strategy of a name of the form ``FILE.py:CLASS``, with the class's own defaults.

    Args:
        name: as it was given.
        taken: what strategies are called that there are already.

    Raises:
        InputError: there is no such file or class, it fails when it is run, or it lacks what a
            `Strategy` has.
    """
    file, kind = _parts(name)
    module = _run(file, name)
    made = getattr(module, kind, None)
    if not isinstance(made, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type)]
        hint = did_you_mean(kind, classes)
        raise InputError(f"--strategy {name}: there is no class {kind} in {file}{hint}")
    if not is_dataclass(made):
        raise InputError(
            f"--strategy {name}: {kind} has to be a dataclass, whose fields are its settings"
        )
    try:
        strategy: Any = made()
        called, _ = strategy.name, strategy.setting
    except Exception as error:  # the file is the user's own, and may raise anything
        raise InputError(f"--strategy {name}: {_told(error)}") from error
    if not callable(getattr(strategy, "search", None)):
        raise InputError(f"--strategy {name}: {kind} has no method search(task)")
    if not isinstance(called, str) or not called or called in taken:
        raise InputError(
            f"--strategy {name}: its name is {called!r}: it has to have one of its own"
        )
    for field in fields(strategy):
        value = getattr(strategy, field.name)
        if not all(isinstance(v, _KEPT) for v in (value if isinstance(value, tuple) else (value,))):
            raise InputError(
                f"--strategy {name}: its setting {field.name} is of the kind "
                f"{type(value).__name__}: a profile keeps numbers, texts and tuples of them"
            )
    found: Strategy = strategy
    return found


def _parts(name: str) -> tuple[Path, str]:
    parts = split(name)
    if parts is None or not parts[1].isidentifier():
        raise InputError(f"--strategy {name}: which class? give {FORM}")
    return parts


def _read(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"--strategy {name}: {file}: {error.strerror or error}") from error


def _run(file: Path, name: str) -> Any:
    """The module that a file is."""
    _read(file, name)  # a file that isn't there is told in our words
    spec = spec_from_file_location(f"conflayers_strategy_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--strategy {name}: {file} can't be run as Python")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their annotations there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own, and may raise anything
        del sys.modules[spec.name]
        raise InputError(f"--strategy {name}: {_told(error)}") from error
    return module


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
