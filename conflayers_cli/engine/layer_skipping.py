"""Finding a model's decoder layers and leaving some of them out for the length of a forward.

The model stays the transformers class it is. A whole layer is replaced by a pass-through, a
sub-layer by a stub of zeros, in the module tables themselves, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from conflayers_cli.engine.model_lock import lock_of
from conflayers_cli.errors import InputError
from conflayers_cli.kernels.int4_linear import Int4Weights
from conflayers_cli.models.structure import find_layers
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed

SubLayer = Literal["attention", "mlp"]
LayerCall = Callable[[torch.Tensor], torch.Tensor]
"""A layer as the model is calling it: hidden states → hidden states, all else as the model says."""
InPlace = Callable[[int, torch.Tensor, LayerCall], torch.Tensor]
"""What runs in place of a layer: (its index, the hidden states it is given, the layer) → what the
model goes on with."""

_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
_KEPT_PLANS = 64
"""Plans whose swaps are kept ready; a search goes through hundreds."""

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class _PassThrough(nn.Module):
    """Stands where a whole layer is left out. ``arity`` 0 returns a tensor, n an n-tuple.

    What the model reads off a layer before calling it (``attention_type``) is the original's.
    """

    def __init__(self, arity: int, original: nn.Module) -> None:
        super().__init__()
        self.arity = arity
        self._original = (original,)  # in a tuple, so that it is not registered as a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.arity == 0:
            return hidden_states
        return (hidden_states, *(None,) * (self.arity - 1))


class _InPlace(_PassThrough):
    """Stands where a whole layer is, and lets a function decide what becomes of the call."""

    def __init__(self, arity: int, original: nn.Module, index: int, run: InPlace) -> None:
        super().__init__(arity, original)
        self.index = index
        self.run = run

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            output = self._original[0](hidden, *args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            return agreed(states.to(hidden.device))

        return super().forward(self.run(self.index, hidden_states, call))


class _Once(nn.Module):
    """Stands where a sub-layer is: given the same hidden states as last time, it answers the same
    without computing it anew."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is not registered as a child
        self._last: tuple[torch.Tensor, Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        if self._last is None or not torch.equal(self._last[0], given):
            self._last = given, self._original[0](*args, **kwargs)
        return self._last[1]


class _Zero(nn.Module):
    """Stands where a sub-layer is left out: adds nothing to the residual stream."""

    def __init__(self, arity: int, zero: torch.Tensor) -> None:
        super().__init__()
        self.arity = arity
        self.zero = zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        if given is not None and given.device != self.zero.device:  # of a model on several
            self.zero = torch.zeros_like(self.zero, device=given.device)
        return self.zero if self.arity == 0 else (self.zero, *(None,) * (self.arity - 1))


@dataclass(frozen=True)
class _Swap:
    table: MutableMapping[str, Any]
    key: str
    replacement: nn.Module
    original: nn.Module


@contextmanager
def _swapped(swaps: tuple[_Swap, ...]) -> Iterator[None]:
    """Within: the replacements are in place. Always restored."""
    try:
        for swap in swaps:
            swap.table[swap.key] = swap.replacement
        yield
    finally:
        for swap in swaps:
            swap.table[swap.key] = swap.original


class LayerStack:
    """The decoder layers of a model and the means to leave some out.

    Args:
        model: a transformers causal language model.

    Attributes:
        lock: held by whoever runs a pass, or is at work on the modules.
        int4: the layers' weights rounded to four bits, for drafts that ask for them.

    Raises:
        InputError: no list of decoder layers can be found in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lock = lock_of(model)
        self._list = find_layers(model)
        self.layers: tuple[nn.Module, ...] = tuple(self._list)
        self.depth = len(self.layers)
        self.int4 = Int4Weights(model, self.layers)
        self.attention_name = _common_child(self.layers, _ATTENTION_NAMES)
        self.mlp_name = _common_child(self.layers, _MLP_NAMES)
        like = next(p for p in model.parameters() if p.is_floating_point())
        # Made once: in the middle of a recorded pass it would be the recording's.
        self._zero = torch.zeros((1, 1, 1), dtype=like.dtype, device=like.device)
        self._arity: dict[nn.Module, int] = {}
        self._swaps: dict[SkipPlan, tuple[_Swap, ...]] = {}
        self.watched = 0
        """How many are at work on the modules: then these must run, whatever could replace them."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: the modules themselves run, and in this thread alone."""
        with self.lock:
            self.watched += 1
            try:
                yield
            finally:
                self.watched -= 1

    def sub_layer(self, kind: SubLayer, layer: int) -> nn.Module | None:
        """The attention or MLP module of a layer, None where the model has no such child."""
        name = self.attention_name if kind == "attention" else self.mlp_name
        return None if name is None else self.layers[layer].get_submodule(name)

    @contextmanager
    def learning_shapes(self) -> Iterator[None]:
        """Within: every module that runs is noted with the form of what it returns."""
        watched = [
            m for i, layer in enumerate(self.layers) for m in (layer, *self._children(i)) if m
        ]

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._arity[module] = len(output) if isinstance(output, tuple) else 0

        handles = [module.register_forward_hook(note) for module in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._swaps.clear()

    def output_of(self, kind: SubLayer, layer: int) -> nn.Module | None:
        """The module whose output is added to the residual stream, None where there is none.

        That is the sub-layer itself, or the norm behind it in families that have one (Gemma 2 and
        3, OLMo 2).
        """
        children = self.layers[layer]._modules
        if "post_feedforward_layernorm" in children:
            name = "attention" if kind == "attention" else "feedforward"
            return children.get(f"post_{name}_layernorm")
        return self.sub_layer(kind, layer)

    def _children(self, layer: int) -> tuple[nn.Module, ...]:
        found = (self.sub_layer("attention", layer), self.sub_layer("mlp", layer))
        return tuple(m for m in found if m is not None)

    @contextmanager
    def without(self, plan: SkipPlan) -> Iterator[None]:
        """Within: the model runs with the plan's sub-layers left out. Always restored."""
        if not plan:
            yield
            return
        swaps = self._swaps.get(plan)
        if swaps is None:
            if len(self._swaps) >= _KEPT_PLANS:
                self._swaps.clear()
            swaps = self._swaps[plan] = tuple(self._swaps_of(plan))
        with _swapped(swaps):
            yield

    def _swaps_of(self, plan: SkipPlan) -> Iterator[_Swap]:
        for i in plan.layers:
            layer = self.layers[i]
            skipped = _PassThrough(self._arity.get(layer, 0), layer)
            yield _Swap(self._list._modules, str(i), skipped, layer)
        for i in plan.partial:
            kind: SubLayer = "attention" if i in plan.attention else "mlp"
            yield self.stub_swap(kind, i)
        if plan.weights is not None:
            for i in sorted(set(range(self.depth)) - set(plan.layers)):
                for parent, name, rounded, linear in self.int4.swaps(self.layers[i]):
                    yield _Swap(parent._modules, name, rounded, linear)
            for parent, name, rounded, linear in self.int4.head_swaps():
                yield _Swap(parent._modules, name, rounded, linear)

    def stub_swap(self, kind: SubLayer, i: int) -> _Swap:
        """The swap that leaves out one sub-layer.

        Raises:
            InputError: the model keeps no such sub-layer as a module of its own.
        """
        table, key, module = self._place(kind, i)
        return _Swap(table, key, _Zero(self._arity.get(module, 0), self._zero), module)

    def _place(self, kind: SubLayer, i: int) -> tuple[MutableMapping[str, Any], str, nn.Module]:
        """(table of modules, key in it, module) of one sub-layer; raises as `stub_swap`."""
        module = self.sub_layer(kind, i)
        name = self.attention_name if kind == "attention" else self.mlp_name
        if module is None or name is None:
            raise InputError(f"this model's layers have no {kind} module that could be left out")
        parent_name, _, key = name.rpartition(".")
        return self.layers[i].get_submodule(parent_name)._modules, key, module

    @contextmanager
    def attending_once(self, layer: int) -> Iterator[None]:
        """Within: a layer called again with the same hidden states reuses its attention's output.

        For a layer with and without its MLP; not to be combined with leaving out its attention.
        """
        if self.attention_name is None:
            yield
            return
        table, key, module = self._place("attention", layer)
        with self.watching(), _swapped((_Swap(table, key, _Once(module), module),)):
            yield

    @contextmanager
    def in_place(self, run: InPlace) -> Iterator[None]:
        """Within: ``run`` is called in place of every layer. Always restored.

        The layer it is given may be called any number of times, with hidden states of more rows
        than the model's where masks and positions broadcast, and within :meth:`without`.
        """
        swaps = []
        for i, layer in enumerate(self.layers):
            replacement = _InPlace(self._arity.get(layer, 0), layer, i, run)
            swaps.append(_Swap(self._list._modules, str(i), replacement, layer))
        with self.watching(), _swapped(tuple(swaps)):
            yield

    @contextmanager
    def stubbed(self, layer: int) -> Iterator[None]:
        """Within: both sub-layers of one layer are stubs, its own code still runs (self-check)."""
        swaps = (self.stub_swap("attention", layer), self.stub_swap("mlp", layer))
        with self.watching(), _swapped(swaps):
            yield


def _common_child(layers: tuple[nn.Module, ...], names: tuple[str, ...]) -> str | None:
    for name in names:
        if all(isinstance(layer._modules.get(name), nn.Module) for layer in layers):
            return name
    return None
