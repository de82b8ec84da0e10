"""Leaving out some of a model's decoder layers for the length of a forward.

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

from conflayers_cli.engine.model_lock import get_lock
from conflayers_cli.errors import InputError
from conflayers_cli.kernels.int4_linear import Int4Weights
from conflayers_cli.models.support import find_layers
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import broadcast_rank0

SubLayer = Literal["attention", "mlp"]
LayerCall = Callable[[torch.Tensor], torch.Tensor]
"""A layer with the model's current masks and positions: hidden states → hidden states."""
LayerOverride = Callable[[int, torch.Tensor, LayerCall], torch.Tensor]
"""Runs instead of a layer: (index, its input, the layer) → the hidden states to go on with."""

_NAMES: dict[SubLayer, tuple[str, ...]] = {
    "attention": ("self_attn", "attention", "attn", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
"""Of sub-layers in a decoder layer, by kind."""
_MAX_CACHED_PLANS = 64
"""Plans whose swaps are kept; a search goes through hundreds."""


def _output(states: torch.Tensor, arity: int) -> Any:
    """What a module with this output returns: arity 0 a tensor, n an n-tuple."""
    return states if arity == 0 else (states, *(None,) * (arity - 1))


class _PassThrough(nn.Module):
    """In place of a layer that is left out.

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
        return _output(hidden_states, self.arity)


class _Override(_PassThrough):
    """In place of a layer: a function decides what becomes of the call."""

    def __init__(self, arity: int, original: nn.Module, index: int, run: LayerOverride) -> None:
        super().__init__(arity, original)
        self.index = index
        self.run = run

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            output = self._original[0](hidden, *args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            return broadcast_rank0(states.to(hidden.device))

        return _output(self.run(self.index, hidden_states, call), self.arity)


class _CachedAttention(nn.Module):
    """In place of an attention: the same hidden states as last time get the same output again."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)
        self._last: tuple[torch.Tensor, Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._last is None or not torch.equal(self._last[0], hidden):
            self._last = hidden, self._original[0](*args, **kwargs)
        return self._last[1]


class _Zero(nn.Module):
    """In place of a sub-layer that is left out: adds nothing to the residual stream."""

    def __init__(self, arity: int, zero: torch.Tensor) -> None:
        super().__init__()
        self.arity = arity
        self.zero = zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is not None and hidden.device != self.zero.device:  # of a model on several
            self.zero = torch.zeros_like(self.zero, device=hidden.device)
        return _output(self.zero, self.arity)


@dataclass(frozen=True)
class _Swap:
    table: MutableMapping[str, Any]
    key: str
    replacement: nn.Module
    original: nn.Module


@contextmanager
def _swapped(swaps: tuple[_Swap, ...]) -> Iterator[None]:
    """Within: the replacements are used. Always restored."""
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
        lock: held while a pass runs, or modules are observed or changed.
        int4: the layers' four-bit weights, for drafts that ask for them.
        watched: how often modules are observed or changed now, so that these must run.
        names: of the sub-layers within a layer; None: they are not modules of their own.

    Raises:
        InputError: no list of decoder layers can be found in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lock = get_lock(model)
        self._list = find_layers(model)
        self.layers: tuple[nn.Module, ...] = tuple(self._list)
        self.depth = len(self.layers)
        self.int4 = Int4Weights(model, self.layers)
        self.names: dict[SubLayer, str | None] = {
            kind: next((name for name in names if self._all_have(name)), None)
            for kind, names in _NAMES.items()
        }
        like = next(p for p in model.parameters() if p.is_floating_point())
        # Made here: made during a recorded pass, it would lie in the recording's memory.
        self._zero = torch.zeros((1, 1, 1), dtype=like.dtype, device=like.device)
        self._arity: dict[nn.Module, int] = {}
        self._swaps: dict[SkipPlan, tuple[_Swap, ...]] = {}
        self.watched = 0

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
        name = self.names[kind]
        return None if name is None else self.layers[layer]._modules[name]

    def _all_have(self, name: str) -> bool:
        return all(isinstance(each._modules.get(name), nn.Module) for each in self.layers)

    def output_module(self, kind: SubLayer, layer: int) -> nn.Module | None:
        """The module whose output is added to the residual stream, None where there is none.

        That is the sub-layer itself, or the norm after it in families that have one (Gemma 2 and
        3, OLMo 2).
        """
        children = self.layers[layer]._modules
        if "post_feedforward_layernorm" in children:
            name = "attention" if kind == "attention" else "feedforward"
            return children.get(f"post_{name}_layernorm")
        return self.sub_layer(kind, layer)

    @contextmanager
    def recording_arity(self) -> Iterator[None]:
        """Within: of every layer and sub-layer that runs it is noted what it returns."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._arity[module] = len(output) if isinstance(output, tuple) else 0

        handles = [
            module.register_forward_hook(note)
            for i, layer in enumerate(self.layers)
            for module in (layer, self.sub_layer("attention", i), self.sub_layer("mlp", i))
            if module is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._swaps.clear()

    @contextmanager
    def without(self, plan: SkipPlan) -> Iterator[None]:
        """Within: the model runs with the plan's sub-layers left out. Always restored."""
        swaps = self._swaps.get(plan)
        if swaps is None:
            if len(self._swaps) >= _MAX_CACHED_PLANS:
                self._swaps.clear()
            swaps = self._swaps[plan] = tuple(self._plan_swaps(plan))
        with _swapped(swaps):
            yield

    def _plan_swaps(self, plan: SkipPlan) -> Iterator[_Swap]:
        for i in plan.layers:
            layer = self.layers[i]
            skipped = _PassThrough(self._arity.get(layer, 0), layer)
            yield _Swap(self._list._modules, str(i), skipped, layer)
        for i in plan.partial:
            yield self._stub_swap("attention" if i in plan.attention else "mlp", i)
        if plan.weights is not None:
            run = [layer for i, layer in enumerate(self.layers) if i not in plan.layers]
            for parent, name, int4, linear in self.int4.swaps(run):
                yield _Swap(parent._modules, name, int4, linear)

    def _stub_swap(self, kind: SubLayer, i: int) -> _Swap:
        """The swap that leaves out one sub-layer; InputError where there is no module for it."""
        module, name = self.sub_layer(kind, i), self.names[kind]
        if module is None or name is None:
            raise InputError(f"this model's layers have no {kind} module that could be left out")
        stub = _Zero(self._arity.get(module, 0), self._zero)
        return _Swap(self.layers[i]._modules, name, stub, module)

    @contextmanager
    def stubbed(self, layer: int) -> Iterator[None]:
        """Within: both sub-layers of one layer are stubs, its own code still runs (self-check)."""
        swaps = (self._stub_swap("attention", layer), self._stub_swap("mlp", layer))
        with self.watching(), _swapped(swaps):
            yield

    @contextmanager
    def caching_attention(self, layer: int) -> Iterator[None]:
        """Within: a layer called again with the same hidden states (with or without its MLP) reuses
        its attention's output."""
        module, name = self.sub_layer("attention", layer), self.names["attention"]
        if module is None or name is None:
            yield
            return
        swap = _Swap(self.layers[layer]._modules, name, _CachedAttention(module), module)
        with self.watching(), _swapped((swap,)):
            yield

    @contextmanager
    def replacing_layers(self, run: LayerOverride) -> Iterator[None]:
        """Within: ``run`` is called in place of every layer. Always restored.

        It may call the layer any number of times, also within :meth:`without`, and with a larger
        batch than the model's where masks and positions broadcast.
        """
        swaps = []
        for i, layer in enumerate(self.layers):
            override = _Override(self._arity.get(layer, 0), layer, i, run)
            swaps.append(_Swap(self._list._modules, str(i), override, layer))
        with self.watching(), _swapped(tuple(swaps)):
            yield
