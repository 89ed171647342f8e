"""Continue a sequence of tokens with a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """Draws the next token: temperature, then nucleus sampling (Holtzman et al. 2020)."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [vocab] -> a token. Drawn on the CPU, so that a seed means the same everywhere."""
        logits = logits.double().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        # The largest becomes 0 first, so that however low a temperature leaves it finite.
        scaled = (logits - logits.max()) / self.temperature
        probabilities, tokens = torch.softmax(scaled, dim=-1).sort(descending=True)
        # Keep a token if those before it have not filled top_p yet: always at least the first.
        probabilities[probabilities.cumsum(0) - probabilities >= self.top_p] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])


@torch.no_grad()
def generate(
    model: Any, prompt: list[int], count: int, context: int, vocab_size: int, sampler: Sampler
) -> Iterator[int]:
    """Up to `count` tokens after `prompt`, each attending to at most `context` tokens before it.

    Only the first `vocab_size` logits take part: the rest are the embedding's padding. When the context is full, its
    later half is read again and generation goes on from there.
    """
    device = next(model.parameters()).device
    text = list(prompt)
    context = min(context, len(text) + count)  # caches for no more than there will be
    pending = text[-context:]
    caches = model.new_caches(1, context)
    for _ in range(count):
        if caches[0].length + len(pending) > context:
            pending = text[-(context // 2 or 1) :]
            caches = model.new_caches(1, context)
        logits = model(torch.tensor([pending], device=device), caches=caches)[0, -1, :vocab_size]
        token = sampler(logits)
        yield token
        text.append(token)
        pending = [token]
