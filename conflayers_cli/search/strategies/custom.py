"""A strategy from the user's own file, named as ``FILE.py:CLASS``.

The file is run with all the rights of the user, like a script.
"""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.utils.error_text import did_you_mean

if TYPE_CHECKING:
    from conflayers_cli.search.problem import Strategy

FORM = "FILE.py:CLASS"
_PLAIN = (bool, int, float, str, type(None))
"""Types of settings that a profile keeps."""


def is_custom(name: str) -> bool:
    """Whether a strategy's name has the form ``FILE.py:CLASS``, or is a file without a class."""
    return _split(name)[0].suffix == ".py"


def hash_strategy(name: str) -> str:
    """The class and a hash of its file; equal as long as the file is. InputError: no such file."""
    file, kind = _parts(name)
    return f"{kind} {sha256(_read(file, name)).hexdigest()[:16]}"


def load_strategy(name: str, taken: tuple[str, ...]) -> Strategy:
    """Run a file and make its strategy, with the class's own defaults.

    Args:
        name: ``FILE.py:CLASS``.
        taken: names of other strategies.

    Raises:
        InputError: there is no such file or class, it fails, or it lacks what a `Strategy` has.
    """
    file, kind = _parts(name)
    module = _run(file, name)
    cls = getattr(module, kind, None)
    if not isinstance(cls, type):
        hint = did_you_mean(kind, [n for n, v in vars(module).items() if isinstance(v, type)])
        raise _refused(name, f"there is no class {kind} in {file}{hint}")
    if not is_dataclass(cls):
        raise _refused(name, f"{kind} has to be a dataclass, whose fields are its settings")
    try:
        strategy: Any = cls()
        its_name, _ = strategy.name, strategy.setting
    except Exception as error:  # the user's own code may raise anything
        raise _refused(name, _first_line(error)) from error
    if not callable(getattr(strategy, "search", None)):
        raise _refused(name, f"{kind} has no method search(task)")
    if not isinstance(its_name, str) or not its_name or its_name in taken:
        raise _refused(name, f"its name is {its_name!r}: it has to have one of its own")
    for field in fields(strategy):
        value = getattr(strategy, field.name)
        if not all(isinstance(v, _PLAIN) for v in (value if isinstance(value, tuple) else [value])):
            raise _refused(
                name,
                f"its setting {field.name} is of the kind {type(value).__name__}: a profile keeps "
                "numbers, texts and tuples of them",
            )
    found: Strategy = strategy
    return found


def _refused(name: str, problem: str) -> InputError:
    return InputError(f"strategy {name}: {problem}", names=(f"strategy {name}",))


def _split(name: str) -> tuple[Path, str]:
    """(file, class); the class is empty where none is named."""
    file, colon, kind = name.rpartition(":")
    return (Path(file), kind) if colon else (Path(name), "")


def _parts(name: str) -> tuple[Path, str]:
    file, kind = _split(name)
    if not kind.isidentifier():
        raise _refused(name, f"which class? give {FORM}")
    return file.expanduser(), kind


def _read(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _refused(name, f"{file}: {error.strerror or error}") from error


def _run(file: Path, name: str) -> Any:
    """Import a file as a module."""
    _read(file, name)  # for the message about a file that isn't there
    spec = spec_from_file_location(f"conflayers_strategy_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise _refused(name, f"{file} can't be run as Python")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their annotations there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        del sys.modules[spec.name]
        raise _refused(name, _first_line(error)) from error
    return module


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
