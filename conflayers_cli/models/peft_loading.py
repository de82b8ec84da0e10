"""Loading PEFT adapters: a folder or Hub id with ``adapter_config.json`` is a model, too.

The base that the file names is loaded. The adapter's weights are merged into the base's, which
costs a pass nothing and rounds the sums to the model's dtype, or computed beside them, which takes
two more products for each adapted layer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from conflayers_cli.errors import InputError
from conflayers_cli.models.checkpoint import find_file
from conflayers_cli.models.peft_modules import check_kind
from conflayers_cli.models.quantization import quantization_method
from conflayers_cli.utils.error_text import first_line
from conflayers_cli.utils.text_files import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_NAME = "default"
_PREFIX = "base_model.model."
"""Of the names of weights in an adapter's file."""

# initialisations that leave the base's weights as they are
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, SafetensorError),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files.

    Attributes:
        base: the name of the model that it was made for.
        settings: the content of ``adapter_config.json``.
        weights: the path of its safetensors.
        tokenizer: whether it brings a tokenizer.
    """

    base: str
    settings: Mapping[str, Any]
    weights: Path
    tokenizer: bool


def find_adapter(location: str, arguments: Mapping[str, Any]) -> Adapter | None:
    """The adapter in a folder or on the Hub; None: there is none.

    Raises InputError where it is broken, a pickle or unsupported, or beside a whole model.
    ``arguments`` are those of ``from_pretrained`` to find the files.
    """
    config = find_file(location, CONFIG, arguments)
    if config is None:
        return None
    settings = read_json_object(config)
    settings.pop("auto_mapping", None)  # a class to import, which is not needed
    weights = find_file(location, WEIGHTS, arguments)
    if weights is None:
        if find_file(location, PICKLE, arguments) is not None:
            raise InputError(
                f"{location}: {PICKLE} is a pickle, which can run code when read: convert it to "
                "safetensors first (save_pretrained of peft writes that)"
            )
        raise InputError(f"{location} is an adapter ({CONFIG}) without weights: no {WEIGHTS} in it")
    for name in _WHOLE:
        if find_file(location, name, arguments) is not None:
            raise InputError(
                f"{location} has a whole model ({name}) and an adapter ({CONFIG}): which one is "
                "meant can't be told; keep them in folders of their own"
            )
    _check_settings(settings, location)
    tokenizer = any(find_file(location, name, arguments) is not None for name in TOKENIZERS)
    return Adapter(settings["base_model_name_or_path"], settings, weights, tokenizer)


def check_merge(merge: bool | None, config: Any, source: str) -> bool:
    """Whether to merge an adapter into a base with this config; None: where its weights are plain.

    Raises InputError for quantised weights where ``merge`` is true.
    """
    method = quantization_method(config)
    if merge and method is not None:
        raise InputError(
            f"merge_adapter: the base of {source} is quantised with {method}, and the sums would "
            "be rounded to its few bits: leave it out",
            names=("merge_adapter:",),
        )
    return method is None if merge is None else merge


def attach_adapter(model: Any, adapter: Adapter, source: str, *, merge: bool) -> Any:
    """Put an adapter into its base, on its device and in its dtype, and return the base.

    ``merge`` adds its weights to the base's instead of computing with both.

    Raises:
        InputError: PEFT is missing, or the adapter does not fit the base.
    """
    if find_spec("peft") is None:
        raise InputError(f"{source} is an adapter, which needs peft: pip install peft")
    tied = getattr(model.config, "tie_word_embeddings", None)
    try:
        with _quiet():
            peft = import_module("peft")
            config = peft.PeftConfig.from_peft_type(**{**adapter.settings, "inference_mode": True})
            _resize(model, adapter)
            own = {id(weight) for weight in model.parameters()}
            # no memory for its weights before their files are read
            wrapped = peft.PeftModel(
                model, config, _NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
            _fill(wrapped, adapter, source)
            for weight in wrapped.parameters():
                if id(weight) not in own and weight.is_floating_point():
                    weight.data = weight.data.to(model.device, model.dtype)
            if merge:
                _untie(wrapped.get_base_model())
            found = wrapped.merge_and_unload() if merge else wrapped.get_base_model()
    except _ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the adapter {source} does not fit its base {adapter.base:.100}: "
            f"{first_line(error)[:300]}"
        ) from error
    if tied is not None:  # PEFT unties what was adapted
        found.config.tie_word_embeddings = tied
    found.eval()
    found.requires_grad_(False)
    return found


def _resize(model: Any, adapter: Adapter) -> None:
    """Give the base as many tokens as the adapter's own embeddings have, where it added some."""
    embeddings = {
        id(each): each
        for each in (model.get_input_embeddings(), model.get_output_embeddings())
        if each is not None
    }
    names = [name for name, module in model.named_modules() if id(module) in embeddings]
    with safe_open(adapter.weights, framework="pt") as file:
        rows = {
            file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118 - it is no mapping
            for name in names
            if key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight")
        }
    count = int(model.get_input_embeddings().weight.shape[0])
    if len(rows) == 1 and (wanted := rows.pop()) != count:
        model.resize_token_embeddings(wanted, mean_resizing=False)


def _fill(wrapped: Any, adapter: Adapter, source: str) -> None:
    """Load the weights, all of the file and all of the adapter's."""
    peft = import_module("peft")
    tensors = load_file(adapter.weights)
    result = peft.set_peft_model_state_dict(wrapped, tensors, _NAME, low_cpu_mem_usage=True)
    empty = sorted(name for name, weight in wrapped.named_parameters() if weight.is_meta)
    for fault, names in (
        ("that its base has no place for", sorted(result.unexpected_keys)),
        ("missing", empty),
    ):
        if names:
            raise InputError(
                f"the adapter {source} does not fit its base {adapter.base}: {len(names)} weights "
                f"{fault}, the first is {names[0]}"
            )


def _untie(model: Any) -> None:
    """Give an adapted embedding a weight of its own: what is added must not change the other."""
    pair = model.get_input_embeddings(), model.get_output_embeddings()
    bases = [getattr(module, "base_layer", module) for module in pair]
    if bases[0].weight is not bases[1].weight:
        return
    for module, base in zip(pair, bases, strict=True):
        if module is not base:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _check_settings(settings: Mapping[str, Any], location: str) -> None:
    whose = f"the adapter {location}"
    check_kind(settings, whose)
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise InputError(
            f"the adapter {location} is not for a causal language model ({task!r:.100})"
        )
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise InputError(
            f"{whose} changes its base's weights before it adds to them "
            f"(init_lora_weights {str(start)[:100]!r}): convert it to plain LoRA (save_pretrained "
            "of peft does with path_initial_model_for_weight_conversion)"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{whose} names no base: write it into its {CONFIG} as base_model_name_or_path"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: nothing warns or logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
