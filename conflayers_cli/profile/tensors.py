"""The tensors file beside a profile: what its search measured."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from conflayers_cli.errors import InputError
from conflayers_cli.profile.schema import Profile

MAX_BYTES = 1 << 28
"""256 MiB; a search's tensors take some hundred KiB."""

Tensors: TypeAlias = dict[str, npt.NDArray[Any]]


def hash_content(content: bytes) -> str:
    """The value of `Profile.tensors_sha256` for a file's content."""
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, profile: Profile) -> Tensors:
    """The tensors that the profile in the file ``path`` names; none where it names no file.

    Raises:
        InputError: the file is missing, can't be read, is no safetensors file, or is not the one
            that was written with the profile.
    """
    if profile.tensors is None:
        return {}
    beside = path.with_name(profile.tensors)
    try:
        if beside.stat().st_size > MAX_BYTES:
            raise InputError(f"{beside}: is larger than {MAX_BYTES >> 20} MiB: not a calibration's")
        content = beside.read_bytes()
    except FileNotFoundError:
        keys = "keys tensors and tensors_sha256" if profile.tensors_sha256 else "key"
        raise InputError(
            f"{path}: tensors: {profile.tensors} is not beside it "
            f"(without the file, take the {keys} out)"
        ) from None
    except OSError as error:
        raise InputError(f"{beside}: can't be read: {error.strerror or error}") from None
    if profile.tensors_sha256 is not None and hash_content(content) != profile.tensors_sha256:
        raise InputError(
            f"{path}: tensors_sha256: {profile.tensors} is not the file written with this profile "
            f"(its hash is {hash_content(content)[:12]}…, not {profile.tensors_sha256[:12]}…)"
        )
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{beside}: is no safetensors file: {error}") from None


def shaped(tensors: Tensors, name: str, *shape: int | None) -> npt.NDArray[np.float64] | None:
    """A tensor as float64, if it is there with this shape; None in ``shape`` is any size."""
    found = tensors.get(name)
    if found is None or found.ndim != len(shape) or found.dtype.kind not in "biuf":
        return None
    if any(want not in (None, size) for want, size in zip(shape, found.shape, strict=True)):
        return None
    return found.astype(np.float64)
