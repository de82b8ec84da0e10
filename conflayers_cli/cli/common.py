"""What the commands share: opening a model, fitting a profile and prompts to it.

Options are in :mod:`.options`, output in :mod:`.terminal`. Heavy modules are imported
inside the functions, so that ``--help`` stays quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError
from conflayers_cli.utils.progress import ProgressCallback, progress_bar

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Environment, ModelFingerprint, Profile
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


_ADVICE = "(truncate shortens it)"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it, and how many new tokens it has room for.

    ``truncated`` tokens of its text were left out so that there is room.
    """

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int
    truncated: int = 0


@dataclass(frozen=True)
class Loading:
    """How a model is to be loaded and run; the fields are the options of these names."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    exact: bool = True
    device_map: str | None = None
    compiled: bool = False
    quantize: str | None = None
    merge_adapter: bool | None = None


def open_model(
    source: str,
    how: Loading | None = None,
    look: Callable[[LoadedModel], None] | None = None,
) -> tuple[LoadedModel, Decoder]:
    """Load a model and make it ready to be decoded with; a bar on stderr shows how far it is.

    Args:
        source: names the model.
        how: it is loaded and run.
        look: shown the model as it was loaded, before its weights may be packed.

    Raises:
        InputError: no such model, device or dtype; one that can't be spread as wanted; or the model
            can't be decoded exactly.
        ConfLayersError: it does not fit into the memory, or can't be converted.
    """
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loader import load_model
    from conflayers_cli.utils.out_of_memory import explained

    how = how or Loading()
    short = explained(
        f"the weights of {source}",
        "dtype bfloat16, quantize int8 or int4, or device_map auto takes less",
        names=("dtype bfloat16", "quantize int8", "device_map auto"),
    )
    with progress_bar() as on_progress, short:
        loaded = load_model(
            source,
            device=how.device,
            dtype=how.dtype,
            trust_remote_code=how.trust_remote_code,
            device_map=how.device_map,
            quantize=how.quantize,
            merge_adapter=how.merge_adapter,
            progress=on_progress,
        )
        if look is not None:
            look(loaded)
        decoder = Decoder(loaded.model, exact=how.exact)
        if how.compiled:
            _compile(decoder, on_progress)
    lengths = [n for n in (loaded.context_length, decoder.exact_positions) if n is not None]
    return replace(loaded, context_length=min(lengths, default=None)), decoder


def _compile(decoder: Decoder, on_progress: ProgressCallback) -> None:
    """Have the decoder's forward compiled; what the compiler makes is kept with our own files."""
    from conflayers_cli.engine.compile import compile_forward
    from conflayers_cli.models.registry import COMPILED, cache_folder

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / COMPILED))
    on_progress("compiling", 0.0)
    compilation = compile_forward(decoder)
    on_progress("compiling", 1.0)
    if not compilation.used:
        logger.warning(f"note: {compilation.reason}")


def load_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        InputError: the file can't be read or is no profile.
    """
    from conflayers_cli.profile.schema import Profile

    return Profile.load(path)


def fingerprint_of(loaded: LoadedModel) -> ModelFingerprint:
    """What a profile says about this model.

    Raises:
        InputError: the model's configuration lacks a size that a profile needs.
    """
    from pydantic import ValidationError

    from conflayers_cli.models.fingerprint import fingerprint
    from conflayers_cli.profile.schema import ModelFingerprint

    values = fingerprint(loaded.model.config)
    if loaded.sketch is not None:
        values["sketch"] = asdict(loaded.sketch)
    try:
        return ModelFingerprint.model_validate({"name": loaded.name, **values})
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise InputError(f"{loaded.name}: its configuration has no usable {missing}") from None


def environment_of(loaded: LoadedModel) -> Environment:
    """Where a profile's figures come from: this model, here."""
    import torch

    from conflayers_cli.profile.schema import Environment
    from conflayers_cli.utils.environment import device_name, versions

    device = device_name(loaded.device)
    return Environment(
        device=f"{device}, {loaded.spread}" if loaded.spread else device,
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if loaded.device.type == "cpu" else None,
        **versions(),
    )


def model_source(model: str | None, profile: Profile | None) -> str:
    """Where the model comes from: ``--model``, else the profile.

    Raises:
        InputError: neither is given.
    """
    if model is not None:
        return model
    if profile is None:
        raise InputError(
            "no model: give profile FILE (what calibrate wrote), "
            "or model MODEL to decode without one",
            names=("profile FILE", "model MODEL"),
        )
    return profile.model.name


def sampling_from(
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
) -> SamplingParams:
    """The sampling settings of the command line, in the order of its options, checked.

    Raises:
        InputError: a value is outside its range.
    """
    from conflayers_cli.sampling_params import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    given = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    idle = [name for name, value in given.items() if value is not None]
    if sampling.greedy and idle:
        changes = f"note: {', '.join(idle)} changes nothing at temperature 0"
        logger.warning(changes, extra={"names": (*idle, "temperature")})
    return sampling


def read_prompt_file(path: Path | None, max_prompts: int | None) -> list[Prompt]:
    """The prompts of a file, or those that come with the package; the first ``max_prompts``.

    Raises:
        InputError: the file can't be read, or a line of it is no prompt.
    """
    from conflayers_cli.prompts import builtin_prompts, read_prompts

    prompts = builtin_prompts() if path is None else read_prompts(path)
    return prompts[:max_prompts]


def encode_prompt(loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool) -> list[int]:
    """The token ids of a prompt: by the chat template of models that have one, unless ``raw``.

    Raises:
        InputError: the template refuses the messages, or no tokens come out.
    """
    from conflayers_cli.models.tokenization import encode
    from conflayers_cli.prompts import as_messages, plain_text

    if raw or not loaded.has_chat_template:
        return encode(loaded, None, plain_text(prompt, system))
    return encode(loaded, as_messages(prompt, system), None)


def encode_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    truncate: bool = False,
) -> list[EncodedPrompt]:
    """Encode prompts and check that the model's context has room for them.

    Where a prompt leaves less room than ``max_new_tokens``, it gets what there is, and a note says
    so once; with ``truncate`` the prompt is shortened, and a note says by how much. Half of the
    context is the most that is kept free for the answer.

    Raises:
        InputError: a prompt can't be encoded or fills the context; it is named.
    """
    from conflayers_cli.models.tokenization import TooLongError

    context = loaded.context_length
    encoded = []
    for prompt in prompts:
        which = f"prompt {prompt.id}" if len(prompts) > 1 else "the prompt"
        left_out = 0
        try:
            if truncate and context is not None:
                most = context - min(max_new_tokens, context // 2)
                tokens, left_out = _shortened(loaded, prompt, system, raw, most)
            else:
                tokens = encode_prompt(loaded, prompt, system, raw)
        except TooLongError as error:
            raise InputError(
                f"{which} {error.told} {_ADVICE}", names=("truncate shortens",)
            ) from error
        except InputError as error:
            raise InputError(f"{which}: {error}", names=error.names) from error
        room = sys.maxsize if context is None else context - len(tokens)
        if room < 1:
            raise InputError(
                f"{which} is too long: {len(tokens):,} tokens, and {loaded.name} takes "
                f"{context:,}, the answer included {_ADVICE}",
                names=("truncate shortens",),
            )
        if left_out:
            logger.warning(
                f"note: {left_out:,} tokens of {which} were left out, {len(tokens):,} are kept"
            )
        budget = min(max_new_tokens, room)
        encoded.append(EncodedPrompt(prompt.id, prompt.category, tuple(tokens), budget, left_out))
    _tell_cut(loaded, [prompt.max_new_tokens for prompt in encoded], max_new_tokens)
    return encoded


def _shortened(
    loaded: LoadedModel, prompt: Prompt, system: str | None, raw: bool, most: int
) -> tuple[list[int], int]:
    """The tokens of a prompt, ``most`` of them at the most, and how many of its text's are not
    among them.
    """
    from conflayers_cli.fitting import fit, texts_of
    from conflayers_cli.models.tokenization import count_tokens, encode
    from conflayers_cli.prompts import Message, Prompt, as_messages, plain_text

    if raw or not loaded.has_chat_template:
        whole = Prompt(prompt.id, text=plain_text(prompt, system))
    else:
        chat = (Message(**message) for message in as_messages(prompt, system))
        whole = Prompt(prompt.id, messages=tuple(chat))

    def tokens_of(part: Prompt) -> list[int]:
        return encode(loaded, as_messages(part) if part.messages else None, part.text)

    fitted = fit(whole, tokens_of, most)
    if fitted.prompt == whole:
        return fitted.tokens, 0
    before, after = (
        sum(count_tokens(loaded.tokenizer, text) for text in texts_of(part))
        for part in (whole, fitted.prompt)
    )
    return fitted.tokens, max(before - after, 1)


def _tell_cut(loaded: LoadedModel, budgets: Sequence[int], wanted: int) -> None:
    cut = [budget for budget in budgets if budget < wanted]
    if not cut:
        return
    which = (
        f"{len(cut)} of {len(budgets)} prompts leave" if len(budgets) > 1 else "the prompt leaves"
    )
    logger.warning(
        f"note: {which} room for {min(cut):,} new tokens{' or more' if len(cut) > 1 else ''} "
        f"instead of {wanted:,} in the context of {loaded.name} ({loaded.context_length:,} tokens)"
    )
