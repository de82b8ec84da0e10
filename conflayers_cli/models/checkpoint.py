"""Checks of a model's files before anything is built from them or allocated.

transformers trusts them: it would build a model of 10⁹ layers, draw missing weights at random, take
integers for weights, follow an index out of the model's folder and unpickle what it names.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
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

MAX_LAYERS = 10_000
"""Some configurations list their layers as soon as they are read."""
SLACK_ELEMENTS = 1 << 24
"""Weights by which a model may exceed its files before it is refused here."""
MAX_BUFFER_ELEMENTS = 1 << 30
"""Elements of tables that a model computes itself, as rotary embeddings may."""

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
_WEIGHT_SUFFIXES = ("weight", "_proj")
"""Of the names of weights; masks and positions in old checkpoints have others."""


@dataclass(frozen=True)
class StoredWeights:
    """The content of a checkpoint's files.

    Attributes:
        max_elements: the most weights that can be in them.
        non_float: (name, dtype) of a weight that does not hold floats; None: there is none.
    """

    max_elements: int
    non_float: tuple[str, str] | None = None


class _TooLargeError(Exception):
    """The model being built has far more weights than its files."""


def check_json(folder: Path) -> None:
    """Raise InputError where a small file of a model's folder is not a JSON object.

    transformers goes on without a generation config that it can't read, and without its end tokens.
    """
    for name in _JSON_FILES:
        path = folder / name
        if path.is_file():
            read_json_object(path)


def check_config(raw: Mapping[str, Any], source: str) -> None:
    """Raise InputError for a configuration, as its file has it, that asks for something dangerous.

    Too many layers, code of the Hub as its attention, weights or architectures that are no names,
    an unknown quantisation.
    """
    architectures = raw.get("architectures")
    names = isinstance(architectures, list) and all(isinstance(n, str) for n in architectures)
    if architectures is not None and not names:
        raise InputError(f"the config of {source} is broken: architectures is not a list of names")
    weights = raw.get("transformers_weights")
    if weights is not None and not _is_file_name(
        weights, (".safetensors", ".safetensors.index.json")
    ):
        raise InputError(
            f"the config of {source} names weights that are no safetensors in its folder: "
            f"{str(weights)[:100]!r}"
        )
    quantised = raw.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise InputError(f"the config of {source} is broken: quantization_config is no object")
    method = quantised.get("quant_method") if quantised else None
    # in transformers' table bitsandbytes has the names of its two kinds
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
    if method is not None and str(method) not in known:
        raise InputError(f"{source} is quantised with {str(method)[:100]!r}: not supported")
    for key, value in _entries(raw):
        count = isinstance(value, int) and key.endswith(_LAYER_KEYS)
        if count and value > MAX_LAYERS:
            number = f"{value:.0e}" if value > 10**9 else f"{value:,}"
            raise InputError(f"the config of {source} is broken: {key} is {number}")
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise InputError(
                f"{source} asks for code from elsewhere ({key} {value[:100]!r} in config.json): "
                "delete the entry, or give trust_remote_code",
                names=("trust_remote_code",),
            )


def check_remote_code(raw: Mapping[str, Any], source: str, file: str) -> None:
    """Raise InputError where a configuration names Python code of the model's own."""
    if raw.get("auto_map"):
        raise InputError(
            f"{source} brings Python code of its own (auto_map in {file}): trust_remote_code lets "
            "it run",
            names=("trust_remote_code lets",),
        )


def _entries(raw: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Keys and values, also of a multimodal model's sections."""
    for key, value in raw.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from ((str(k), v) for k, v in value.items())


def _is_file_name(name: object, suffixes: tuple[str, ...]) -> bool:
    """Whether it names a file in the folder itself, with one of the suffixes."""
    return isinstance(name, str) and name.endswith(suffixes) and not {"/", "\\", "\0"} & set(name)


def inspect_weights(
    location: str, arguments: Mapping[str, Any], raw: Mapping[str, Any]
) -> StoredWeights:
    """The content of the weight files that transformers is going to read.

    ``raw`` is the configuration; ``arguments`` are those of ``from_pretrained`` to find the files.

    Raises:
        InputError: the index of its shards is broken, or names other files than safetensors in the
            same folder.
        OSError, SafetensorError: a file is missing or broken.
    """
    if gguf := arguments.get("gguf_file"):
        # packed weights have at least one bit
        return StoredWeights(8 * (Path(location) / str(gguf)).stat().st_size)
    paths = _weight_files(location, arguments, raw)
    if raw.get("quantization_config"):
        return StoredWeights(8 * sum(path.stat().st_size for path in paths))
    elements, non_float = 0, None
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                elements += prod(part.get_shape())
                dtype = part.get_dtype()
                if not dtype.startswith(("F", "BF")) and name.endswith(_WEIGHT_SUFFIXES):
                    non_float = non_float or (name, dtype)
    return StoredWeights(elements, non_float)


def _weight_files(
    location: str, arguments: Mapping[str, Any], raw: Mapping[str, Any]
) -> list[Path]:
    """The safetensors files of a model, in the order in which transformers looks for them."""
    named = raw.get("transformers_weights")
    for name in (named,) if named else (_WEIGHTS, _INDEX):
        found = find_file(location, name, arguments)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        paths = []
        for shard in _shards(found):
            path = find_file(location, shard, arguments)
            if path is None:
                raise InputError(f"{location} is incomplete: {found.name} names {shard}")
            paths.append(path)
        return paths
    raise InputError(f"{location} has no weights: no {_WEIGHTS} and no {_INDEX} in it")


def find_file(location: str, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """The path of a model's file, downloaded from the Hub if need be; None: there is none."""
    folder = Path(location)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(location, name, _raise_exceptions_for_missing_entries=False, **arguments)
    return None if found is None else Path(found)


def _shards(index: Path) -> list[str]:
    document = json.loads(index.read_text(encoding="utf-8"))
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: is no index of weights: weight_map should be names and files")
    if not isinstance(document.get("metadata"), dict):
        raise InputError(f"{index}: is no index of weights: metadata is missing")
    for name, shard in names.items():
        if not _is_file_name(shard, (".safetensors",)):
            raise InputError(
                f"{index}: has {name[:100]} in {str(shard)[:100]!r}, and only .safetensors files "
                "in the same folder are read"
            )
    return sorted(set(names.values()))


def check_size(config: PreTrainedConfig, stored: StoredWeights, source: str) -> None:
    """Build the model without memory for its weights, and compare it with its files.

    Loading reports missing weights and wrong shapes, but allocates memory for all of them first.
    Raises InputError for more than twice as many weights (tied ones count twice), or an empty one.
    """
    elements = buffer_elements = 0
    limit = 2 * stored.max_elements + SLACK_ELEMENTS

    def add_weights(module: Any, name: str, weight: Any) -> None:
        nonlocal elements
        if weight is None:
            return
        if weight.numel() == 0:
            raise _TooLargeError(f"{name} of a {type(module).__name__} would have no numbers")
        elements += weight.numel()
        if elements > limit:
            raise _TooLargeError(
                f"over {limit:,} weights, and the files hold {stored.max_elements:,}"
            )

    def add_buffer(module: Any, name: str, table: Any) -> None:
        nonlocal buffer_elements
        buffer_elements += 0 if table is None else table.numel()
        if buffer_elements > MAX_BUFFER_ELEMENTS:
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
    except RuntimeError as error:  # sizes whose bytes PyTorch can't count
        raise InputError(f"cannot read the weights of {source}: {first_line(error)}") from None
    finally:
        for hook in hooks:
            hook.remove()
