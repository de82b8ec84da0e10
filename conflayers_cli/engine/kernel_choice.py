"""Which kernels run an attached model's passes: packed weights, a fused forward, or its modules.

Each is used only where it gives the logits that the modules give, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from subprocess import SubprocessError

from conflayers_cli.engine.attach import (
    FORWARD_ERRORS,
    SAMPLE_TOKENS,
    Attachment,
    forward,
    logits_match,
    sample_input,
)
from conflayers_cli.engine.forward import AnyForward
from conflayers_cli.engine.native_threads import choose_threads
from conflayers_cli.kernels.fused_forward import FAMILIES, FusedForward
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.kernels.native_layers import NativeLinear, packed_before
from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.kernels.triton_forward import KernelForward
from conflayers_cli.utils.error_text import first_line, triton_errors

# The latter of triton, which builds with a C compiler that may be missing.
_NOT_FUSED = (*FORWARD_ERRORS, ImportError, OSError, SubprocessError)


@dataclass(frozen=True, eq=False)
class KernelChoice:
    """What runs passes.

    Attributes:
        packing: the packed weights; None: the model has its own.
        fused: the forward used instead of the model's modules; None: the modules run.
        flash: whether fused passes use the attention kernel for few queries.
        disabled_paths: ways of running passes that failed here, and why.
        no_native: why the native library's kernels are not used; empty: they are.
    """

    packing: Packing | None
    fused: AnyForward | None
    flash: bool
    disabled_paths: tuple[str, ...]
    no_native: str = ""


def choose_kernels(attached: Attachment, *, recorded: bool = False) -> KernelChoice:
    """Pack a model's weights, and find it a fused forward, where that is right.

    ``recorded``: passes will be recorded, so that PyTorch has to run them.
    """
    native, reason = (None, "passes are recorded") if recorded else choose_native(attached)
    if native is not None:
        return native
    packing = pack_weights(attached)
    fused, flash, disabled_paths = choose_forward(attached)
    return KernelChoice(packing, fused, flash, disabled_paths, reason)


def choose_native(attached: Attachment) -> tuple[KernelChoice | None, str]:
    """The native library's kernels; None where they can't run the model: then why not."""
    if (reason := native_reason(attached)) is not None:
        return None, reason
    model, layers = attached.model, attached.stack.layers
    packing = Packing.reuse(model, NativeLinear)
    try:
        packing = packing or Packing(model, layers, NativeLinear)
        native = NativeForward(model, layers, attached.config, packed_before)
        if gives_modules_logits(attached, native, flash=False):
            native.threads = choose_threads(attached, native)
            return KernelChoice(packing, native, False, ()), ""
        reason = "they give other logits than the model's modules"
    except _NOT_FUSED as error:
        reason = first_line(error)
    if packing is not None:
        packing.undo()
    return None, f"this model's layers are not those that native kernels know: {reason}"


def native_reason(attached: Attachment) -> str | None:
    """Why native kernels are not tried for a model; None: they are."""
    family = getattr(attached.config, "model_type", None)
    if attached.passes.device.type != "cpu" or attached.spread:
        return "native kernels are for models on one CPU"
    if family not in FAMILIES:
        return f"native kernels don't know models of type {family}"
    return unavailable_reason()


def pack_weights(attached: Attachment) -> Packing | None:
    """Pack the weights where that is possible, not slower, and gives the model's logits."""
    packing = Packing.create(attached.model, attached.stack.layers)
    if packing is None:
        return None
    try:
        right = logits_match(attached.model, attached.sample_logits(), attached.expected)
    except FORWARD_ERRORS:
        right = False
    if right:
        return packing
    packing.undo()
    return None


def choose_forward(attached: Attachment) -> tuple[FusedForward | None, bool, tuple[str, ...]]:
    """The first fused forward that gives the modules' logits; None: no forward does.

    Returns:
        (forward, whether with the attention kernel for few queries, ways that failed and why).
    """
    passes, config = attached.passes, attached.config
    if getattr(config, "model_type", None) not in FAMILIES or attached.spread:
        return None, passes.flash, ()
    candidates: list[tuple[type[FusedForward], bool]] = [(FusedForward, False)]
    if passes.flash:
        candidates.insert(0, (FusedForward, True))
    if KernelForward.unsupported_reason(passes.device, attached.model.dtype, config) is None:
        candidates.insert(0, (KernelForward, passes.flash))
    errors: tuple[type[Exception], ...] = (*_NOT_FUSED, *triton_errors())
    disabled: list[str] = []
    for kind, flash in candidates:
        try:
            fused = kind(attached.model, attached.stack.layers, config)
            if gives_modules_logits(attached, fused, flash=flash):
                return fused, flash, tuple(disabled)
        except errors as error:
            disabled.append(f"{kind.__name__}: {first_line(error)}")
    return None, False, tuple(disabled)


def gives_modules_logits(attached: Attachment, fused: AnyForward, *, flash: bool) -> bool:
    """Whether a fused forward, with the attention kernel or without, gives the modules' logits but
    for rounding. Raises whatever the forward raises."""
    passes, cache = attached.passes, attached.new_cache(SAMPLE_TOKENS)
    tokens, positions = sample_input(attached.model)
    with attached.stack.watching():
        expected = forward(attached.runner, tokens, positions, cache)
    with attached.stack.lock, passes.using(fused, flash=flash):
        logits = forward(attached.runner, tokens, positions, cache)
    return logits_match(attached.model, logits, expected)
