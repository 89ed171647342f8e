"""Token losses as sums, which the step divides by its global token count."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32, by_float32_units, device_kind, multiply

IGNORED = -100  # the label of what is no token of the text; torch's own
LARGE_LOGITS = 64 * 2**20  # bytes, in float32, up to which all logits at once are the quicker way and no burden


class TokenLoss(nn.Module):
    """Hidden states and the head's weight to the summed loss: by all logits at once or, where these are many, by
    chunks. A module, so that it can be exchanged for one whose logits lie on several devices.
    """

    def __init__(self, implementation: Literal["auto", "torch", "off"] = "auto", recompute: bool = False) -> None:
        super().__init__()
        self.implementation = implementation  # `kernels.linear_cross_entropy` of the recipe
        # Whether chunks form their logits anew in the backward pass; else the weight's gradient is held until then.
        self.recompute = recompute

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden [batch, seq, dim], weight [vocab, dim], labels [batch, seq] -> scalar."""
        if not self.by_chunks(labels.numel(), weight.shape[0]):
            return self.of_logits(multiply(hidden, weight), labels)
        # Imported here: Triton takes a second that small runs need not pay.
        from titanlite_kernels.linear_cross_entropy import linear_cross_entropy, tokens_at_a_time

        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            ignore_index=IGNORED,
            recompute=self.recompute,
            chunk=tokens_at_a_time(device_kind(hidden), _memory_bytes(hidden)),
            backend="torch" if self.implementation == "torch" else "auto",
            wide_products=by_float32_units(hidden),
            **self.part(),
        )

    def by_chunks(self, tokens: int, rows: int) -> bool:
        """Whether not all logits of so many tokens, by a weight of so many rows, are formed at once."""
        large = 4 * tokens * rows > LARGE_LOGITS
        return self.implementation == "torch" or (self.implementation == "auto" and large)

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [batch, seq, vocab], labels [batch, seq] -> scalar, in at least float32."""
        wide = at_least_float32(logits).flatten(0, -2)
        return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def part(self) -> dict[str, Any]:
        """Whose group, and which part of the vocabulary, the weight is of: here, all of it."""
        return {}


def _memory_bytes(x: Tensor) -> int:
    """Of x's GPU; in a dry run, of the common one that it stands for."""
    return torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else 80 * 10**9
