"""Recomputed units beside plain ones; whole runs are in test_lattice.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from titanlite.models.llama_spec import PRESETS, SPEC
from titanlite.parallel.units import Recomputed, recompute_units
from titanlite.recipe.sections import Recompute

CONFIG = PRESETS["debug"]
modes = pytest.mark.parametrize("mode", ["selective", "full"])


def plain_model() -> Any:
    torch.manual_seed(0)
    model = SPEC.build(CONFIG, torch.float64).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model: Any) -> list[Tensor]:
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(tokens, labels)
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters())]


@modes
def test_a_recomputed_model_is_the_same_to_its_outside(mode: Any) -> None:
    model = plain_model()
    model.layers["0"].register_buffer("seen", torch.zeros(1))
    model.layers["0"].register_buffer("scratch", torch.zeros(1), persistent=False)
    expected, state = loss_and_gradients(model), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    recompute_units(model, SPEC, Recompute(mode=mode, every=2))
    assert [isinstance(layer, Recomputed) for layer in model.layers.values()] == [True, False, True, False]
    assert f"(0): Recomputed(\n      Block, {mode}\n      (attention_norm): RMSNorm()" in str(model)
    assert list(model.state_dict()) == state and [name for name, _ in model.named_modules()] == names
    runs = []
    model.layers["0"].attention_norm.register_forward_hook(lambda *_: runs.append(1))
    assert all(map(torch.equal, loss_and_gradients(model), expected))
    assert len(runs) == 2, "forward, and in the backward pass"


def test_what_is_replaced_within_it_runs() -> None:
    """As FSDP replaces parameters, and `to_empty` all of them: the module sees what is set on its wrapper."""
    model = plain_model()
    recompute_units(model, SPEC, Recompute(mode="full"))
    model.layers["0"].ffn = nn.Identity()
    model.layers["1"].ffn.down.weight = nn.Parameter(torch.zeros_like(model.layers["1"].ffn.down.weight))
    model.float()
    assert model.layers["1"].whole.ffn.down.weight is model.layers["1"].ffn.down.weight
    assert model.layers["0"].whole.ffn is model.layers["0"].ffn
    assert not model.layers["1"].whole.ffn(torch.ones(1, 1, CONFIG.dim)).any()


@modes
def test_units_compile_to_one_graph_for_all(mode: Any) -> None:
    model = plain_model()
    expected = loss_and_gradients(model)
    recompute_units(model, SPEC, Recompute(mode=mode))
    for layer in model.layers.values():
        layer.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    for found, true in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, true)
    assert counters["stats"]["unique_graphs"] == 1
