"""Attention by a mask of all queries and keys: the truth that tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int) -> Tensor:
    """What `layers.causal_attention` computes; arguments as there."""
    batch, queries, keys = *q.shape[:2], k.shape[1]
    places = torch.arange(keys, device=q.device)
    distance = places[keys - queries :].unsqueeze(1) - places
    seen = (distance >= 0) & (distance < (window or keys))
    seen = seen.expand(batch, queries, keys)
    if documents is not None:
        numbers = torch.bucketize(torch.arange(batch * keys, device=q.device), documents.long(), right=True).view(
            batch, keys
        )
        seen = seen & (numbers[:, keys - queries :].unsqueeze(-1) == numbers.unsqueeze(-2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), enable_gqa=True)
    return out.transpose(1, 2)


def random_documents(batch: int, length: int, generator: torch.Generator, spare: int = 3) -> Tensor:
    """Offsets of documents of about five tokens, filled up with `spare` empty ones."""
    begins = torch.rand(batch, length, generator=generator) < 0.2
    begins[:, 0] = True
    ends = torch.full((1 + spare,), batch * length)
    return torch.cat((begins.flatten().nonzero().flatten(), ends)).to(torch.int32)
