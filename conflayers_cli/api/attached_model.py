"""The engine on a user's own model, which is restored between uses.

While the engine decodes, attention goes through it, and linear layers are packed (on a CPU, see
`kernels.packed_linear`) or merged (on a GPU). Both only exchange entries of the module tables, so
they are undone and redone at once, as long as both weights are kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.loaded_model import LoadedModel, wrap_model
from conflayers_cli.models.peft_modules import unwrap_peft
from conflayers_cli.spec_decode.proposer import Proposer

_ATTRIBUTE = "conflayers_engine"
"""Where a model keeps its engine, so that the two are freed together."""
_ABSENT = object()
_SAMPLED = 4
"""Values of each weight that are compared."""

_Table = MutableMapping[str, Any]


class AttachedEngine:
    """The engine on a user's model.

    Args:
        model: a transformers causal language model.
        exact: as for `Decoder`.
        in_place: hold no weights twice. The model keeps the engine's between uses: it computes the
            same, but for rounding, and can't be saved until :func:`release`.

    Attributes:
        decoder, loaded: the engine's view of the model; to be used within :meth:`active`.
        proposers: see `.proposers.get_proposer`.

    Raises:
        InputError: as `Decoder`; the model is as it was.
    """

    def __init__(self, model: Any, *, exact: bool = True, in_place: bool = False) -> None:
        self.exact, self.in_place = exact, in_place
        self.proposers: dict[Hashable, Proposer | None] = {}
        self._lock = threading.RLock()
        self._users = 0
        self._own: list[Any] = []
        self._training: list[nn.Module] = []
        tables = _tables(model, settings_only=in_place)
        before = [dict(table) for table in tables]
        self._model = model
        self._eval()
        try:
            self.decoder = Decoder(model, exact=exact)
        finally:
            self._swaps = list(_differences(tables, before))
            self._own = [swap.own for swap in self._swaps]
            self._restore()
        name = getattr(model, "name_or_path", "") or type(model).__name__
        self.loaded: LoadedModel = wrap_model(model, None, name, f"{model.dtype}, as it is")
        self._state = _ModelState(model)

    def is_current(self, *, exact: bool, in_place: bool) -> bool:
        """Whether it was made with these options, and the model has not changed since."""
        same = (self.exact, self.in_place) == (exact, in_place)
        return same and (self._users > 0 or self._state.matches(self._model))

    @contextmanager
    def active(self) -> Iterator[Decoder]:
        """Within: the model is the engine's, and in evaluation mode. Always restored.

        The user's hooks are called, for drafts and for several tokens at once, too.
        """
        with self._lock:
            if not self._users:
                # What is there now: the owner may have changed a setting since the last time.
                self._own = [table.get(key, _ABSENT) for table, key, _, _ in self._swaps]
                for table, key, _, engines in self._swaps:
                    _put(table, key, engines)
                self._eval()
            self._users += 1
        hooked = any(m._forward_pre_hooks or m._forward_hooks for m in self._model.modules())
        try:
            with self.decoder.stack.watching() if hooked else nullcontext():
                yield self.decoder
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._restore()

    def _eval(self) -> None:
        """Put the modules in training mode into evaluation mode."""
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def _restore(self) -> None:
        for (table, key, _, _), own in zip(self._swaps, self._own, strict=True):
            _put(table, key, own)
        for module in self._training:
            module.training = True
        self._training = []


class _Holder:
    """Keeps a model's engine, and is empty in copies and pickles of the model."""

    def __init__(self, engine: AttachedEngine | None = None) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> _Holder:
        return _Holder()

    def __reduce__(self) -> tuple[type[_Holder], tuple[()]]:
        return _Holder, ()


def attach(model: Any, *, exact: bool = True, in_place: bool = False) -> AttachedEngine:
    """The engine on a model (or `PeftModel`), made at the first call and kept on the model.

    It is made anew where weights, modules or hooks have changed. Changes through ``.data`` are only
    noticed by a few values of each weight: call :func:`release` after others. Arguments and errors
    as of `AttachedEngine`.
    """
    model = unwrap_peft(model)
    holder = vars(model).get(_ATTRIBUTE)
    engine = holder.engine if isinstance(holder, _Holder) else None
    if engine is None or not engine.is_current(exact=exact, in_place=in_place):
        release(model)
        engine = AttachedEngine(model, exact=exact, in_place=in_place)
        setattr(model, _ATTRIBUTE, _Holder(engine))
    return engine


def release(model: Any) -> None:
    """Free the engine on a model; it is made again when needed.

    A model that was used ``in_place`` gets weights of its own back, without gradients.
    """
    model = unwrap_peft(model)
    holder = vars(model).pop(_ATTRIBUTE, None)
    if isinstance(holder, _Holder) and holder.engine is not None and holder.engine.in_place:
        packing = Packing.existing(model)
        if packing is not None:
            packing.undo()


class _Swap(NamedTuple):
    """An entry of a table: its own value, and the engine's while that is active."""

    table: _Table
    key: str
    own: Any
    engines: Any


class _ModelState:
    """The modules and weights of a model that the engine depends on."""

    def __init__(self, model: Any) -> None:
        self._parts = [(weakref.ref(part), _version(part)) for part in _parts(model)]
        self._values = _values(model)

    def matches(self, model: Any) -> bool:
        """Whether the model still has them."""
        parts = list(_parts(model))
        same = len(parts) == len(self._parts) and all(
            ref() is part and version == _version(part)
            for part, (ref, version) in zip(parts, self._parts, strict=True)
        )
        return same and _values(model) == self._values


def _parts(model: nn.Module) -> Iterator[nn.Module | torch.Tensor]:
    for module in model.modules():
        yield module
        yield from (weight for weight in module._parameters.values() if weight is not None)


def _version(part: nn.Module | torch.Tensor) -> tuple[Any, ...]:
    """Changes when the part does."""
    if isinstance(part, nn.Module):
        hooks = (*part._forward_pre_hooks, *part._forward_hooks)
        return (*hooks, "forward" in vars(part))
    version = -1 if part.is_inference() else part._version
    address = part.data_ptr() if type(part) is nn.Parameter else 0  # quantised ones have several
    return version, part.dtype, part.device, address


def _values(model: nn.Module) -> list[float]:
    """A few values of every weight; merging an adapter, for one, changes them all."""
    found: dict[torch.device, list[torch.Tensor]] = {}
    for weight in model.parameters():
        known = type(weight) is nn.Parameter and weight.numel() and not weight.is_meta
        if known and weight.is_contiguous() and weight.is_floating_point():
            flat = weight.detach().view(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
            found.setdefault(weight.device, []).append(some.float())
    return [value for some in found.values() for value in torch.cat(some).tolist()]


def _tables(model: Any, settings_only: bool) -> list[_Table]:
    """All tables whose entries the engine may exchange."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        _gather(getattr(module, "config", None), configs)
    settings: list[_Table] = [vars(config) for config in configs.values()]
    if settings_only:
        return settings
    modules = [t for module in model.modules() for t in (module._modules, module._parameters)]
    return [*settings, *modules, vars(model)]


def _gather(config: Any, configs: dict[int, Any]) -> None:
    """Collect a config and its sub-configs; they name the attention that is used."""
    if config is None or id(config) in configs:
        return
    configs[id(config)] = config
    for name in getattr(config, "sub_configs", None) or ():
        _gather(getattr(config, name, None), configs)


def _differences(tables: list[_Table], before: list[dict[str, Any]]) -> Iterator[_Swap]:
    for table, old in zip(tables, before, strict=True):
        for key in {**old, **table}:
            own, engines = old.get(key, _ABSENT), table.get(key, _ABSENT)
            if own is not engines:
                yield _Swap(table, key, own, engines)


def _put(table: _Table, key: str, value: Any) -> None:
    if value is _ABSENT:
        table.pop(key, None)
    else:
        table[key] = value
