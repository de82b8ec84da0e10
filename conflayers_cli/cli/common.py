"""What the commands share: opening a model, fitting a profile and prompts to it.

Options are in :mod:`.options`, output and progress in :mod:`.terminal`. Heavy modules are imported
inside the functions, so that ``--help`` stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from conflayers_cli.cli.terminal import note, progress_bar
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.engine.costs import Costs
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.draft import Drafter
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.engine.sampling import Sampling
    from conflayers_cli.engine.tree import TreeShape
    from conflayers_cli.profile import DraftSettings, Environment, ModelFingerprint, Profile
    from conflayers_cli.prompts import Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it, and how many new tokens it has room for."""

    id: str
    category: str | None
    tokens: tuple[int, ...]
    max_new_tokens: int


def open_model(
    source: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[LoadedModel, Decoder]:
    """Load a model and make it ready to be decoded with; a bar on stderr shows how far it is.

    Raises:
        InputError: no such model, device or dtype; or the model can't be decoded exactly.
        ConfLayersError: it does not fit into the memory, or can't be converted.
    """
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.model import load_model

    with progress_bar() as tell:
        loaded = load_model(
            source,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=tell,
        )
        decoder = Decoder(loaded.model)
    lengths = [n for n in (loaded.context_length, decoder.exact_positions) if n is not None]
    return replace(loaded, context_length=min(lengths, default=None)), decoder


def load_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        InputError: the file can't be read or is no profile.
    """
    from conflayers_cli.profile import Profile

    return Profile.load(path)


def fingerprint_of(loaded: LoadedModel) -> ModelFingerprint:
    """What a profile says about this model.

    Raises:
        InputError: the model's configuration lacks a size that a profile needs.
    """
    from pydantic import ValidationError

    from conflayers_cli.engine.model import fingerprint
    from conflayers_cli.profile import ModelFingerprint

    values = fingerprint(loaded.model.config)
    try:
        return ModelFingerprint.model_validate({"name": loaded.name, **values})
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise InputError(f"{loaded.name}: its configuration has no usable {missing}") from None


def environment_of(loaded: LoadedModel) -> Environment:
    """Where a profile's figures come from: this model, here."""
    import torch

    from conflayers_cli.environment import device_name, versions
    from conflayers_cli.profile import Environment

    return Environment(
        device=device_name(loaded.device),
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
            "no model: give --profile FILE (what calibrate wrote), "
            "or --model MODEL to decode without drafts"
        )
    return profile.model.name


def drafter_for(
    loaded: LoadedModel,
    decoder: Decoder,
    profile: Profile | None,
    path: Path | None,
    force: bool,
    *,
    tree: bool | None = None,
    greedy: bool = True,
) -> Drafter | None:
    """The profile's drafter for this model; None (vanilla) where it has nothing to leave out.

    Args:
        loaded, decoder: the model.
        profile, path: the profile and the file it was read from.
        force: go on with a profile of another model of the same depth.
        tree: draft side candidates, whatever the profile says about them; None: as it says.
        greedy: whether tokens are chosen greedily, for the papers' shape of a tree.

    Raises:
        InputError: the profile was made for another model, or this one can't run under its plan.
    """
    if profile is None:
        return None
    _check_fit(loaded, decoder, profile, path, force)
    sections = [(0, profile.plan, profile.draft)]
    sections += [(each.from_context, each.skip.plan, each.draft) for each in profile.ranges or ()]
    drafting = [plan for _, plan, draft in sections if plan and draft.max_tokens]
    if not drafting:
        return None
    _tell_other_machine(loaded, profile)
    from conflayers_cli.engine.draft import SkipDrafter
    from conflayers_cli.engine.ranges import RangedDrafter

    shapes = [_tree_shape(draft, tree, greedy) for _, _, draft in sections]
    costs = _costs_of_wider_passes(decoder) if any(shapes) else None
    drafters: list[tuple[int, Drafter | None]] = []
    for (begin, plan, draft), shape in zip(sections, shapes, strict=True):
        drafter = SkipDrafter(decoder, plan, draft.max_tokens, draft.stop_probability)
        if shape is not None and costs is not None:
            drafter = replace(
                drafter,
                tree=shape,
                verify_cost=costs.verify_cost,
                draft_seconds=costs.draft_cost(plan, decoder.depth),
            )
        drafters.append((begin, drafter if plan in drafting and draft.max_tokens else None))
    return RangedDrafter(tuple(drafters)) if len(drafters) > 1 else drafters[0][1]


def _tree_shape(draft: DraftSettings, tree: bool | None, greedy: bool) -> TreeShape | None:
    """The side candidates wanted: the profile's, or the papers' where they are asked for."""
    from conflayers_cli.engine.tree import GREEDY_SHAPE, SAMPLING_SHAPE, TreeShape

    if tree is False or (tree is None and draft.tree is None):
        return None
    if draft.tree is not None:
        return TreeShape(draft.tree)
    return GREEDY_SHAPE if greedy else SAMPLING_SHAPE


def _costs_of_wider_passes(decoder: Decoder) -> Costs:
    """What passes cost here, so that only side candidates that earn theirs are verified."""
    from conflayers_cli.engine.costs import measure_costs

    note("measuring what wider passes cost …")
    return measure_costs(decoder, rounds=2, growth=False)


def _tell_other_machine(loaded: LoadedModel, profile: Profile) -> None:
    """A note where the profile's figures were measured in another dtype or on another device."""
    if profile.environment is None:
        return
    here = (loaded.device.type, str(loaded.dtype).removeprefix("torch."))
    there = (profile.environment.device.split(" ")[0].split(":")[0], profile.environment.dtype)
    if here != there:
        note(
            f"note: the profile was measured on {' in '.join(there)}, this is {' in '.join(here)}: "
            "what it gains here is not known (conflayers bench tells)"
        )


def _check_fit(
    loaded: LoadedModel, decoder: Decoder, profile: Profile, path: Path | None, force: bool
) -> None:
    difference = fingerprint_of(loaded).difference(profile.model)
    if difference:
        problem = f"{path}: was made for another model than {loaded.name}: {difference}"
        if profile.model.depth != decoder.depth:
            raise InputError(problem)
        if not force:
            raise InputError(f"{problem} (--force goes on all the same)")
        note(f"warning: {problem}")
    try:
        for plan in (profile.plan, *(each.skip.plan for each in profile.ranges or ())):
            decoder.check_plan(plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def sampling_from(
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int,
) -> Sampling:
    """The sampling settings of the command line, in the order of its options, checked.

    Raises:
        InputError: a value is outside its range.
    """
    from conflayers_cli.engine.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    flags = {"--top-p": top_p, "--top-k": top_k, "--min-p": min_p}
    idle = [flag for flag, value in flags.items() if value is not None]
    if sampling.greedy and idle:
        note(f"note: {', '.join(idle)} changes nothing at --temperature 0")
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
    from conflayers_cli.engine.model import encode
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
) -> list[EncodedPrompt]:
    """Encode prompts and check that the model's context has room for them.

    Where a prompt leaves less room than ``max_new_tokens``, it gets what there is, and a note says
    so once.

    Raises:
        InputError: a prompt can't be encoded or fills the context; it is named.
    """
    encoded = []
    for prompt in prompts:
        which = f"prompt {prompt.id}" if len(prompts) > 1 else "the prompt"
        try:
            tokens = encode_prompt(loaded, prompt, system, raw)
        except InputError as error:
            raise InputError(f"{which}: {error}") from error
        room = sys.maxsize
        if loaded.context_length is not None:
            room = loaded.context_length - len(tokens)
        if room < 1:
            raise InputError(
                f"{which} is too long: {len(tokens):,} tokens, and {loaded.name} takes "
                f"{loaded.context_length:,}, the answer included"
            )
        budget = min(max_new_tokens, room)
        encoded.append(EncodedPrompt(prompt.id, prompt.category, tuple(tokens), budget))
    _tell_cut(loaded, [prompt.max_new_tokens for prompt in encoded], max_new_tokens)
    return encoded


def _tell_cut(loaded: LoadedModel, budgets: Sequence[int], wanted: int) -> None:
    cut = [budget for budget in budgets if budget < wanted]
    if not cut:
        return
    which = (
        f"{len(cut)} of {len(budgets)} prompts leave" if len(budgets) > 1 else "the prompt leaves"
    )
    note(
        f"note: {which} room for {min(cut):,} new tokens{' or more' if len(cut) > 1 else ''} "
        f"instead of {wanted:,} in the context of {loaded.name} ({loaded.context_length:,} tokens)"
    )
