"""Passes of Llama-like models by the native library: one call a pass.

The arithmetic is that of transformers' modules, rounded where they round. A token's bits don't
depend on how many others are in the pass, on the other sequences, the cache's capacity or the
number of threads, because every sum has one order: nothing is padded or repeated for exactness.
Attention reads the slots that a token sees, and no others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from conflayers_cli.kernels.fused_forward import FAMILIES
from conflayers_cli.kernels.kv_cache import KVCache, KVLayout
from conflayers_cli.kernels.native_choice import MAX_TOP, NativeChoice, Resume
from conflayers_cli.kernels.native_layers import (
    NativeEmbedding,
    NativeLayer,
    PackFn,
    pack_linears,
    read_layer,
    to_int4,
    windows_by_layer,
)
from conflayers_cli.kernels.native_library import (
    KINDS,
    CLayer,
    CModel,
    CPass,
    CWeight,
    load_library,
    padded_float32,
    unit_name,
    unit_number,
    usable_threads,
)
from conflayers_cli.kernels.native_weights import NativeWeight, plain_table
from conflayers_cli.skip_plan import SkipPlan

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}
_CHANGING_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of the text."""
_TABLE = 1024
"""Positions by which the rotary table grows."""


class NativeForward:
    """The native forward of one model of `FAMILIES`, from its decoder layers and text config.

    Args:
        model, layers, config: see above.
        pack: makes the packed weight of linear layers of one input: whoever holds packed weights
            already returns them.
        unit: the library's unit; None: the best.

    Attributes:
        threads: of a pass; None: as many as can run.
        unit: the library's unit that runs.

    Raises:
        AttributeError, KeyError, ValueError: the model is built otherwise than its family.
        OSError: there is no library.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        config: Any,
        pack: PackFn = pack_linears,
        unit: str | None = None,
    ) -> None:
        if config.model_type not in FAMILIES or model.dtype not in KINDS:
            raise ValueError(f"{config.model_type} in {model.dtype}")
        self._unit = unit_number(unit)
        self.unit = unit_name(unit)
        self.threads: int | None = None
        self.dtype: torch.dtype = model.dtype
        self._rotary = model.get_decoder().rotary_emb
        self._changing = getattr(self._rotary, "rope_type", "default") in _CHANGING_ROTARY
        self._cosine = self._sine = torch.empty((0, 0))
        self._layers = [read_layer(layer, pack) for layer in layers]
        self._head = pack((model.get_output_embeddings(),))
        embedding = model.get_input_embeddings()
        packed = isinstance(embedding, NativeEmbedding)
        self._embedding = embedding.native if packed else embedding.weight
        self._norms: list[torch.Tensor] = []
        self._model = self._describe(model, layers, config)
        self._own = self._with_weights(self._layers, self._head, None)
        self._int4: CModel | None = None
        self._int4_weights: tuple[list[NativeLayer], NativeWeight] | None = None
        heads, size = int(self._model.kv_heads), int(self._model.head_dim)
        sizes = (((heads, size), (heads, size)),) * len(layers)
        self._layout = KVLayout(sizes, self.dtype, torch.device("cpu"))

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
        int4: bool = False,
    ) -> torch.Tensor:
        """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all), in the model's dtype.

        Args:
            tokens, positions, slots: ``[B, T]`` int64; no slots: the positions. A token sees what
                its sequence holds in slots below its position (within the layer's window), and
                itself.
            cache: of B sequences.
            plan: the sub-layers left out.
            keep: see above.
            int4: whether to use weights in four bits.

        Raises:
            ValueError: what is given does not fit together.
            MemoryError: there is no memory.
        """
        described, held = self._pass(tokens, positions, slots, cache, plan, keep)
        kept = held[-1].numel() // len(tokens)
        logits = torch.empty((len(tokens), kept, self._model.vocabulary), dtype=self.dtype)
        described.logits = logits.data_ptr()
        self._call(described, int4)
        return logits

    def choose(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
        int4: bool = False,
        top: int = 0,
        resume: Resume | None = None,
    ) -> NativeChoice:
        """The same pass, but what its logits say in place of them. Raises as `run` does.

        Args:
            top: how many of the most likely tokens, at most `MAX_TOP`.
            resume: where to begin, and which hidden states to keep.
        """
        if not 0 <= top <= min(MAX_TOP, self._model.vocabulary):
            raise ValueError(f"the {top} most likely tokens")
        described, held = self._pass(tokens, positions, slots, cache, plan, keep)
        if resume is not None:
            self._resume(described, (*tokens.shape, self._model.hidden), resume)
        shape = (len(tokens), held[-1].numel() // len(tokens))
        choice = NativeChoice(
            torch.empty(shape, dtype=torch.int64),
            torch.empty(shape),
            torch.empty(shape),
            torch.empty((*shape, top), dtype=torch.int64),
            torch.empty((*shape, top)),
        )
        described.greedy, described.highest, described.log_sum = (
            each.data_ptr() for each in (choice.tokens, choice.logits, choice.log_sum)
        )
        described.top, described.top_tokens = top, choice.top_tokens.data_ptr()
        described.top_logits = choice.top_logits.data_ptr()
        self._call(described, int4)
        return choice

    def _resume(self, described: CPass, shape: tuple[int, ...], resume: Resume) -> None:
        """Have a pass begin with kept states, and keep others."""
        if len(resume.states) != 2 * len(self._layers):
            raise ValueError(f"states of {len(resume.states)} sub-layers")
        given = [each for each in (resume.entry, *resume.states) if each is not None]
        if any(t.shape != shape or t.dtype != self.dtype or not t.is_contiguous() for t in given):
            raise ValueError(f"states must be {list(shape)} in {self.dtype}")
        if (resume.entry is None) != (resume.begin == 0):
            raise ValueError(f"a pass that begins at sub-layer {resume.begin}")
        for i in range(resume.begin):
            described.runs[i] = 0
        if resume.entry is not None:
            described.entry = resume.entry.data_ptr()
        described.states = (ctypes.c_void_p * len(resume.states))(
            *(None if each is None else each.data_ptr() for each in resume.states)
        )

    @property
    def num_threads(self) -> int:
        """Threads of a pass."""
        return self.threads or usable_threads()

    @property
    def nbytes(self) -> int:
        """Of the packed weights, those in four bits included."""
        int4 = self._int4_weights or ([], None)
        layers = [*self._layers, *int4[0]]
        weights = [w for each in layers for w in (each.qkv, each.output, each.gate_up, each.down)]
        weights += [head for head in (self._head, int4[1]) if head is not None]
        return sum(weight.nbytes for weight in {id(w): w for w in weights}.values())

    def _call(self, described: CPass, int4: bool) -> None:
        model = self._int4_model() if int4 else self._own
        described.threads = self.num_threads
        failed = load_library().cl_forward(self._unit, ctypes.byref(model), ctypes.byref(described))
        if failed:
            raise MemoryError("no memory for a pass")

    def _pass(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
    ) -> tuple[CPass, list[Any]]:
        """A pass as the library takes it, and what must live as long; the kept tokens last."""
        slots = positions if slots is None else slots
        batch, width = self._check(tokens, positions, slots, cache, keep)
        given = [each.reshape(-1).contiguous() for each in (tokens, positions, slots)]
        sequences = torch.arange(batch).repeat_interleave(width)
        kept = torch.arange(batch * width).view(batch, width)[:, -keep:].flatten().contiguous()
        rows, cosine, sine = self._rotate(positions)
        if not cache.layers[0].is_initialized:
            cache.allocate(self._layout)
        keys, values, strides = self._cache_memory(cache)
        depth = len(self._layers)
        runs = (ctypes.c_uint8 * (2 * depth))(*(1,) * (2 * depth))
        for layer in plan.attention:
            runs[2 * layer] = 0
        for layer in plan.mlp:
            runs[2 * layer + 1] = 0
        described = CPass(tokens=batch * width, kept=kept.numel(), keep=kept.data_ptr())
        described.ids, described.positions, described.slots = (t.data_ptr() for t in given)
        described.sequences, described.rotary_rows = sequences.data_ptr(), rows.data_ptr()
        described.cosine, described.sine = cosine.data_ptr(), sine.data_ptr()
        described.keys, described.values, described.runs = keys, values, runs
        described.sequence_stride, described.head_stride, described.slot_stride = strides
        return described, [*given, sequences, rows, cosine, sine, keys, values, runs, kept]

    def _check(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: KVCache,
        keep: int,
    ) -> tuple[int, int]:
        """(sequences, tokens of each); raises ValueError."""
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens {list(tokens.shape)}")
        for each in (tokens, positions, slots):
            if each.shape != tokens.shape or each.dtype != torch.int64 or each.is_cuda:
                raise ValueError("tokens, positions and slots must be int64 and of one shape")
        batch, width = tokens.shape
        if cache.batch != batch or len(cache.layers) != len(self._layers):
            raise ValueError(f"a cache of {cache.batch} sequences for {batch}")
        if not 0 <= keep <= width:
            raise ValueError(f"{keep} of {width} tokens")
        lowest, highest = (int(each) for each in tokens.aminmax())
        if lowest < 0 or highest >= self._model.vocabulary:
            raise ValueError(f"tokens {lowest} to {highest} of {self._model.vocabulary}")
        if int(positions.min()) < 0 or bool((slots < positions).any()):
            raise ValueError("a slot before its token's position")
        if int(slots.max()) >= cache.capacity:
            raise ValueError(f"slot {int(slots.max())} is beyond the capacity {cache.capacity}")
        return batch, width

    def _cache_memory(self, cache: KVCache) -> tuple[Any, Any, tuple[int, ...]]:
        """Addresses of all layers' keys and values, and strides, which all share."""
        first = cache.layers[0].keys
        strides = first.stride()
        if first.dtype != self.dtype or strides[3] != 1:
            raise ValueError(f"a cache of {first.dtype} for a model in {self.dtype}")
        pointers = ctypes.c_void_p * len(cache.layers)
        memory = []
        for states in ([layer.keys for layer in cache.layers], [y.values for y in cache.layers]):
            if any(each.stride() != strides for each in states):
                raise ValueError("layers whose caches differ")
            memory.append(pointers(*(each.data_ptr() for each in states)))
        return memory[0], memory[1], tuple(strides[:3])

    def _rotate(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each token its row in the next two; cosines and sines ``[rows, rotary_dim]``."""
        if self._changing:
            cosine, sine = self._cos_sin(positions)
            return torch.arange(positions.numel()), cosine, sine
        highest = int(positions.max())
        if highest >= len(self._cosine):
            size = (highest // _TABLE + 1) * _TABLE
            self._cosine, self._sine = self._cos_sin(torch.arange(size)[None])
        return positions.reshape(-1).contiguous(), self._cosine, self._sine

    @torch.inference_mode()
    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self._rotary(torch.empty(0, dtype=self.dtype), positions)
        cosine, sine = (each.float().flatten(0, 1).contiguous() for each in pair)
        return cosine, sine

    def _keep_norm(self, module: Any) -> int | None:
        """The address of a norm's weight."""
        if module is None:
            return None
        if next(module.children(), None) is not None:
            raise ValueError("a norm with an adapter around it")
        self._norms.append(padded_float32(module.weight))
        return self._norms[-1].data_ptr()

    def _describe(self, model: Any, layers: Sequence[nn.Module], config: Any) -> CModel:
        """The model without its weights."""
        norm = model.get_decoder().norm
        heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        described = CModel(
            kind=KINDS[self.dtype],
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary_dim=self._cos_sin(torch.zeros((1, 1), dtype=torch.int64))[0].shape[-1],
            vocabulary=self._head.rows,
            depth=len(layers),
            activation=_ACTIVATIONS[config.hidden_act],
            norm_per_head=config.model_type == "qwen3",
            norm_rounds_last=config.model_type == "olmo2",
            epsilon=float(norm.variance_epsilon),
            norm=self._keep_norm(norm),
        )
        windows = windows_by_layer(config, len(layers))
        self._described = list(map(self._describe_layer, layers, windows))
        return described

    def _describe_layer(self, layer: Any, window: int) -> CLayer:
        attention = layer.self_attn
        post_norms = hasattr(layer, "post_feedforward_layernorm")
        norms = (
            None if post_norms else layer.input_layernorm,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            layer.post_attention_layernorm if post_norms else None,
            None if post_norms else layer.post_attention_layernorm,
            layer.post_feedforward_layernorm if post_norms else None,
        )
        addresses = (ctypes.c_void_p * 6)(*map(self._keep_norm, norms))
        return CLayer(norms=addresses, scaling=float(attention.scaling), window=window)

    def _with_weights(
        self, layers: Sequence[NativeLayer], head: NativeWeight, rescore: NativeWeight | None
    ) -> CModel:
        described = (CLayer * len(layers))()
        for i, (here, layer) in enumerate(zip(self._described, layers, strict=True)):
            described[i] = here
            for name in ("qkv", "output", "gate_up", "down"):
                setattr(described[i], name, getattr(layer, name).described)
        model = CModel.from_buffer_copy(self._model)
        model.layers, model.head = described, head.described
        model.rescore = CWeight() if rescore is None else rescore.described
        rows = self._embedding
        packed = isinstance(rows, NativeWeight)
        model.embedding = rows.described if packed else plain_table(rows)
        return model

    def _int4_model(self) -> CModel:
        """The model with weights in four bits, made when first asked for."""
        if self._int4 is None:
            layers, head = [layer.quantized() for layer in self._layers], to_int4(self._head)
            self._int4_weights = layers, head
            rescore = None if head is self._head else self._head
            self._int4 = self._with_weights(layers, head, rescore)
        return self._int4
