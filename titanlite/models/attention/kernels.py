"""Which kernels attention runs by on a device: set before the first step, and named for the run's log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanlite.models.attention.varlen import has_flash
from titanlite.models.spec import ModelConfig

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_ORDER = {
    # cuDNN's kernel is written for Hopper and Blackwell; it and FlashAttention take narrow dtypes alone.
    "auto": [_CUDNN, _FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [_CUDNN],
    "flash": [_FLASH],
}
_BY_CAPABILITY = {9: ("FA3", "FA4"), 10: ("FA4",)}  # FlashAttention's versions by the card's, the fastest first


@contextmanager
def attention_kernels(name: Literal["auto", "cudnn", "flash"], device: torch.device) -> Iterator[None]:
    """Within this context attention on `device` runs by the kernels of `kernels.attention`."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import activate_flash_attention_impl

    major, order = torch.cuda.get_device_capability(device)[0], _ORDER[name]
    if name == "auto" and major < 9:
        order = [_FLASH, _CUDNN, *order[2:]]
    for version in _BY_CAPABILITY.get(major, ()):
        try:
            activate_flash_attention_impl(version)
            break
        except (ImportError, RuntimeError):  # not installed, or for another card: torch has FlashAttention 2 itself
            continue
    with sdpa_kernel(order, set_priority=True):
        yield


def kernel_in_use(config: ModelConfig, dtype: torch.dtype, device: torch.device, by_lengths: bool) -> str:
    """The name of what attention runs by here; `by_lengths`: within documents, windows, or over cp."""
    counts = config.heads, config.kv_heads
    q, k = (torch.empty(1, heads, 128, config.head_dim, dtype=dtype, device=device) for heads in counts)
    if by_lengths and device.type == "cuda":
        from torch.nn.attention import current_flash_attention_impl

        return current_flash_attention_impl() or "FA2" if has_flash(q) else "products, a document at a time"
    chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=config.heads != config.kv_heads)
    return f"{SDPBackend(chosen).name.lower()} of {device.type}"
