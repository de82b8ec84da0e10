"""Finding a model's files: a built-in name, a folder, a GGUF file or a Hub id."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from conflayers_cli.errors import InputError
from conflayers_cli.models.builtin import BUILTIN, ensure_built
from conflayers_cli.models.peft_loading import Adapter, find_adapter
from conflayers_cli.utils.distributed import run_on_rank0
from conflayers_cli.utils.error_text import did_you_mean, first_line
from conflayers_cli.utils.progress import ProgressCallback

# What transformers, gguf and safetensors raise on missing or broken files, whose types and sizes
# they trust. Hub errors are OSErrors.
READ_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, struct.error, SafetensorError, StrictDataclassError),
)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PATH_SUFFIXES = (".gguf", ".safetensors", ".json", *_PICKLES)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from.

    Attributes:
        source: as the user named it.
        location: a folder or Hub id.
        gguf: the name of the GGUF file in it, if that is meant.
        on_hub: whether ``location`` is a Hub id.
        adapter: the adapter in it, if there is one.
    """

    source: str
    location: str
    gguf: str | None = None
    on_hub: bool = False
    adapter: Adapter | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of every ``from_pretrained`` to find the files."""
        arguments: dict[str, Any] = {} if self.on_hub else {"local_files_only": True}
        return {**arguments, "gguf_file": self.gguf} if self.gguf else arguments


def find_source(source: str, progress: ProgressCallback | None) -> ModelSource:
    """Find ``source``; a built-in model is converted if it was not yet."""
    if source in BUILTIN:
        run_on_rank0(lambda: ensure_built(source, progress))  # for all ranks of this machine
        return ModelSource(source, str(ensure_built(source, progress)))
    path = Path(source).expanduser()
    if source and path.is_dir():
        if (adapter := find_adapter(str(path), {})) is not None:
            return ModelSource(source, str(path), adapter=adapter)
        _check_folder(path, source)
        return ModelSource(source, str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{source} is not a model: give a folder or a .gguf file")
        return ModelSource(source, str(path.parent), gguf=path.name)
    known = f"built-in: {', '.join(BUILTIN)}"
    looks_like_path = source.startswith((".", "/", "~")) or path.is_absolute() or "\\" in source
    if looks_like_path or source.lower().endswith(_PATH_SUFFIXES) or source.count("/") > 1:
        raise InputError(f"no such model: {source!r} does not exist ({known})")
    if hint := did_you_mean(source, BUILTIN, cutoff=0.75):
        raise InputError(f"no such model: {source!r}{hint} ({known})")
    if not _HUB_ID.fullmatch(source):
        raise InputError(f"no such model: {source!r} is no path and no Hugging Face id ({known})")
    try:
        adapter = find_adapter(source, {})
    except OSError:  # raised again when the configuration is read
        adapter = None
    return ModelSource(source, source, on_hub=True, adapter=adapter)


def _check_folder(folder: Path, source: str) -> None:
    """Raise InputError for a folder without a config or without safetensors."""
    if not (folder / "config.json").is_file():
        hint = next((f"; give the file: {f}" for f in sorted(folder.glob("*.gguf"))), "")
        raise InputError(f"{source} is not a model: it has no config.json{hint}")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{source}: {pickles[0]} is a pickle, which can run code when read: "
            "convert it to safetensors first (save_pretrained of transformers 5 writes that)"
        )
    raise InputError(f"{source} has no weights: no *.safetensors in it")


def unreadable(origin: ModelSource, what: str, error: BaseException) -> InputError:
    """The error for a file of the model that can't be read, in one line."""
    line = first_line(error)
    if origin.on_hub and isinstance(error, OSError):
        return InputError(
            f"cannot get {origin.source!r} from the Hugging Face Hub, and there is no such path: "
            f"{line} (built-in: {', '.join(BUILTIN)})"
        )
    remedy = f" (delete {origin.location} to convert it anew)" if origin.source in BUILTIN else ""
    return InputError(f"cannot read the {what} of {origin.source}: {line}{remedy}")
