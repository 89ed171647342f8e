"""Messages in float8: weights without sending them, activations between two ranks."""

from __future__ import annotations

import pytest
import torch
from support.parity import float8_runs
from support.pool import Pool
from torch import nn

from titanlite.models.layers import Linear
from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.parallel.fsdp import Float8Gather
from titanlite.plan.float8 import SETTINGS, Cast, Gather, format_gathers, plan_gathers
from titanlite.precision.float8 import Float8Linear, quantise
from titanlite.recipe.sections import Float8


def test_a_message_is_read_as_it_was_written() -> None:
    """Linears come out as float8 has them, all else bit for bit; a message has half the bytes."""
    unit = nn.ModuleDict({"norm": nn.LayerNorm(19), "wide": Linear(128, 33), "plain": Linear(3, 5)})
    unit["wide"].multiply = Float8Linear(SETTINGS["tensorwise"])
    gather = Float8Gather(unit.modules(), 2)
    norm, wide, plain = torch.randn(2, 10), torch.randn(17, 128), torch.randn(3, 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sent = [part.to(dtype).flatten() for part in (norm, wide, plain)]
        flat = torch.cat(sent)
        message = gather._message(flat)
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


def test_activations_arrive_as_float8_has_them(pool: Pool) -> None:
    """In order of the whole sequence, each token by its own scale; gradients in their own format."""
    whole = float8_runs.whole_sequences()
    expected = [
        quantise(whole.flatten(0, 1), Cast(name, "row")).widened(whole.dtype).view(whole.shape)
        for name in ("e4m3", "e5m2")
    ]
    assert all(not torch.equal(each, whole) for each in expected)
    for found in pool.run(float8_runs.sequences_gathered, 2):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("recipe", "weights", "inputs", "gradients"),
    [
        ("tensorwise", "e4m3", "e4m3", "e5m2"),
        ("rowwise", None, None, None),
        ("rowwise_with_hp_grad_weight", "e4m3", None, None),
        ("mxfp8", None, None, None),
    ],
)
def test_what_travels_is_what_all_products_cast(
    recipe: str, weights: str | None, inputs: str | None, gradients: str | None
) -> None:
    """A factor that a product takes in full, in blocks or by columns is sent as it is."""
    of_weights = SETTINGS[recipe].sent_weights
    assert (of_weights.format if of_weights else None) == weights
    found = plan_gathers(SPEC, PRESETS["debug"], Float8(enabled=True, recipe=recipe, min_size=0, all_gather=True))  # type: ignore[arg-type]
    names = [each.module for each in found if each.module.startswith(("layers.0", "head"))]
    assert names == ["layers.0.attention", "layers.0.attention.wo", "layers.0.ffn", "layers.0.ffn.down", "head"]
    for each in found:
        expected = None if each.module == "head" else {"inputs": inputs, "gradients": gradients}[each.what]
        assert (each.cast.format if each.cast else None) == expected
        assert (each.why is None) == (each.cast is not None)


def test_all_that_take_an_input_are_converted_or_it_travels_as_it_is() -> None:
    section = Float8(enabled=True, min_size=0, all_gather=True, exclude=("layers.0.ffn.up", "layers.*.attention.wo"))
    found = {each.module: each for each in plan_gathers(SPEC, PRESETS["debug"], section)}
    assert found["layers.0.ffn"] == Gather("layers.0.ffn", "inputs", None, "layers.0.ffn.up: excluded")
    assert found["layers.1.ffn"].cast == found["head"].cast == Cast("e4m3", "row")
    assert found["layers.0.ffn.down"].cast is not None and found["layers.0.attention.wo"].cast is None
    assert format_gathers(list(found.values())) == [
        "inputs of layers.*.attention, layers.*.ffn, head: e4m3",
        "gradients of layers.*.attention.wo: as computed (layers.*.attention.wo: excluded)",
        "inputs of layers.*.ffn: as computed (layers.*.ffn.up: excluded)",
        "gradients of layers.*.ffn.down: e5m2",
    ]
    assert not plan_gathers(SPEC, PRESETS["debug"], Float8(enabled=True, min_size=0))
    assert not plan_gathers(SPEC, PRESETS["debug"], Float8(all_gather=True))
