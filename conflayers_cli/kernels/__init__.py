"""How a pass is computed: KV cache, attention, products, fused forwards."""
