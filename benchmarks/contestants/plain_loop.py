"""A Llama and its training loop in plain PyTorch, as one would write them by hand for a model of this size.

autocast for bfloat16, SDPA, fused AdamW, torch's own RMSNorm and clipping; nothing of titanlite.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from rules import (
    ADAM_EPS,
    BETAS,
    CLIP_NORM,
    INIT_STD,
    LEARNING_RATE,
    NORM_EPS,
    ROPE_THETA,
    WEIGHT_DECAY,
    Gate,
    Settings,
)
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.dim // s.heads
        self.wq = nn.Linear(s.dim, s.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(s.dim, s.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(s.dim, s.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(s.heads * self.head_dim, s.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.gate = nn.Linear(s.dim, s.ffn_dim, bias=False)
        self.up = nn.Linear(s.dim, s.ffn_dim, bias=False)
        self.down = nn.Linear(s.ffn_dim, s.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.dim, NORM_EPS)
        self.attention = Attention(s)
        self.ffn_norm = nn.RMSNorm(s.dim, NORM_EPS)
        self.ffn = FeedForward(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class PlainLlama(nn.Module):
    """tokens [batch, seq] and labels [batch, seq] -> mean loss; without labels -> logits."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab_size, s.dim)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.dim, NORM_EPS)
        self.head = nn.Linear(s.dim, s.vocab_size, bias=False)
        half = torch.arange(0, s.dim // s.heads, 2, dtype=torch.float64) / (s.dim // s.heads)
        angles = torch.outer(torch.arange(s.sequence_length, dtype=torch.float64), ROPE_THETA**-half)
        angles = torch.cat((angles, angles), dim=-1)  # [seq, head_dim]
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def main() -> None:
    settings = Settings.from_command_line()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = np.fromfile(settings.corpus, np.uint8)
    model = PlainLlama(settings).to(device)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=ADAM_EPS, fused=True)
    step_model = torch.compile(model) if settings.compile else model
    mixed = settings.precision == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext()
    draw = np.random.default_rng(0)

    gate = Gate(sum(p.numel() for p in model.parameters()))
    while True:
        gate.boundary()
        starts = draw.integers(0, len(corpus) - settings.sequence_length, settings.batch)
        windows = np.stack([corpus[start : start + settings.sequence_length + 1] for start in starts])
        batch = torch.from_numpy(windows.astype(np.int64)).to(device)
        with autocast:
            loss = step_model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
