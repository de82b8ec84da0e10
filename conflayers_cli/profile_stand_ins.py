"""The linear maps of a profile, in the file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from conflayers_cli.engine.stand_in import StandIn
from conflayers_cli.errors import InputError
from conflayers_cli.profile.schema import Profile
from conflayers_cli.profile.sections import StandInSection
from conflayers_cli.profile_tensors import Tensors, read_tensors

PREFIX = "stand_in"
_DTYPES = ("float16", "float32")


def stand_in_tensors(stand_ins: Iterable[StandIn]) -> dict[str, torch.Tensor]:
    """What goes into the file: ``stand_in_BEGIN_END_…``, float16 or float32.

    ``…_weight`` ``[d, d]``, or of low rank ``…_first`` ``[r, d]`` and ``…_second`` ``[d, r]``; and
    ``…_bias`` ``[d]``.
    """
    found = {}
    for each in stand_ins:
        for name, tensor in zip(_names(each.begin, each.end, each.rank), each.tensors, strict=True):
            found[name] = tensor
    return found


def stored_bytes(stand_ins: Iterable[StandIn]) -> int:
    """What the maps take in the file."""
    return sum(tensor.nbytes for tensor in stand_in_tensors(stand_ins).values())


def read_stand_ins(path: Path, profile: Profile) -> dict[tuple[int, int], StandIn]:
    """The maps of a profile by the layers they stand for.

    Args:
        path: the profile's file.
        profile: what it holds.

    Raises:
        InputError: the tensors' file is missing, is not the one written with the profile, or has
            not what the profile names.
    """
    skips = (profile.skip, *(section.skip for section in profile.ranges or ()))
    wanted = {(each.begin, each.end): each for skip in skips for each in skip.stand_ins}
    tensors = read_tensors(path, profile)
    return {block: _stand_in(tensors, each, path, profile) for block, each in wanted.items()}


def _stand_in(tensors: Tensors, each: StandInSection, path: Path, profile: Profile) -> StandIn:
    names = _names(each.begin, each.end, each.rank)
    place = f"{path}: skip.stand_ins: layers {each.begin}–{each.end - 1}"
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"{place}: {profile.tensors} has no {missing[0]}: calibrate anew")
    found = [tensors[name] for name in names]
    if any(str(tensor.dtype) not in _DTYPES for tensor in found):
        raise InputError(f"{place}: {profile.tensors} should hold float16 or float32")
    *factors, bias = (torch.from_numpy(tensor) for tensor in found)
    try:
        stand_in = StandIn(each.begin, each.end, tuple(factors), bias)
    except ValueError as error:
        raise InputError(f"{place}: {error}: calibrate anew") from None
    if not all(bool(tensor.isfinite().all()) for tensor in stand_in.tensors):
        raise InputError(f"{place}: {profile.tensors} holds numbers that are none: calibrate anew")
    return stand_in


def _names(begin: int, end: int, rank: int | None) -> tuple[str, ...]:
    parts = ("weight", "bias") if rank is None else ("first", "second", "bias")
    return tuple(f"{PREFIX}_{begin}_{end}_{part}" for part in parts)
