"""Sizes of usual models, and what a pass reads of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        heads, shared: query heads, and those of keys and values.
        positions: the longest text.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    shared: int
    vocabulary: int
    positions: int = 32_768

    @property
    def size(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the products of a pass, those of one input joined."""
        return {
            "qkv": ((self.heads + 2 * self.shared) * self.size, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate, up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocabulary, self.hidden),
        }

    @property
    def weights_read(self) -> int:
        """Weights that a pass over one token reads: all but the embeddings of other tokens."""
        counts = {name: rows * columns for name, (rows, columns) in self.products.items()}
        head = counts.pop("head")
        norms = (2 * self.layers + 1) * self.hidden
        return head + self.layers * sum(counts.values()) + norms + self.hidden

    @property
    def numbers_per_position(self) -> int:
        """Numbers of keys and values in the cache for every position."""
        return 2 * self.layers * self.shared * self.size

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.shared,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )

    def small(self) -> Shape:
        """The same in next to no sizes, to see that something runs."""
        shared = 4 if self.heads == self.shared else 2
        return replace(self, layers=6, hidden=64, inner=128, heads=4, shared=shared, vocabulary=512)


SHAPES = {
    "8b": Shape("8b", 32, 4096, 14_336, 32, 8, 128_256),
    "8b-short": Shape("8b-short", 8, 4096, 14_336, 32, 8, 128_256),
    "13b": Shape("13b", 40, 5120, 13_824, 40, 40, 32_000),
}
