"""Float8 linears against torchao's, where it is installed (the extra `torchao`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from titanlite.plan.float8 import SETTINGS
from titanlite.precision.float8 import Float8Linear

pytest.importorskip("torchao")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", [name for name in SETTINGS if name != "mxfp8"])
def test_the_same_bits(recipe: str, dtype: torch.dtype) -> None:
    """Of outputs and both gradients, for torchao's recipe of this name with scales that are powers of two."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear as Theirs

    config = Float8LinearConfig.from_recipe_name(recipe.replace("hp_grad_weight", "gw_hp"))
    # Emulated, as its rows' products in float32 would pass through bfloat16.
    config = dataclasses.replace(config, round_scales_to_power_of_2=True, emulate=True)
    plain = torch.nn.Linear(96, 64, bias=False, dtype=dtype)
    weight = plain.weight.detach().clone().requires_grad_()
    theirs = Theirs.from_float(plain, config)
    x = (torch.randn(2, 16, 96) * torch.logspace(-3, 1, 96)).to(dtype).requires_grad_()
    x_too = x.detach().clone().requires_grad_()
    grad = torch.randn(2, 16, 64, dtype=dtype)
    expected, found = theirs(x), Float8Linear(SETTINGS[recipe])(x_too, weight)
    expected.backward(grad)
    found.backward(grad)
    assert torch.equal(found, expected)
    assert torch.equal(x_too.grad, x.grad)  # type: ignore[arg-type]
    assert torch.equal(weight.grad, theirs.weight.grad)  # type: ignore[arg-type]
