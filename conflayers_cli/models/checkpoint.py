"""What the files of a model say, looked at before anything is built from them or allocated.

transformers trusts them: it would build a model of a thousand million layers, draw weights that
are missing at random, take integers for weights, follow an index out of the model's folder and
unpickle what it names. None of this is needed by a model, and a broken or hostile one may hold it.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from conflayers_cli.errors import InputError
from conflayers_cli.utils.error_text import first_line
from conflayers_cli.utils.text_files import read_json_object

MOST_LAYERS = 10_000
"""Some configurations list their layers as soon as they are read. Deep models have hundreds."""
SLACK = 1 << 24
"""Weights by which a model may be larger than its files before it is built to say which."""
MOST_BUFFERED = 1 << 30
"""Numbers in tables that a model computes for itself, as rotary embeddings may."""

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    _INDEX,
)
_LAYER_KEYS = ("layers", "n_layer", "num_blocks", "n_blocks", "block_count")
_DRAWN = ("weight", "_proj")
"""How the names of weights end; masks and positions that old checkpoints carry have others."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's files hold.

    Attributes:
        numbers: the most weights that can be in them.
        odd: a tensor that is no weight for all its name, and what it holds; None: there is none.
    """

    numbers: int
    odd: tuple[str, str] | None = None


class _TooLargeError(Exception):
    """The model that is being built has more weights than its files, by far."""


def check_json(folder: Path) -> None:
    """See that the small files of a model's folder are JSON objects, those that are there.

    transformers goes on without a generation config that it can't read, and without its end tokens.

    Raises:
        InputError: one is not; it is named.
    """
    for name in _JSON_FILES:
        path = folder / name
        if path.is_file():
            read_json_object(path)


def check_config(raw: Mapping[str, Any], source: str) -> None:
    """Refuse what a configuration must not ask for, as it stands in the file.

    Raises:
        InputError: it has absurdly many layers, names code on the hub as its attention, names
            weights or architectures that are no names, or is quantised in an unknown way.
    """
    architectures = raw.get("architectures")
    if architectures is not None and not _are_names(architectures):
        raise InputError(f"the config of {source} is broken: architectures is not a list of names")
    weights = raw.get("transformers_weights")
    if weights is not None and not _is_plain(weights, (".safetensors", ".safetensors.index.json")):
        raise InputError(
            f"the config of {source} names weights that are no safetensors in its folder: "
            f"{str(weights)[:100]!r}"
        )
    quantised = raw.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise InputError(f"the config of {source} is broken: quantization_config is no object")
    method = quantised.get("quant_method") if quantised else None
    # bitsandbytes' checkpoints name it, transformers' table its two kinds
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
    if method is not None and str(method) not in known:
        # transformers would take the weights for plain ones
        raise InputError(f"{source} is quantised with {str(method)[:100]!r}: not supported")
    for key, value in _entries(raw):
        count = isinstance(value, int) and key.endswith(_LAYER_KEYS)
        if count and value > MOST_LAYERS:
            raise InputError(
                f"the config of {source} is broken: {key} is {value:.0e}"
                if value > 10**9
                else f"the config of {source} is broken: {key} is {value:,}"
            )
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise InputError(
                f"{source} asks for code from elsewhere ({key} {value[:100]!r} in config.json): "
                "delete the entry, or give trust_remote_code",
                names=("trust_remote_code",),
            )


def _entries(raw: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Keys and values, those of the sections of a multimodal model's config among them."""
    for key, value in raw.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from ((str(k), v) for k, v in value.items())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_plain(name: object, suffixes: tuple[str, ...]) -> bool:
    """Whether it is the name of a file in the folder itself, of one of the kinds."""
    return isinstance(name, str) and name.endswith(suffixes) and not {"/", "\\", "\0"} & set(name)


def stored(place: str, arguments: Mapping[str, Any], raw: Mapping[str, Any]) -> Stored:
    """What is in the files of a model that transformers is going to read.

    Args:
        place: its folder or Hub id.
        arguments: what ``from_pretrained`` gets to find the files.
        raw: its configuration.

    Raises:
        InputError: the index of its shards is no index, or names other files than safetensors in
            the same folder.
        OSError, SafetensorError: a file is missing or broken.
    """
    if gguf := arguments.get("gguf_file"):
        # a weight takes a bit at the least, however it is packed
        return Stored(8 * (Path(place) / str(gguf)).stat().st_size)
    paths = _weight_files(place, arguments, raw)
    if raw.get("quantization_config"):
        return Stored(8 * sum(path.stat().st_size for path in paths))
    numbers, odd = 0, None
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                count = 1
                for size in part.get_shape():
                    count *= size
                numbers += count
                kind = part.get_dtype()
                if not kind.startswith(("F", "BF")) and name.endswith(_DRAWN):
                    odd = odd or (name, kind)
    return Stored(numbers, odd)


def _weight_files(place: str, arguments: Mapping[str, Any], raw: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a model, in the order in which transformers looks for them."""
    named = raw.get("transformers_weights")
    for name in (named,) if named else (_WEIGHTS, _INDEX):
        found = file_of(place, name, arguments)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        shards = _shards(found)
        paths = [file_of(place, shard, arguments) for shard in shards]
        for shard, path in zip(shards, paths, strict=True):
            if path is None:
                raise InputError(f"{place} is incomplete: {found.name} names {shard}")
        return [path for path in paths if path is not None]
    raise InputError(f"{place} has no weights: no {_WEIGHTS} and no {_INDEX} in it")


def file_of(place: str, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """A file of the model; from the Hub it is fetched. None: there is none of this name."""
    folder = Path(place)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **arguments)
    return None if found is None else Path(found)


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    document = json.loads(index.read_text(encoding="utf-8"))
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: is no index of weights: weight_map should be names and files")
    if not isinstance(document.get("metadata"), dict):
        raise InputError(f"{index}: is no index of weights: metadata is missing")
    for name, shard in names.items():
        if not _is_plain(shard, (".safetensors",)):
            raise InputError(
                f"{index}: has {name[:100]} in {str(shard)[:100]!r}, and only .safetensors files "
                "in the same folder are read"
            )
    return sorted(set(names.values()))


def check_size(config: PreTrainedConfig, holds: Stored, source: str) -> None:
    """Build the model without memory for its weights, and see that its files could hold them.

    Weights of a wrong shape and missing ones are told by name when the model is read; but memory
    for all of them is taken first, as much as the configuration asks for.

    Raises:
        InputError: it has more than twice as many (tied ones count twice), or none in a place.
    """
    numbers = buffered = 0
    most = 2 * holds.numbers + SLACK

    def add_weights(module: Any, name: str, weight: Any) -> None:
        nonlocal numbers
        if weight is None:
            return
        if weight.numel() == 0:
            raise _TooLargeError(f"{name} of a {type(module).__name__} would have no numbers")
        numbers += weight.numel()
        if numbers > most:
            raise _TooLargeError(f"over {most:,} weights, and the files hold {holds.numbers:,}")

    def add_buffer(module: Any, name: str, table: Any) -> None:
        nonlocal buffered
        buffered += 0 if table is None else table.numel()
        if buffered > MOST_BUFFERED:
            raise _TooLargeError(f"{name} of a {type(module).__name__} would be too large")

    hooks = (
        register_module_parameter_registration_hook(add_weights),
        register_module_buffer_registration_hook(add_buffer),
    )
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except _TooLargeError as error:
        raise InputError(f"the weights of {source} don't fit its config: {error}") from None
    except RuntimeError as error:  # sizes so large that PyTorch can't count their bytes
        raise InputError(f"cannot read the weights of {source}: {first_line(error)}") from None
    finally:
        for hook in hooks:
            hook.remove()
