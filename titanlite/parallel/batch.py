"""The sequences that one data rank takes in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's (or one validation pass's) sequences of one data rank; tensors are int64."""

    tokens: Tensor  # Inputs, `[microbatches, microbatch, seq_len]`; padding is the separator
    labels: Tensor  # The token after each input, same shape; padding is `IGNORED`
    positions: Tensor | None
    """Position of each input within its document, same shape; None without `data.document_mask`."""
    documents: Tensor | None
    """Number of each input's document within its sequence, same shape; None without `data.document_mask`."""
    samples: tuple[int, ...]
    """Numbers of this rank's samples, in the order of the sequences; padding follows them and has none."""
    sequences: int  # Sequences of all data ranks together, without padding
    valid_tokens: int  # Labels of this rank that count

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a copy to a GPU can run beside its work."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; the host does not wait for copies out of page-locked memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {key: change(x) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)
