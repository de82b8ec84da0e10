"""Tensor parallelism of transformers under torchrun."""

from __future__ import annotations

from math import gcd
from typing import Any

from conflayers_cli.errors import InputError
from conflayers_cli.models.support import sizes_by_layer
from conflayers_cli.utils.distributed import world

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def sharding(config: Any, source: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give each rank its part; empty for one process.

    Raises:
        InputError: the model can't be shared among so many.
    """
    size = world().size
    if size == 1:
        return {}
    from transformers.distributed import DistributedConfig

    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise InputError(
            f"{source}: transformers has no tensor-parallel plan for {text.model_type}; "
            "device_map auto, without torchrun, needs none",
            names=("device_map auto",),
        )
    if any(k.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and v == "colwise" for k, v in plan.items()):
        heads = sizes_by_layer(text, "num_attention_heads")
        for shared in sizes_by_layer(text, "num_key_value_heads") or heads:
            _check_heads(source, heads[0], shared, size)
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _check_heads(source: str, heads: int, shared: int, size: int) -> None:
    """Raise InputError unless all ranks can have as many query and key/value heads."""
    if heads % size == 0 and shared % size == 0:
        return
    common = gcd(heads, shared)
    fitting = [str(n) for n in range(2, common + 1) if common % n == 0]
    advice = f"--nproc-per-node {' or '.join(fitting)}" if fitting else "use device_map auto"
    raise InputError(
        f"{source} has {heads} heads and {shared} key/value heads, which {size} processes "
        f"can't share evenly: {advice}",
        names=("device_map auto",),
    )
