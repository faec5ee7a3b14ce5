"""The example job's model: a small byte-level transformer, its parameters split over the `model` axis of the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

VOCABULARY = 256  # every byte


@dataclass(frozen=True)
class Sizes:
    """The `model` axis of the mesh must divide `heads` and `width`."""

    layers: int
    width: int
    heads: int
    length: int


def split(*axes: str | None) -> Any:
    """An initializer of a parameter whose dimensions are split over these mesh axes (None: not split)."""
    return nn.with_partitioning(nn.initializers.normal(0.05), axes)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a residual: [batch, length, width] to the same."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = self.sizes.width, self.sizes.heads
        qkv = self.param("qkv", split(None, None, "model", None), (3, width, heads, width // heads))
        out = self.param("out", split("model", None, None), (heads, width // heads, width))
        up = self.param("up", split(None, "model"), (width, 4 * width))
        down = self.param("down", split("model", None), (4 * width, width))

        query, key, value = jnp.einsum("blw,cwhd->cblhd", nn.LayerNorm()(x), qkv)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + jnp.einsum("blhd,hdw->blw", attended, out)
        perceived: jax.Array = nn.gelu(nn.LayerNorm()(x) @ up) @ down
        return x + perceived


class Transformer(nn.Module):
    """Bytes [batch, length] to the logits of the byte after each: [batch, length, 256]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = self.param("embedding", split(None, "model"), (VOCABULARY, self.sizes.width))
        position = self.param("position", split(None, "model"), (self.sizes.length, self.sizes.width))
        x = embedding[tokens] + position[: tokens.shape[1]]
        for layer in range(self.sizes.layers):
            x = Block(self.sizes, name=f"block_{layer}")(x)
        logits: jax.Array = nn.LayerNorm()(x) @ embedding.T
        return logits
