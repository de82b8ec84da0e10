"""The engine on somebody else's model, which between uses is what it was before.

While the engine decodes, a model's attention goes through the engine, and on a CPU linear layers
whose weights lie in the processor's order stand where its own were (see `engine.packing`); on a GPU
weights of one input are views of one tensor (see `engine.fused`). All of that is an exchange of
entries in the module tables, so it can be taken back and done again in no time, as long as both
weights are kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.loaded_model import LoadedModel, as_loaded
from conflayers_cli.models.peft_modules import unwrapped
from conflayers_cli.spec_decode.proposer import Proposer

_ATTRIBUTE = "conflayers_borrowed"
"""Where a model keeps its engine, so that the two end together."""
_ABSENT = object()
_SAMPLED = 4
"""Values of a weight that are looked at."""

_Table = MutableMapping[str, Any]


class Borrowed:
    """A model that the engine decodes with now and then.

    Args:
        model: a transformers causal language model.
        exact: as for `Decoder`.
        in_place: hold no weights twice. Then the model keeps the engine's between uses, too: it
            still computes the same, but for rounding, but can't be saved until it is
            :func:`release` d.

    Attributes:
        decoder, loaded: the engine's view of the model; to be used within :meth:`at_work`.
        drafters: what drafted before, by whoever uses this.

    Raises:
        InputError: as `Decoder`; the model is as it was.
    """

    def __init__(self, model: Any, *, exact: bool = True, in_place: bool = False) -> None:
        self.exact, self.in_place = exact, in_place
        self.drafters: dict[Hashable, Proposer | None] = {}
        self._lock = threading.RLock()
        self._users = 0
        self._training: list[nn.Module] = []
        tables = _tables(model, settings_only=in_place)
        before = [dict(table) for table in tables]
        self._model = model
        self._rest()
        try:
            self.decoder = Decoder(model, exact=exact)
        finally:
            # Also after a failure: whatever was done until then is taken back.
            self._swaps = list(_differences(tables, before))
            self._restore()
        name = getattr(model, "name_or_path", "") or type(model).__name__
        self.loaded: LoadedModel = as_loaded(model, None, name, f"{model.dtype}, as it is")
        self._state = _State(model)

    def fits(self, *, exact: bool, in_place: bool) -> bool:
        """Whether this is the way wanted, and the model still is what it was."""
        same = (self.exact, self.in_place) == (exact, in_place)
        return same and (self._users > 0 or self._state.holds(self._model))

    @contextmanager
    def at_work(self) -> Iterator[Decoder]:
        """Within: the model is the engine's, and in evaluation mode. Always restored.

        Hooks that somebody registered are called, for drafts and for several tokens at once, too.
        """
        with self._lock:
            if not self._users:
                for table, key, _, engines in self._swaps:
                    _put(table, key, engines)
                self._rest()
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

    def _rest(self) -> None:
        """Put the modules that are being trained into evaluation mode."""
        self._training = [module for module in self._model.modules() if module.training]
        for module in self._training:
            module.training = False

    def _restore(self) -> None:
        for table, key, own, _ in self._swaps:
            _put(table, key, own)
        for module in self._training:
            module.training = True
        self._training = []


class _Holder:
    """Keeps a model's engine. A copy of the model, in memory or in a pickle, has none."""

    def __init__(self, borrowed: Borrowed | None = None) -> None:
        self.borrowed = borrowed

    def __deepcopy__(self, memo: dict[int, Any]) -> _Holder:
        return _Holder()

    def __reduce__(self) -> tuple[type[_Holder], tuple[()]]:
        return _Holder, ()


def borrow(model: Any, *, exact: bool = True, in_place: bool = False) -> Borrowed:
    """The engine on a model, made at the first call and kept on the model for the next ones.

    It is made anew where weights, modules or hooks are not what they were. What changes a weight
    behind PyTorch's back, through ``.data``, is noticed by a few of its values: whoever changes
    others in such a way calls :func:`release`.

    Args:
        model, exact, in_place: as for `Borrowed`; the model may be a `PeftModel`, too.

    Raises:
        InputError: as `Decoder`; the model is as it was.
    """
    model = unwrapped(model)
    holder = vars(model).get(_ATTRIBUTE)
    borrowed = holder.borrowed if isinstance(holder, _Holder) else None
    if borrowed is None or not borrowed.fits(exact=exact, in_place=in_place):
        release(model)
        borrowed = Borrowed(model, exact=exact, in_place=in_place)
        setattr(model, _ATTRIBUTE, _Holder(borrowed))
    return borrowed


def release(model: Any) -> None:
    """Forget the engine on a model, with the memory it took; it is made again when it is needed.

    A model that was used ``in_place`` gets weights of its own back, which need no gradients.
    """
    model = unwrapped(model)
    holder = vars(model).pop(_ATTRIBUTE, None)
    if isinstance(holder, _Holder) and holder.borrowed is not None and holder.borrowed.in_place:
        packing = Packing.earlier(model)
        if packing is not None:
            packing.undo()


@dataclass(frozen=True)
class _Swap:
    """An entry of a table: what it is, and what it is while the engine is at work."""

    table: _Table
    key: str
    own: Any
    engines: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.table, self.key, self.own, self.engines))


class _State:
    """What a model was made of, so far as the engine depends on it."""

    def __init__(self, model: Any) -> None:
        self._parts = [(weakref.ref(part), _mark(part)) for part in _parts(model)]
        self._values = _values(model)

    def holds(self, model: Any) -> bool:
        """Whether the model still is made of it."""
        parts = list(_parts(model))
        same = len(parts) == len(self._parts) and all(
            ref() is part and mark == _mark(part)
            for part, (ref, mark) in zip(parts, self._parts, strict=True)
        )
        return same and _values(model) == self._values


def _parts(model: nn.Module) -> Iterator[nn.Module | torch.Tensor]:
    for module in model.modules():
        yield module
        yield from (weight for weight in module._parameters.values() if weight is not None)


def _mark(part: nn.Module | torch.Tensor) -> tuple[Any, ...]:
    """What changes when the part does."""
    if isinstance(part, nn.Module):
        hooks = (*part._forward_pre_hooks, *part._forward_hooks)
        return (*hooks, "forward" in vars(part))
    version = -1 if part.is_inference() else part._version
    place = part.data_ptr() if type(part) is nn.Parameter else 0  # quantised ones have several
    return version, part.dtype, part.device, place


def _values(model: nn.Module) -> list[float]:
    """A few values of every weight: merging an adapter, for one, changes them all."""
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
    """Note a config and those within it; they name the attention that is used."""
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
