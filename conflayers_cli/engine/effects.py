"""How much each sub-layer changes the hidden states."""

from __future__ import annotations

import torch

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_choice import Resume

Effects = dict[tuple[int, str], float]
"""By (layer, "attention" or "mlp")."""


@torch.inference_mode()
def sub_layer_effects(
    decoder: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slots: torch.Tensor,
) -> Effects:
    """What each sub-layer of the whole model adds to the residual stream, in proportion to it.

    One pass; arguments as of `Decoder.forward`, of one sequence. With native kernels it is as quick
    as any, but says nothing of the last sub-layer, which drafts never leave out.

    Returns:
        By layer and kind the mean over the tokens of ``|added|² / |before|²``.
    """
    count = 2 * decoder.depth
    shape = (*tokens.shape, int(decoder.config.hidden_size))
    states = [torch.empty(shape, dtype=decoder.dtype) for _ in range(count)]
    if decoder.choose(tokens, positions, cache, FULL, slots=slots, resume=Resume(states)) is None:
        return _observed(decoder, tokens, positions, cache, slots)
    streams = [state[0].float() for state in states]
    found: Effects = {}
    for i in range(count - 1):
        share = (streams[i + 1] - streams[i]).square().sum(-1) / _size(streams[i])
        found[i // 2, ("attention", "mlp")[i % 2]] = float(share.mean())
    return found


def _observed(
    decoder: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slots: torch.Tensor,
) -> Effects:
    """The same from the modules' outputs."""
    stream, found = torch.zeros(()), {}

    def observe(kind: str, layer: int, output: torch.Tensor) -> None:
        nonlocal stream
        added = output.float()
        stream = stream.to(added.device)
        before = _size(stream if stream.ndim else added)
        found[layer, kind] = float((added.square().sum(-1) / before).mean())
        stream = stream + added

    with decoder.observing(observe):
        decoder.forward(tokens, positions, cache, slots=slots, last_only=True)
    return found


def _size(stream: torch.Tensor) -> torch.Tensor:
    return stream.square().sum(-1).clamp(min=1e-20)
