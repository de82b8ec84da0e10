"""A name, folder, GGUF file or built-in model → model and tokenizer, ready to run."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.builtin import (
    BUILTIN,
    clear_gguf_leftovers,
    ensure,
    quiet_transformers,
)
from conflayers_cli.models.checkpoint import check_config, check_json, check_size, stored
from conflayers_cli.models.device import check_device_map, device_of, find_device, spread_of
from conflayers_cli.models.dtype import check_dtype, choose_dtype
from conflayers_cli.models.peft_loading import CONFIG as ADAPTER_CONFIG
from conflayers_cli.models.peft_loading import Adapter, attach, check_merge, find_adapter
from conflayers_cli.models.peft_modules import unwrapped
from conflayers_cli.models.quantization import check_bits, loading, told
from conflayers_cli.models.registry import GENERATIVE
from conflayers_cli.models.support import sizes_by_layer
from conflayers_cli.models.tokenization import first_line, render, token_ids
from conflayers_cli.models.weight_sketch import WeightFingerprint, sketch_of
from conflayers_cli.utils.distributed import begin, on_first, sharding, world
from conflayers_cli.utils.progress import ProgressCallback
from conflayers_cli.utils.suggest import did_you_mean

# What transformers, gguf and safetensors raise on files that are absent, broken or not what their
# names say: they trust types and sizes, and so raise what these come to. Their hub failures are
# OSErrors.
_READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PATH_SUFFIXES = (".gguf", ".safetensors", ".json", *_PICKLES)

# Keys of a config that don't change what the layers compute, or only how they are run or trained.
_VOLATILE = re.compile(
    r"_.*|conflayers_.*|.*_token_id|.*_dropout|.*dropout|.*_pdrop|.*attn_implementation"
    r"|architectures|auto_map|transformers_version|dtype|torch_dtype|use_cache|name_or_path"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|quantization_config|distributed_config|pretraining_tp|initializer_range|gradient_checkpointing"
    r"|output_attentions|output_hidden_states|return_dict|chunk_size_feed_forward|prefix|tokenizer_class"
    r"|max_length|min_length|do_sample|temperature|top_k|top_p|typical_p|num_beams|early_stopping"
    r"|repetition_penalty|length_penalty|no_repeat_ngram_size|bad_words_ids|generation_config"
)

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model on its device, and how to talk to it.

    ``name`` is what a profile stores: the built-in name, the Hub id, or the path as it was given.
    ``model`` is in evaluation mode and needs no gradients. ``end_tokens`` are all ids that end a
    text. ``context_length`` is None where the model names none. ``spread`` says how the model is
    spread over several devices, None where it is on one: then ``device`` is where tokens go.
    ``sketch`` tells its weights from others, None where they are not all plain and here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    end_tokens: frozenset[int]
    context_length: int | None
    has_chat_template: bool
    spread: str | None = None
    sketch: WeightFingerprint | None = None

    @property
    def place(self) -> str:
        """Where the model is, in words."""
        return f"{self.device}, {self.spread}" if self.spread else str(self.device)


@dataclass(frozen=True)
class _Origin:
    """Where a model is read from: a folder or Hub id, and the GGUF file or adapter in it if that is
    meant."""

    source: str
    place: str
    gguf: str | None = None
    on_hub: bool = False
    adapter: Adapter | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` needs to find the files."""
        arguments: dict[str, Any] = {} if self.on_hub else {"local_files_only": True}
        return {**arguments, "gguf_file": self.gguf} if self.gguf else arguments


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | None = None,
    quantize: str | None = None,
    merge_adapter: bool | None = None,
    progress: ProgressCallback | None = None,
) -> LoadedModel:
    """Load a built-in model, a local folder, a ``.gguf`` file or a model of the Hugging Face Hub.

    A built-in name wins over a folder of that name, a local path over a Hub id. Weights come from
    safetensors or GGUF only, never from pickles. Under torchrun each process gets its part of every
    layer (see :mod:`conflayers_cli.utils.distributed`). An adapter of PEFT is loaded with the base that it names (see
    :mod:`conflayers_cli.models.peft_loading`).

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1`` or
            ``mps``.
        dtype: ``auto`` (what is fast on the device), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run Python code that comes with the model.
        device_map: ``auto`` spreads the layers over all devices there are, and over the host's
            memory where those are too small; None: one device.
        quantize: load a plain checkpoint's weights in fewer bits, ``int8`` or ``int4``.
        merge_adapter: add an adapter's weights to its base's; None: where the base's are plain.
        progress: told about conversion and loading.

    Raises:
        InputError: no such model, device or dtype; broken or refused files; not a causal language
            model, or one that can't be spread so.
        ConfLayersError: it does not fit into the memory, or a conversion failed.
    """
    check_device_map(device_map, device)
    begin()  # before files are looked for: what fails on one rank alone is told there
    on = find_device(device)
    check_dtype(dtype)
    check_bits(quantize)
    if source in BUILTIN:  # converted by one process, for all of this machine
        on_first(lambda: ensure(source, progress))
    origin = _find(source, progress)
    if origin.adapter is not None:
        _check_spread(source, device_map)
        same = {"device": device, "dtype": dtype, "quantize": quantize, "progress": progress}
        base = _load_base(origin.adapter, source, trust_remote_code=trust_remote_code, **same)
        return _adapted(base, origin, origin.adapter, merge_adapter, trust_remote_code)
    if merge_adapter is not None:
        flag = "merge" if merge_adapter else "no-merge"
        raise InputError(f"--{flag}-adapter: {source} is no adapter: leave it out")
    if quantize and origin.gguf:
        raise InputError(f"--quantize takes safetensors, and {source} is a GGUF file")

    def step(done: float) -> None:
        if progress:
            progress(f"loading {source}", done)

    step(0.0)
    with quiet_transformers(step):
        config = _read_config(origin, trust_remote_code)
        _check_files(origin, config)
        kind, reason = on_first(lambda: choose_dtype(dtype, on, config))
        spreading = {"device_map": device_map} if device_map else sharding(config, source)
        quantising = loading(config, source, quantize, on, kind, trust_remote_code)
        if quantising is not None:
            spreading = {**(spreading or {"device_map": {"": str(on)}}), **quantising}
        model = _read_model(origin, config, kind, trust_remote_code, spreading)
        tokenizer = _read_tokenizer(origin, trust_remote_code)
    step(1.0)
    if quantising is not None and model.dtype != kind:
        reason = f"{str(model.dtype).removeprefix('torch.')}: what its quantised layers compute in"
    if weights := told(model.config, quantize):
        reason = f"{reason}; {weights}"
    on_device = model if spreading else _to_device(model, on, source)
    return as_loaded(on_device, tokenizer, source, reason)


def _load_base(adapter: Adapter, source: str, **how: Any) -> LoadedModel:
    """The model that an adapter was made for."""
    try:
        if _find(adapter.base, None).adapter is not None:
            raise InputError(f"{adapter.base} is an adapter itself")
        return load_model(adapter.base, **how)
    except InputError as error:
        raise InputError(
            f"{source} is an adapter of {adapter.base!r}: {error}; base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} says where the base is"
        ) from error


def _check_spread(source: str, device_map: str | None) -> None:
    """Refuse to share an adapter's base among devices: what an adapter adds is not shared along."""
    if device_map or world().size > 1:
        way = "--device-map" if device_map else "torchrun"
        raise InputError(
            f"{source} is an adapter, which {way} can't spread: save it merged with its base first "
            "(merge_and_unload and save_pretrained of peft)"
        )


def _adapted(
    base: LoadedModel,
    origin: _Origin,
    adapter: Adapter,
    merge: bool | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """The base with its adapter, and with the adapter's tokenizer where that brings one."""
    source = origin.source
    merged = check_merge(merge, base.model.config, source)
    model = attach(base.model, adapter, source, merge=merged)
    with quiet_transformers():
        own = adapter.tokenizer
        tokenizer = _read_tokenizer(origin, trust_remote_code) if own else base.tokenizer
    how = "merged into the weights" if merged else "beside the weights"
    return as_loaded(model, tokenizer, source, f"{base.dtype_reason}; adapter {how}")


def as_loaded(model: Any, tokenizer: Any, name: str, dtype_reason: str) -> LoadedModel:
    """A model that is in memory already, with what there is to know about it.

    Args:
        model: a transformers causal language model on its device, or a `PeftModel` of one.
        tokenizer: its tokenizer; None where nobody is going to read or write text.
        name: what a profile calls it.
        dtype_reason: why it runs in its dtype.
    """
    model = unwrapped(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        device=device_of(model),
        dtype=model.dtype,
        dtype_reason=dtype_reason,
        end_tokens=_end_tokens(model, tokenizer, name),
        context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        spread=spread_of(model),
        sketch=sketch_of(model),  # now: a decoder may rearrange the weights
    )


def encode(
    loaded: LoadedModel, messages: list[dict[str, str]] | None, text: str | None
) -> list[int]:
    """The token ids of a conversation (by the chat template, up to the answer) or of a plain text.

    Raises:
        TooLongError: there are far more tokens than the model's context has room for.
        InputError: the model has no chat template, the template refuses the messages, no tokens
            come out, or some that the model doesn't know.
        ValueError: not exactly one of ``messages`` and ``text`` is given.
    """
    if (messages is None) == (text is None):
        raise ValueError("encode takes either messages or text")
    if messages is None:
        return _ids(loaded, text or "", special=True)
    if not loaded.has_chat_template:
        raise InputError(f"{loaded.name} has no chat template: give plain text (--raw)")
    try:
        made = render(loaded.tokenizer, messages)
    except InputError as error:
        raise InputError(
            f"the chat template of {loaded.name} refuses the messages: {error}"
        ) from error
    return made if isinstance(made, list) else _ids(loaded, made, special=False)


def _ids(loaded: LoadedModel, text: str, *, special: bool) -> list[int]:
    ids = token_ids(
        loaded.tokenizer,
        text,
        special=special,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        context=loaded.context_length,
        name=loaded.name,
    )
    if not ids:
        raise InputError("the prompt is empty: it gives no tokens")
    return ids


def fingerprint(config: PreTrainedConfig) -> dict[str, object]:
    """What identifies a model's shape: architecture, sizes, and a hash of the config.

    The hash (16 hexadecimal digits) covers what the layers compute. It is the same however the
    model was stored and whichever dtype it runs in, and changes with any size, activation or rotary
    setting. For a multimodal model all but ``architecture`` is about its text part.
    """
    text = config.get_text_config()
    heads = _first(text, "num_attention_heads")
    architectures = getattr(config, "architectures", None)
    return {
        "architecture": architectures[0] if architectures else type(config).__name__,
        "depth": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "attention_heads": heads,
        "key_value_heads": _first(text, "num_key_value_heads", "num_kv_heads") or heads,
        "intermediate_size": _first(text, "intermediate_size", "ffn_dim", "n_inner"),
        "vocabulary": getattr(text, "vocab_size", None),
        "config_hash": _config_hash(text),
    }


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of the sizes that is set. Families differ in their names for one thing.

    Where layers differ in it, the first layer's: how they differ is the hash's matter.
    """
    return next((sizes[0] for n in names if (sizes := sizes_by_layer(config, n))), None)


def _config_hash(config: PreTrainedConfig) -> str:
    # Only what differs from the class's defaults: a later transformers that knows one more setting
    # then gives the same hash.
    content = _canonical(config.to_diff_dict())
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Json:
    if isinstance(value, Mapping):
        items = ((str(k), v) for k, v in value.items())
        return {k: _canonical(v) for k, v in items if not _VOLATILE.fullmatch(k)}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float):
        # GGUF keeps float32, a config.json the decimal: 9.99999975e-06 and 1e-05 are one number.
        return float(f"{value:.6g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _find(source: str, progress: ProgressCallback | None) -> _Origin:
    """Where ``source`` is; a built-in model is converted if it was not yet."""
    if source in BUILTIN:
        return _Origin(source, str(ensure(source, progress)))
    path = Path(source).expanduser()
    if source and path.is_dir():
        if (adapter := find_adapter(str(path), {})) is not None:
            return _Origin(source, str(path), adapter=adapter)
        _check_folder(path, source)
        return _Origin(source, str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{source} is not a model: give a folder or a .gguf file")
        return _Origin(source, str(path.parent), gguf=path.name)
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
    except OSError:  # no such model, or no way to it: told when its configuration is read
        adapter = None
    return _Origin(source, source, on_hub=True, adapter=adapter)


def _check_folder(folder: Path, source: str) -> None:
    """Refuse a folder without a config or without safetensors."""
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


def _refusal(origin: _Origin, what: str, error: BaseException) -> InputError:
    """The one-line error for a file of the model that can't be read."""
    line = first_line(error)
    if origin.on_hub and isinstance(error, OSError):
        return InputError(
            f"cannot get {origin.source!r} from the Hugging Face Hub, and there is no such path: "
            f"{line} (built-in: {', '.join(BUILTIN)})"
        )
    remedy = f" (delete {origin.place} to convert it anew)" if origin.source in BUILTIN else ""
    return InputError(f"cannot read the {what} of {origin.source}: {line}{remedy}")


def _read_config(origin: _Origin, trust_remote_code: bool) -> PreTrainedConfig:
    """The config. Refuses what brings code of its own, and what is not a causal language model."""
    try:
        if origin.gguf is None and not origin.on_hub:
            check_json(Path(origin.place))
        raw = _raw_config(origin)
        if not trust_remote_code:
            check_config(raw, origin.source)
        if raw.get("auto_map") and not trust_remote_code:
            raise InputError(
                f"{origin.source} brings Python code of its own (auto_map in config.json): "
                "--trust-remote-code lets it run"
            )
        config = AutoConfig.from_pretrained(
            origin.place, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except _READ_ERRORS as error:
        raise _refusal(origin, "config", error) from error
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"the config of {origin.source} is broken: it names no number of layers")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and context < 1:
        raise InputError(
            f"the config of {origin.source} is broken: max_position_embeddings is {context}"
        )
    names = getattr(config, "architectures", None) or [type(config).__name__]
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{origin.source} is an encoder-decoder model ({names[0]}): not supported")
    is_ours = getattr(config, "model_type", None) in CONFIG_MAPPING
    has_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None
    if is_ours and not (has_class or "AutoModelForCausalLM" in raw.get("auto_map", {})):
        raise InputError(f"{origin.source} is not a causal language model ({names[0]})")
    if raw.get("architectures") and not any(name.endswith(GENERATIVE) for name in names):
        raise InputError(f"{origin.source} is not a causal language model ({names[0]})")
    return config


def _raw_config(origin: _Origin) -> dict[str, Any]:
    """The configuration as its file has it."""
    raw, _ = PreTrainedConfig.get_config_dict(origin.place, **origin.arguments)
    if not isinstance(raw, dict):
        raise ValueError("config.json holds no JSON object")
    return raw


def _check_files(origin: _Origin, config: PreTrainedConfig) -> None:
    """See that the weights can be the model's before it is made."""
    try:
        raw = _raw_config(origin)
        holds = stored(origin.place, origin.arguments, raw)
        if holds.odd:
            raise InputError(
                f"the weights of {origin.source} are broken: {holds.odd[0]} holds {holds.odd[1]}, "
                "which are no weights"
            )
        if not raw.get("auto_map"):
            check_size(config, holds, origin.source)
    except _READ_ERRORS as error:
        raise _refusal(origin, "weights", error) from error


def _read_model(
    origin: _Origin,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    spreading: Mapping[str, Any],
) -> PreTrainedModel:
    """The model, complete, without gradients: on the CPU, or as ``spreading`` has it spread."""
    safetensors = {} if origin.gguf else {"use_safetensors": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            origin.place,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Reported below instead of by an exception that names no weight.
            ignore_mismatched_sizes=True,
            **safetensors,
            **spreading,
            **origin.arguments,
        )
    except torch.OutOfMemoryError as error:
        raise ConfLayersError(f"{origin.source} does not fit into the devices' memory") from error
    except _READ_ERRORS as error:
        raise _refusal(origin, "weights", error) from error
    for fault, keys in (("missing", "missing_keys"), ("of another shape", "mismatched_keys")):
        if names := sorted(key if isinstance(key, str) else key[0] for key in info[keys]):
            raise InputError(
                f"the weights of {origin.source} don't fit its config: {len(names)} {fault}, "
                f"the first is {names[0]}"
            )
    if origin.gguf:
        clear_gguf_leftovers(model)
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    model.eval()
    model.requires_grad_(False)
    return model


def _read_tokenizer(origin: _Origin, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer. Refuses one that brings code of its own."""
    try:
        if origin.gguf is None and not trust_remote_code:
            told = get_tokenizer_config(origin.place, **origin.arguments)
            if told.get("auto_map"):
                raise InputError(
                    f"{origin.source} brings Python code of its own (auto_map in "
                    "tokenizer_config.json): --trust-remote-code lets it run"
                )
        return AutoTokenizer.from_pretrained(
            origin.place, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare ones
        raise _refusal(origin, "tokenizer", error) from error


def _to_device(model: PreTrainedModel, device: torch.device, source: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        advice = ""
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            advice = ": --device-map auto, or torchrun, spreads it over several devices"
        raise ConfLayersError(
            f"{source} does not fit into the memory of {device}{advice}"
        ) from error


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> frozenset[int]:
    """All ids that end a text, by the generation config, the config and the tokenizer."""
    text = model.config.get_text_config()
    ends: list[Any] = []
    for holder in (model.generation_config, model.config, text, tokenizer):
        named = getattr(holder, "eos_token_id", None)
        own = named if isinstance(named, list | tuple) else [named]
        if not all(end is None or isinstance(end, int) for end in own):
            raise InputError(
                f"{source} is broken: its end token (eos_token_id) is {str(named)[:60]!r}"
            )
        ends.extend(own)
    return frozenset(i for i in ends if isinstance(i, int) and 0 <= i < text.vocab_size)
