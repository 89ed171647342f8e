"""Messages of weights in float8, without sending them."""

from __future__ import annotations

import torch
from torch import nn

from titanlite.models.layers import Linear
from titanlite.parallel.float8_gather import Float8Gather, _packed, _shares
from titanlite.precision.float8 import Float8Linear, quantise
from titanlite.precision.float8_plan import SETTINGS, Cast


def test_a_message_is_read_as_it_was_written() -> None:
    """Linears come out as float8 has them, all else bit for bit; a message has half the bytes."""
    unit = nn.ModuleDict({"norm": nn.LayerNorm(19), "wide": Linear(128, 33), "plain": Linear(3, 5)})
    unit["wide"].multiply = Float8Linear(SETTINGS["tensorwise"])
    gather = Float8Gather(list(_shares(unit, 2)))
    norm, wide, plain = torch.randn(2, 10), torch.randn(17, 128), torch.randn(3, 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sent = [part.to(dtype).flatten() for part in (norm, wide, plain)]
        flat = torch.cat(sent)
        message = _packed(gather._message(flat))
        assert message.dtype == torch.uint8
        assert message.numel() - (17 * 128 + 17 * 4 + 29 * dtype.itemsize) in range(4 * 8)
        read = torch.empty_like(flat)
        gather._unpack(message, read)
        values, scale = quantise(wide.to(dtype), Cast("e4m3", "row"))
        expected = torch.cat([sent[0], (values.to(dtype) * scale.to(dtype)).flatten(), sent[2]])
        assert torch.equal(read, expected)


def test_a_weight_that_travelled_is_cast_to_what_it_was() -> None:
    """Powers of two: casting again, with another scale, rounds nothing but what is close to nothing."""
    weight = torch.randn(64, 64)
    values, scale = quantise(weight, Cast("e4m3", "row"))
    again, once = (quantise(each, Cast("e4m3", "tensor")) for each in (values.float() * scale, weight))
    apart = (again.values.float() * again.scale - once.values.float() * once.scale).abs()
    full = weight.abs() > 2.0**-6 * once.scale
    assert not apart[full].any() and full.float().mean() > 0.99
    assert apart.max() <= 2.0**-9 * once.scale
