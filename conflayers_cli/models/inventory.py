"""The models on this machine and what is cached about them, read from files alone.

Nothing here loads PyTorch, runs a model or uses the network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.registry import (
    COMPILE_FOLDER,
    CONFIG_FILE,
    COST_FOLDER,
    GENERATIVE,
    LEARNT_FOLDER,
    REGISTRY,
    TEMP_PREFIX,
    cache_folder,
    is_complete,
    wheel_file,
)
from conflayers_cli.utils.error_text import did_you_mean
from conflayers_cli.utils.text_files import read_json_object

CACHES = {"costs": COST_FOLDER, LEARNT_FOLDER: LEARNT_FOLDER, COMPILE_FOLDER: COMPILE_FOLDER}
"""Folders in the cache folder, by their names for `clear_cache`."""
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
_SNAPSHOTS = "models--"


@dataclass(frozen=True)
class BuiltinStatus:
    """A built-in model; ``installed``: its wheel is; ``folder``: None until it is converted."""

    name: str
    summary: str
    depth: int
    installed: bool
    folder: str | None
    bytes: int


@dataclass(frozen=True)
class MeasuredCosts:
    """A file of the costs of a model's passes, for ``rows`` sequences decoded together.

    ``model`` is a converted built-in model of the same sizes, else the model's class.
    """

    model: str
    depth: int
    device: str
    dtype: str
    threads: int
    rows: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class HubModel:
    """A model in the Hugging Face cache; ``problem``: why its configuration rules it out."""

    name: str
    architecture: str
    depth: int | None
    bytes: int
    problem: str | None


@dataclass(frozen=True)
class Inventory:
    """All models and caches; ``outdated`` are folders of earlier conversions, no longer used,
    ``learnt`` is the number of models and devices that something was learnt of."""

    cache_folder: str
    builtin: tuple[BuiltinStatus, ...]
    outdated: tuple[str, ...]
    costs: tuple[MeasuredCosts, ...]
    learnt: int
    compiled_bytes: int
    hub: tuple[HubModel, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def take_inventory() -> Inventory:
    folder = cache_folder()
    installed = wheel_file() is not None
    return Inventory(
        cache_folder=str(folder),
        builtin=tuple(
            BuiltinStatus(
                entry.name,
                entry.summary,
                entry.depth,
                installed,
                str(entry.folder) if is_complete(entry.folder) else None,
                folder_bytes(entry.folder),
            )
            for entry in REGISTRY.values()
        ),
        outdated=tuple(str(path) for path in _outdated(folder)),
        costs=tuple(_costs(folder / COST_FOLDER)),
        learnt=len(_children(folder / LEARNT_FOLDER)),
        compiled_bytes=folder_bytes(folder / COMPILE_FOLDER),
        hub=tuple(_hub_models(hub_folder())),
    )


def clear_cache(name: str) -> tuple[list[Path], int]:
    """Delete a built-in model's conversions, outdated ones too, the ``costs``, what was ``learnt``,
    or ``compiled`` code.

    Returns:
        (the folders deleted, their size in bytes).

    Raises:
        InputError: no such name.
        ConfLayersError: a folder can't be deleted.
    """
    folder = cache_folder()
    if name in REGISTRY:
        outdated = [path for path in _outdated(folder) if _model_name(path) == name]
        targets = [REGISTRY[name].folder, *outdated]
    elif name in CACHES:
        targets = [folder / CACHES[name]]
    else:
        known = (*REGISTRY, *CACHES)
        names, hint = ", ".join(known), did_you_mean(name, known)
        raise InputError(f"clear {name}: there is {names}{hint}", names=(f"clear {name}:",))
    existing = [path for path in targets if path.is_dir() and not path.is_symlink()]
    total = sum(map(folder_bytes, existing))
    for path in existing:
        try:
            _delete(path)
        except OSError as error:
            reason = error.strerror or error
            raise ConfLayersError(f"{path} can't be deleted: {reason}") from error
    return existing, total


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder; a link counts with its own size."""
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                total += Path(parent, name).lstat().st_size
    return total


def hub_folder() -> Path:
    """The Hugging Face cache, as its own client finds it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _delete(path: Path) -> None:
    """Rename a folder before deleting it, so that nobody finds half of a model."""
    hidden = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}cleared-", dir=path.parent))
    try:
        path.rename(hidden / path.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # leftovers go with the next conversion


def _outdated(folder: Path) -> list[Path]:
    """Conversions by earlier recipes."""
    current = {entry.folder.name for entry in REGISTRY.values()}
    found = [path for path in _children(folder) if _model_name(path) in REGISTRY]
    return [path for path in found if path.name not in current and path.is_dir()]


def _model_name(path: Path) -> str | None:
    """The name of the model that a folder holds, if it is called like a conversion."""
    name, dash, recipe = path.name.rpartition("-v")
    return name if dash and recipe.isdigit() else None


def _shape(sizes: dict[str, Any]) -> tuple[object, ...]:
    """A model's sizes, from a config fingerprint or a configuration."""
    names = (("depth", "num_hidden_layers"), ("hidden_size",), ("vocabulary", "vocab_size"))
    return tuple(next((sizes[n] for n in each if n in sizes), None) for each in names)


def _costs(folder: Path) -> Iterator[MeasuredCosts]:
    known = {
        _shape(_json(e.folder / CONFIG_FILE)): e.name
        for e in REGISTRY.values()
        if is_complete(e.folder)
    }
    for path in _children(folder):
        document = _json(path)
        try:
            model = json.loads(document["model"])
            yield MeasuredCosts(
                model=known.get(_shape(model), str(model.get("architecture"))),
                depth=int(document["depth"]),
                device=str(document["device"]),
                dtype=str(document["dtype"]),
                threads=int(document["threads"]),
                rows=tuple(sorted(map(int, document["by_batch"]))),
                file=str(path),
            )
        except (KeyError, ValueError, TypeError, AttributeError):
            continue  # no such file: costs are measured anew where needed


def _hub_models(folder: Path) -> Iterator[HubModel]:
    for path in _children(folder, f"{_SNAPSHOTS}*"):
        snapshot = _snapshot(path)
        config = _json(snapshot / CONFIG_FILE) if snapshot else {}
        architectures = config.get("architectures")
        if snapshot is None or not isinstance(architectures, list) or not architectures:
            continue  # a tokenizer, an unfinished download
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        depth = next((text[k] for k in ("num_hidden_layers", "n_layer") if k in text), None)
        yield HubModel(
            name=path.name.removeprefix(_SNAPSHOTS).replace("--", "/"),
            architecture=str(architectures[0]),
            depth=depth if isinstance(depth, int) else None,
            bytes=folder_bytes(path),
            problem=_problem(snapshot, config, text),
        )


def _problem(snapshot: Path, config: dict[str, Any], text: dict[str, Any]) -> str | None:
    """Why a configuration can't be decoded; loading the model checks more."""
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    if not any(str(name).endswith(GENERATIVE) for name in config["architectures"]):
        return "no causal language model"
    kinds = text.get("layer_types")
    unsupported = set(kinds) - _SUPPORTED_LAYERS if isinstance(kinds, list) else set()
    if unsupported:
        return f"has {', '.join(sorted(map(str, unsupported)))} layers"
    if not any(path.suffix in (".safetensors", ".gguf") for path in _children(snapshot)):
        return "no safetensors here"
    return None


def _snapshot(path: Path) -> Path | None:
    """The snapshot of a cached model's main branch, else the latest one."""
    try:
        revision = (path / "refs" / "main").read_text(encoding="utf-8").strip()
        if revision and (path / "snapshots" / revision).is_dir():
            return path / "snapshots" / revision
    except (OSError, ValueError):
        pass  # downloaded by a revision
    found = [child for child in _children(path / "snapshots") if child.is_dir()]
    return max(found, key=lambda child: child.stat().st_mtime, default=None)


def _children(folder: Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder, in order; none where it is missing or unreadable."""
    return sorted(folder.glob(pattern))


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        return read_json_object(path)
    except InputError:
        return {}
