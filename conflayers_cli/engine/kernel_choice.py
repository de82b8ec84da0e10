"""Which kernels run an attached model's passes: packed weights, a fused forward, its own modules.

Each is taken only where it gives the logits that the modules give, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from subprocess import SubprocessError

from conflayers_cli.engine.attach import SAMPLE, Attachment, forward, sample, similar
from conflayers_cli.kernels.fused_forward import FAMILIES, FusedForward
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.kernels.triton_forward import KernelForward
from conflayers_cli.models.support import triton_errors
from conflayers_cli.utils.error_text import first_line

# Of our own code, PyTorch and triton, which builds with a C compiler that may not be there.
_NOT_FUSED = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    ImportError,
    OSError,
    SubprocessError,
)


@dataclass(frozen=True, eq=False)
class KernelChoice:
    """What passes are run by.

    Attributes:
        packing: the packed weights that stand in for the model's own; None: it has its own.
        fused: the forward to use in place of the model's modules; None: the modules run.
        flash: whether fused passes use the attention kernel for few queries.
        disabled_paths: ways of running passes that failed here, and why.
    """

    packing: Packing | None
    fused: FusedForward | None
    flash: bool
    disabled_paths: tuple[str, ...]


def choose_kernels(attached: Attachment) -> KernelChoice:
    """Pack a model's weights where that is possible and right, and find it a fused forward."""
    packing = pack_weights(attached)
    fused, flash, disabled_paths = choose_forward(attached)
    return KernelChoice(packing, fused, flash, disabled_paths)


def pack_weights(attached: Attachment) -> Packing | None:
    """Pack the weights where that is possible, not slower, and gives the model's logits."""
    packing = Packing.of(attached.model, attached.stack.layers)
    if packing is None:
        return None
    try:
        right = similar(attached.model, attached.sample_logits(), attached.expected)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        right = False
    if right:
        return packing
    packing.undo()
    return None


def choose_forward(attached: Attachment) -> tuple[FusedForward | None, bool, tuple[str, ...]]:
    """The first way of running passes fused that gives the modules' logits.

    Returns:
        (forward, whether with the attention kernel for few queries, ways that failed and why); the
        forward is None where there is none for this model, or none is right.
    """
    passes, config = attached.passes, attached.config
    if getattr(config, "model_type", None) not in FAMILIES or attached.spread:
        return None, passes.flash, ()
    ways: list[tuple[type[FusedForward], bool]] = [(FusedForward, False)]
    if passes.flash:
        ways.insert(0, (FusedForward, True))
    if KernelForward.why_not(passes.device, attached.model.dtype, config) is None:
        ways.insert(0, (KernelForward, passes.flash))
    errors: tuple[type[Exception], ...] = (*_NOT_FUSED, *triton_errors())
    disabled: list[str] = []
    for kind, flash in ways:
        try:
            fused = kind(attached.model, attached.stack.layers, config)
            if gives_modules_logits(attached, fused, flash=flash):
                return fused, flash, tuple(disabled)
        except errors as error:
            disabled.append(f"{kind.__name__}: {first_line(error)}")
    return None, False, tuple(disabled)


def gives_modules_logits(attached: Attachment, fused: FusedForward, *, flash: bool) -> bool:
    """Whether a fused forward gives the logits that the modules give, but for rounding.

    Args:
        attached: the model.
        fused: the forward.
        flash: whether it is to use the attention kernel for few queries.

    Raises:
        whatever the forward raises.
    """
    passes, cache = attached.passes, attached.new_cache(SAMPLE)
    tokens, positions = sample(attached.config.vocab_size)
    with attached.stack.watching():
        expected = forward(attached.runner, tokens, positions, cache)
    with attached.stack.lock, passes.using(fused, flash=flash):
        logits = forward(attached.runner, tokens, positions, cache)
    return similar(attached.model, logits, expected)
