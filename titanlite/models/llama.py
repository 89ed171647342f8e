"""Llama: embedding, pre-norm blocks, final norm, head (Touvron et al. 2023; Llama 3 paper, section 3.2).

A plain nn.Module for one device: meshes, precision policies and compilation are applied from outside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlite.models import layers
from titanlite.models.llama_spec import LlamaConfig
from titanlite.models.loss import TokenLoss


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: LlamaConfig, window: int = 0) -> None:
        """`window`: keys that a query sees, its own among them; 0: all."""
        super().__init__()
        self.attention_norm = layers.RMSNorm(config.dim, config.norm_eps)
        self.attention = layers.Attention(
            config.dim, config.heads, config.kv_heads, config.qk_norm, config.norm_eps, window
        )
        self.ffn_norm = layers.RMSNorm(config.dim, config.norm_eps)
        self.ffn = layers.SwiGLU(config.dim, config.ffn_dim)

    def forward(
        self, x: Tensor, rotation: layers.Rotation, documents: Tensor | None = None, cache: layers.KVCache | None = None
    ) -> Tensor:
        normed, x = self.ffn_norm.of_sum(x, self.attention(self.attention_norm(x), rotation, documents, cache))
        return x + self.ffn(normed)


class Head(layers.Linear):
    """Hidden states to logits; with labels, straight to the summed loss."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)
        self.input = nn.Identity()  # as in `layers.Attention`
        self.loss = TokenLoss()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.input(x)
        if labels is not None and self.multiply is layers.multiply:
            return self.loss(x, self.weight, labels)
        logits = super().forward(x)
        return logits if labels is None else self.loss.of_logits(logits, labels)  # of a product in another format


class Llama(nn.Module):
    """The whole model, or some consecutive `pieces` of it: what is missing is None, or not among the layers.

    Weights are empty until `models.init.initialise` or a checkpoint fills them.
    """

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embed: layers.Embedding | None = layers.Embedding(config.vocab_size, config.dim, compute_dtype)
        # By name, so that a block keeps its own when others are taken out.
        windows = enumerate(config.windows)
        self.layers = nn.ModuleDict({str(index): Block(config, window) for index, window in windows})
        self.norm: layers.RMSNorm | None = layers.RMSNorm(config.dim, config.norm_eps)
        self.head: Head | None = Head(config.dim, config.vocab_size)
        self.rotations = layers.Rotations(config.head_dim, config.rope_theta, config.rope_scaling)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        caches: list[layers.KVCache] | None = None,
    ) -> Tensor:
        """tokens [batch, seq] -> logits [batch, seq, vocab], or with labels [batch, seq] the sum of the token losses.

        positions [seq] or [batch, seq]: 0, 1, 2 … when absent, or what follows in the caches. documents: where each
        begins, as `causal_attention` takes it, which stays within them. caches: one a block, not with documents; the
        new keys and values are appended. Without the embedding, the inputs are hidden states [batch, seq, dim]; without
        the head, so is the result.
        """
        start = caches[0].length if caches else 0
        x = inputs if self.embed is None else self.embed(inputs)
        rotation = self.rotations(range(start, start + inputs.shape[1]) if positions is None else positions, x)
        for index, block in enumerate(self.layers.values()):
            x = block(x, rotation, documents, caches[index] if caches else None)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x, labels)

    def new_caches(self, batch: int, capacity: int) -> list[layers.KVCache]:
        """Empty caches for `capacity` positions, one a block; for a model that has its embedding."""
        assert self.embed is not None
        like = torch.empty(0, dtype=self.embed.compute_dtype, device=self.embed.weight.device)
        return [layers.KVCache(batch, capacity, self.config.kv_heads, self.config.head_dim, like) for _ in self.layers]
