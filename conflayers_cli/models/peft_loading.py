"""Adapters of PEFT on disk: finding one, its base, and putting the two together.

A folder with ``adapter_config.json`` is a model like any other: what that file names as the base is
loaded, and the adapter's weights are added to the base's, once, or computed beside them in every
pass. Added, a pass costs what it costs without an adapter, and the sums are rounded to the model's
dtype, as those of any fine-tune that is stored whole; beside, nothing is rounded, and a pass takes
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

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from conflayers_cli.errors import InputError
from conflayers_cli.models.checkpoint import file_of
from conflayers_cli.models.peft_modules import check_kind
from conflayers_cli.models.quantization import method_of
from conflayers_cli.utils.error_text import first_line
from conflayers_cli.utils.text_files import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_NAME = "default"

# Of the weights that an adapter begins with, these leave the base's as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, SafetensorError),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, looked at but not loaded.

    Attributes:
        place: its folder or Hub id.
        base: the model that it was made for, as its configuration names it.
        settings: what its configuration says.
        weights: its weights, safetensors.
        tokenizer: whether it brings a tokenizer of its own.
    """

    place: str
    base: str
    settings: Mapping[str, Any]
    weights: Path
    tokenizer: bool


def find_adapter(place: str, arguments: Mapping[str, Any]) -> Adapter | None:
    """The adapter in a folder or on the Hub; None: there is none.

    Args:
        place: the folder or Hub id.
        arguments: what ``from_pretrained`` gets to find the files.

    Raises:
        InputError: there is one that can't be used: it is broken, a pickle, of a kind that can't be
            decoded with, or it names no base; or there is a whole model beside it.
    """
    config = file_of(place, CONFIG, arguments)
    if config is None:
        return None
    settings = _read_settings(config)
    weights = file_of(place, WEIGHTS, arguments)
    if weights is None:
        if file_of(place, PICKLE, arguments) is not None:
            raise InputError(
                f"{place}: {PICKLE} is a pickle, which can run code when read: convert it to "
                "safetensors first (save_pretrained of peft writes that)"
            )
        raise InputError(f"{place} is an adapter ({CONFIG}) without weights: no {WEIGHTS} in it")
    for name in _WHOLE:
        if file_of(place, name, arguments) is not None:
            raise InputError(
                f"{place} has a whole model ({name}) and an adapter ({CONFIG}): which one is meant "
                "can't be told; keep them in folders of their own"
            )
    _check(settings, place)
    tokenizer = any(file_of(place, name, arguments) is not None for name in TOKENIZERS)
    return Adapter(place, settings["base_model_name_or_path"], settings, weights, tokenizer)


def check_merge(merge: bool | None, config: Any, source: str) -> bool:
    """Whether an adapter's weights are to be added to its base's.

    Args:
        merge: as asked for; None: where the base's weights are plain.
        config: the base's configuration.
        source: the adapter's name.

    Raises:
        InputError: it is asked for, and the base's weights are quantised.
    """
    method = method_of(config)
    if merge and method is not None:
        raise InputError(
            f"merge_adapter: the base of {source} is quantised with {method}, and the sums would "
            "be rounded to its few bits: leave it out",
            names=("merge_adapter:",),
        )
    return method is None if merge is None else merge


def attach(model: Any, adapter: Adapter, source: str, *, merge: bool) -> Any:
    """Put an adapter's weights into its base.

    Args:
        model: the base, on its device and in its dtype; it is changed.
        adapter: the adapter.
        source: its name, for errors.
        merge: add its weights to the base's; else they are computed with beside them, in the
            base's dtype.

    Returns:
        The base, a transformers model as before.

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
            own = {id(weight) for weight in model.parameters()}
            # Without memory for its weights: the files say how large they are, not a number.
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
            f"the adapter {source} does not fit its base {adapter.base}: {first_line(error)}"
        ) from error
    if tied is not None:  # PEFT unties what was adapted; the model's shape is what it was
        found.config.tie_word_embeddings = tied
    found.eval()
    found.requires_grad_(False)
    return found


def _fill(wrapped: Any, adapter: Adapter, source: str) -> None:
    """Load the weights; all that are in the file have a place, and every place gets some."""
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
    """Where one of two embeddings that share a weight is adapted, give it a weight of its own: what
    is added to it must not be added to the other."""
    pair = model.get_input_embeddings(), model.get_output_embeddings()
    bases = [getattr(module, "base_layer", module) for module in pair]
    if bases[0].weight is not bases[1].weight:
        return
    for module, base in zip(pair, bases, strict=True):
        if module is not base:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json_object(path)
    settings.pop("auto_mapping", None)  # names a class to be imported, which nobody needs here
    return settings


def _check(settings: Mapping[str, Any], place: str) -> None:
    """Refuse what an adapter's configuration must not ask for."""
    check_kind(settings, f"the adapter {place}")
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"the adapter {place} is not for a causal language model ({task!r:.100})")
    start = settings.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise InputError(
            f"the adapter {place} changes its base's weights before it adds to them "
            f"(init_lora_weights {str(start)[:100]!r}): convert it to plain LoRA (save_pretrained "
            "of peft does with path_initial_model_for_weight_conversion)"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"the adapter {place} names no base: write it into its {CONFIG} as "
            "base_model_name_or_path"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: PEFT and what it imports neither warn nor log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
