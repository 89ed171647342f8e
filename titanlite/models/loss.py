"""Token losses as sums: whoever knows the step's global token count divides by it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers import at_least_float32

IGNORED = -100
"""The label of what is no token of the text; torch's own."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], in at least float32; tokens labelled `IGNORED` (padding) count 0.

    logits [batch, seq, vocab] in any float dtype, labels [batch, seq] int64; returns a scalar.
    """
    wide = at_least_float32(logits).flatten(0, -2)
    return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")


class TokenLoss(nn.Module):
    """`cross_entropy_sum` as a module, so that it can be exchanged for one whose logits lie on several devices."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(logits, labels)
