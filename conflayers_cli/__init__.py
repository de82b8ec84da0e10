"""conflayers: self-speculative decoding with layers left out, found by calibration.

The command line lives in :mod:`conflayers_cli.cli`, the decoding engine in
:mod:`conflayers_cli.engine`, the methods that choose layers in :mod:`conflayers_cli.search`.

What is worth knowing and no result is logged below the logger ``conflayers_cli``, see
:mod:`conflayers_cli.utils.notices`.

What is for Python programs can be imported from here (see ``docs/python.md``). It is brought in
when it is asked for, since PyTorch takes seconds.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from conflayers_cli.version import __version__ as __version__

__all__ = [
    "Answer",
    "ConfLayersError",
    "ConfLayersWarning",
    "GenerateError",
    "GenerationResult",
    "InputError",
    "Model",
    "OpenStore",
    "Options",
    "Profile",
    "Stream",
    "conflayers_generate",
    "generate",
    "load",
    "open_store",
    "release",
    "stream",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from conflayers_cli.api.attached_model import release
    from conflayers_cli.api.generate import Model, Stream, generate, load, open_store, stream
    from conflayers_cli.api.hf_generate import conflayers_generate
    from conflayers_cli.api.hf_request import GenerateError
    from conflayers_cli.api.options import Options
    from conflayers_cli.errors import ConfLayersError, ConfLayersWarning, InputError
    from conflayers_cli.generation.response import Answer, GenerationResult
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.spec_decode.open_store import OpenStore
else:
    _MODULES = {
        "generation.response": ("Answer", "GenerationResult"),
        "api.generate": ("Model", "Stream", "generate", "load", "open_store", "stream"),
        "api.options": ("Options",),
        "api.attached_model": ("release",),
        "api.hf_generate": ("conflayers_generate",),
        "errors": ("ConfLayersError", "ConfLayersWarning", "InputError"),
        "api.hf_request": ("GenerateError",),
        "profile.schema": ("Profile",),
        "spec_decode.open_store": ("OpenStore",),
    }

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"conflayers_cli.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
