"""The pieces of a Llama block: linear, RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Single-device maths. A layer casts its own weight, which may be a float32 master, to its input's dtype. Sums (norms,
rotation) never run below float32.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.attention.varlen import attend, clip_documents
from titanlite.recipe.sections import RopeScaling


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, widened to float32 unless it is wider already (float64 proofs stay float64)."""
    return x if x.dtype == torch.float64 else x.float()


# Whether this CPU has no bfloat16 arithmetic. Products of two bfloat16 values are exact in float32, and bfloat16 matrix
# units sum in float32 too: its float32 units come to the same results, 2 to 4 times as fast.
BFLOAT16_ON_FLOAT32_UNITS = platform.machine() in ("x86_64", "AMD64") and not (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)

_cpu_stands_for: str | None = None


@contextmanager
def cpu_stands_for(kind: str) -> Iterator[None]:
    """Have layers do with tensors on the CPU what they would do on that kind of device, such as `cuda`."""
    global _cpu_stands_for
    _cpu_stands_for = kind
    try:
        yield
    finally:
        _cpu_stands_for = None


def device_kind(x: Tensor) -> str:
    """Which kind of device x is for: where layers differ by device, they ask this."""
    kind = x.device.type
    return _cpu_stands_for if kind == "cpu" and _cpu_stands_for is not None else kind


def by_float32_units(x: Tensor) -> bool:
    """Whether x's products are formed in float32 although x is bfloat16."""
    return BFLOAT16_ON_FLOAT32_UNITS and x.dtype == torch.bfloat16 and device_kind(x) == "cpu"


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] @ weight.T [inputs, outputs], in x's dtype."""
    weight = weight.to(x.dtype)
    if by_float32_units(x):
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """x @ weight.T without bias, in x's dtype. Values are set by `models.init`, not here."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        # An attribute, so that it can be exchanged for a product in another number format.
        self.multiply: Callable[[Tensor, Tensor], Tensor] = multiply

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


class Embedding(nn.Embedding):
    """Rows of `weight` by token, in the compute dtype. Values are set by `models.init`, not here."""

    def __init__(self, rows: int, dim: int, compute_dtype: torch.dtype) -> None:
        super().__init__(rows, dim)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        pass

    def forward(self, tokens: Tensor) -> Tensor:
        if device_kind(self.weight) == "cpu":
            # A table that travelled in bfloat16 (FSDP) has a gradient in it too. The CPU adds up a token's occurrences
            # in that dtype, where a sum of some hundred stops growing; CUDA's kernel adds in float32 by itself.
            return F.embedding(tokens, at_least_float32(self.weight)).to(self.compute_dtype)
        return super().forward(tokens).to(self.compute_dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # The weight is rounded like those of the matrices, as it is when it travels in the compute dtype.
        return (wide * scale * self.weight.to(x.dtype)).to(x.dtype)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(h), h) for h = x + residual."""
        h = x + residual
        return self(h), h


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Angular frequency of each rotated pair, [head_dim / 2], float64. With `scaling`, Llama 3.1's rule: long waves are
    stretched by `factor`, short ones kept, those between blended linearly in their turns over the original context.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines for the positions of one batch: each [1 or batch, seq, 1, head_dim]."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def at(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
        """Tables for `positions` [seq] or [batch, seq]. Angles are formed in float64: exact at any context length."""
        angles = (torch.atleast_2d(positions).double().unsqueeze(-1) * frequencies).unsqueeze(-2)
        dtype = torch.promote_types(dtype, torch.float32)
        doubled = torch.cat((angles, angles), dim=-1)
        return Rotation(doubled.cos().to(dtype), doubled.sin().to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [batch, seq, heads, head_dim]; pair i is (x[i], x[i + head_dim / 2]), as in Hugging Face."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * self.cos + turned * self.sin).to(x.dtype)


class Rotations(nn.Module):
    """The tables of a batch's positions. Those of positions that are the same in the next batch are formed once."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self._frequencies = partial(rope_frequencies, head_dim, theta, scaling)
        self._last: tuple[object, range | Tensor, Rotation] | None = None

    def forward(self, positions: range | Tensor, x: Tensor) -> Rotation:
        """positions: a range, or int64 [seq] or [batch, seq]; for x's dtype and device."""
        key = positions if isinstance(positions, range) else id(positions), x.dtype, x.device
        if self._last is not None and self._last[0] == key:
            return self._last[2]
        places = (
            torch.arange(positions.start, positions.stop, device=x.device)
            if isinstance(positions, range)
            else positions
        )
        rotation = Rotation.at(places, self._frequencies(x.device), x.dtype)
        if places.dim() == 1:
            self._last = key, positions, rotation  # holds the positions, so that no other tensor gets their id
        return rotation


class Rotate(nn.Module):
    """Queries and keys, rotated. A module, so that it can be exchanged for a fused one: see `models.fused`."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotation(q), rotation(k)


class KVCache:
    """Keys and values of one block for the positions already seen; grows by `extend`, up to `capacity`."""

    def __init__(self, batch: int, capacity: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        self.length = 0
        self._keys = like.new_empty(batch, capacity, kv_heads, head_dim)
        self._values = like.new_empty(batch, capacity, kv_heads, head_dim)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, new, kv_heads, head_dim] and return all that is held."""
        end = self.length + keys.shape[1]
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for q [batch, seq, heads, head_dim] and k, v [batch, keys, kv_heads, head_dim].

    The last query has the place of the last key. Each sees the keys up to its own place: the last `window` of them (0:
    all) that are of its document. documents [documents + 1] int32: where each begins among all sequences' tokens, then
    their number, which may be repeated; None: each sequence is one.
    """
    dtype = q.dtype
    if by_float32_units(q):
        q, k, v = q.float(), k.float(), v.float()
    batch, queries, keys = *q.shape[:2], k.shape[1]
    if documents is None and not 0 < window < keys and queries in (1, keys):
        grouped, (q, k, v) = q.shape[2] != k.shape[2], (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=grouped)
        return out.transpose(1, 2).to(dtype)
    found = clip_documents(documents, batch, keys, range(keys - queries, keys), range(keys), q.device)
    out, _ = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *found, window - 1, 0)
    return out.unflatten(0, (batch, queries)).to(dtype)


class CausalAttention(nn.Module):
    """`causal_attention` as a module, so that it can be exchanged for one whose keys lie on several devices."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        return causal_attention(q, k, v, documents, self.window)

    def extra_repr(self) -> str:
        return f"window={self.window}" if self.window else ""


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023), optionally with RMS-normed queries and keys."""

    def __init__(self, dim: int, heads: int, kv_heads: int, qk_norm: bool, norm_eps: float, window: int = 0) -> None:
        super().__init__()
        self.input = nn.Identity()  # where tensor parallel ranks join their parts of the sequence
        self.head_dim = dim // heads
        self.wq = Linear(dim, heads * self.head_dim)
        self.wk = Linear(dim, kv_heads * self.head_dim)
        self.wv = Linear(dim, kv_heads * self.head_dim)
        self.wo = Linear(heads * self.head_dim, dim)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.rotate = Rotate()
        self.core = CausalAttention(window)

    def forward(self, x: Tensor, rotation: Rotation, documents: Tensor | None, cache: KVCache | None) -> Tensor:
        """x [batch, seq, dim] -> the same shape. documents: see `causal_attention`, without a cache alone."""
        x = self.input(x)
        # Heads come from the width, not from the config: under tensor parallelism each rank holds some of them.
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # [batch, seq, heads, head_dim]
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # [batch, seq, kv_heads, head_dim]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.wo(self.core(q, k, v, documents).flatten(-2))


class GatedProduct(nn.Module):
    """silu(gate) * up. A module, so that it can be exchanged for a fused one: see `models.fused`."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.input = nn.Identity()  # as in `Attention`
        self.gate = Linear(dim, ffn_dim)
        self.up = Linear(dim, ffn_dim)
        self.product = GatedProduct()
        self.down = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.down(self.product(self.gate(x), self.up(x)))
