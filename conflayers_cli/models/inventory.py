"""What models there are on this machine and what is kept about them, read from files alone.

Nothing here loads PyTorch, runs a model or asks a network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.registry import (
    CATALOGUE,
    COMPILED,
    CONFIG_FILE,
    GENERATIVE,
    LATENCIES,
    TEMP_PREFIX,
    cache_folder,
    is_complete,
    wheel_file,
)
from conflayers_cli.utils.suggest import did_you_mean

COSTS = "costs"
"""What `clear` calls the measured costs."""
_READABLE_LAYERS = {"full_attention", "sliding_attention"}
_SNAPSHOTS = "models--"


@dataclass(frozen=True)
class Builtin:
    """A built-in model.

    Attributes:
        name, summary, depth: as in the catalogue.
        installed: whether the package it is made of is there.
        folder: where it lies converted; None: it is made at its first use.
        bytes: what it takes there.
    """

    name: str
    summary: str
    depth: int
    installed: bool
    folder: str | None
    bytes: int


@dataclass(frozen=True)
class MeasuredCosts:
    """A file of what a model's passes cost on a device.

    Attributes:
        model: the built-in model of its shape, where one is converted, else its class.
        depth: its decoder layers.
        device, dtype, threads: where and how it was measured.
        rows: the numbers of rows decoded at once that were measured.
        file: its path.
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
    """A model in the Hugging Face cache.

    Attributes:
        name: its id there, which ``--model`` takes.
        architecture: its class.
        depth: its decoder layers; None: its configuration does not say.
        bytes: what it takes on disk.
        problem: why it can't be decoded, as far as its configuration tells; None: nothing speaks
            against it.
    """

    name: str
    architecture: str
    depth: int | None
    bytes: int
    problem: str | None


@dataclass(frozen=True)
class Inventory:
    """All that there is.

    Attributes:
        cache_folder: where the first three lie.
        builtin: the models that come by name.
        outdated: folders of earlier conversions, which nothing reads any more.
        costs: what was measured.
        compiled_bytes: what the compiler's results take.
        hub: the models of the Hugging Face cache.
    """

    cache_folder: str
    builtin: tuple[Builtin, ...]
    outdated: tuple[str, ...]
    costs: tuple[MeasuredCosts, ...]
    compiled_bytes: int
    hub: tuple[HubModel, ...]

    def as_json(self) -> dict[str, Any]:
        """The inventory as JSON takes it."""
        return asdict(self)


def take() -> Inventory:
    """Look through the folders."""
    folder = cache_folder()
    installed = wheel_file() is not None
    return Inventory(
        cache_folder=str(folder),
        builtin=tuple(
            Builtin(
                entry.name,
                entry.summary,
                entry.depth,
                installed,
                str(entry.folder) if is_complete(entry.folder) else None,
                size_of(entry.folder),
            )
            for entry in CATALOGUE.values()
        ),
        outdated=tuple(str(path) for path in _outdated(folder)),
        costs=tuple(_costs(folder / LATENCIES)),
        compiled_bytes=size_of(folder / COMPILED),
        hub=tuple(_hub_models(hub_folder())),
    )


def clear(name: str) -> tuple[list[Path], int]:
    """Delete what was made and can be made again.

    Args:
        name: a built-in model, whose conversions go, outdated ones too; ``costs``; ``compiled``.

    Returns:
        (what was deleted, its bytes); nothing where there was nothing.

    Raises:
        InputError: nothing is called so.
        ConfLayersError: it can't be deleted.
    """
    folder = cache_folder()
    if name in CATALOGUE:
        entry = CATALOGUE[name]
        outdated = [path for path in _outdated(folder) if _recipe_of(path) == name]
        targets = [entry.folder, *outdated]
    elif name in (COSTS, COMPILED):
        targets = [folder / (LATENCIES if name == COSTS else COMPILED)]
    else:
        known = (*CATALOGUE, COSTS, COMPILED)
        names, hint = ", ".join(known), did_you_mean(name, known)
        raise InputError(f"clear {name}: there is {names}{hint}", names=(f"clear {name}:",))
    there = [path for path in targets if path.is_dir() and not path.is_symlink()]
    total = sum(map(size_of, there))
    for path in there:
        try:
            _delete(path)
        except OSError as error:
            reason = error.strerror or error
            raise ConfLayersError(f"{path} can't be deleted: {reason}") from error
    return there, total


def size_of(path: Path) -> int:
    """Bytes of all files under a folder; links count as what they are, not what they lead to."""
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(Path(parent, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def hub_folder() -> Path:
    """The Hugging Face cache, as its own client finds it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _delete(path: Path) -> None:
    """Take a folder out of sight in one step first: nobody ever sees half of a model."""
    hidden = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}cleared-", dir=path.parent))
    try:
        path.rename(hidden / path.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # a conversion removes what is left, after a day


def _outdated(folder: Path) -> list[Path]:
    """Conversions of other recipes than today's."""
    current = {entry.folder.name for entry in CATALOGUE.values()}
    found = sorted(path for path in _children(folder) if _recipe_of(path) in CATALOGUE)
    return [path for path in found if path.name not in current and path.is_dir()]


def _recipe_of(path: Path) -> str | None:
    """The built-in model that a folder is a conversion of by its name."""
    name, dash, recipe = path.name.rpartition("-v")
    return name if dash and recipe.isdigit() else None


def _shape(sizes: dict[str, Any]) -> tuple[object, ...]:
    """A model's sizes, by the names of a fingerprint or by those of a configuration."""
    names = (("depth", "num_hidden_layers"), ("hidden_size",), ("vocabulary", "vocab_size"))
    return tuple(next((sizes[n] for n in each if n in sizes), None) for each in names)


def _costs(folder: Path) -> Iterator[MeasuredCosts]:
    known = {
        _shape(_json(e.folder / CONFIG_FILE)): e.name
        for e in CATALOGUE.values()
        if is_complete(e.folder)
    }
    for path in sorted(_children(folder)):
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
            continue  # not such a file; it is measured anew where it is needed


def _hub_models(folder: Path) -> Iterator[HubModel]:
    for path in sorted(_children(folder)):
        if not path.name.startswith(_SNAPSHOTS):
            continue
        snapshot = _snapshot(path)
        config = _json(snapshot / CONFIG_FILE) if snapshot else {}
        architectures = config.get("architectures")
        if snapshot is None or not isinstance(architectures, list) or not architectures:
            continue  # a tokenizer, a data set's card, a download that was broken off
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        depth = next((text[k] for k in ("num_hidden_layers", "n_layer") if k in text), None)
        yield HubModel(
            name=path.name.removeprefix(_SNAPSHOTS).replace("--", "/"),
            architecture=str(architectures[0]),
            depth=depth if isinstance(depth, int) else None,
            bytes=size_of(path),
            problem=_problem(snapshot, config, text, [str(name) for name in architectures]),
        )


def _problem(
    snapshot: Path, config: dict[str, Any], text: dict[str, Any], architectures: list[str]
) -> str | None:
    """What a configuration says against decoding; loading a model looks closer."""
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    if not any(name.endswith(GENERATIVE) for name in architectures):
        return "no causal language model"
    kinds = text.get("layer_types")
    strange = set(kinds) - _READABLE_LAYERS if isinstance(kinds, list) else set()
    if strange:
        return f"has {', '.join(sorted(map(str, strange)))} layers"
    names = [path.name for path in _children(snapshot)]
    if not any(name.endswith((".safetensors", ".gguf")) for name in names):
        return "no safetensors here"
    return None


def _snapshot(path: Path) -> Path | None:
    """The folder of a cached model that its main branch stands for, else the latest one."""
    try:
        revision = (path / "refs" / "main").read_text(encoding="utf-8").strip()
        if revision and (path / "snapshots" / revision).is_dir():
            return path / "snapshots" / revision
    except (OSError, ValueError):
        pass  # downloaded by a revision of its own
    found = [child for child in _children(path / "snapshots") if child.is_dir()]
    return max(found, key=lambda child: child.stat().st_mtime, default=None)


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # there is none, or it may not be read
        return []


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
