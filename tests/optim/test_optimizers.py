"""Updates against torch's own optimizers, closed forms, and the promise that a step not taken changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.whole import shards_of

from titanlite.models.init import initialise
from titanlite.models.llama_spec import SPEC, LlamaConfig, initial_std
from titanlite.optim import base
from titanlite.optim.base import Weights, optimizer_spec
from titanlite.optim.muon import Muon, orthogonalise
from titanlite.recipe.sections import Optimizer, Recipe

CONFIG = LlamaConfig(dim=24, layers=2, heads=2, kv_heads=1, ffn_dim=40, vocab_size=64)
MUON = Optimizer(name="muon", muon_momentum=0.9, weight_decay=0.1)
TAKEN, NOT_TAKEN = torch.tensor(True), torch.tensor(False)


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = SPEC.build(CONFIG, dtype).to(dtype)
    initialise(shards_of(model).table, lambda name: initial_std(CONFIG, name), 0)
    return model


def optimizer_of(model: torch.nn.Module, section: Optimizer, compute: torch.dtype = torch.float32) -> base.Optimizer:
    weights = Weights(dict(model.named_parameters()))
    return optimizer_spec(section.name).build(Recipe(optimizer=section), SPEC, weights, compute)


def update(optimizer: base.Optimizer, factor: float, taken: torch.Tensor) -> None:
    for lr, rule in optimizer.rules:
        rule.step(lr * factor, taken)


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_is_torchs_plain_loop_with_decay_on_matrices_only() -> None:
    section = Optimizer(name="adamw", lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    ours, theirs = small_model(torch.float64), small_model(torch.float64)
    optimizer = optimizer_of(ours, section, torch.float64)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2 * 0.5, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        update(optimizer, 0.5, TAKEN)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_muon_is_torchs_muon(shape: tuple[int, int]) -> None:
    parameters = {str(i): torch.nn.Parameter(torch.randn(shape)) for i in range(3)}
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in parameters.values()]
    muon = Muon(Weights(parameters), MUON, torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(4):
        for a, b in zip(parameters.values(), theirs, strict=True):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        muon.step(0.02, TAKEN)
        reference.step()
    for a, b in zip(parameters.values(), theirs, strict=True):
        # Both iterate in bfloat16; batched and single products may round a last bit apart.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_muons_weight_decay_is_exact_in_float64() -> None:
    """With no gradient only the decay is left; 1 - lr * decay rounded to float32 would be 1e-8 off."""
    before = torch.randn(6, 4, dtype=torch.float64)
    parameter = torch.nn.Parameter(before.clone())
    parameter.grad = torch.zeros_like(before)
    Muon(Weights({"w": parameter}), MUON, torch.float64).step(0.01, TAKEN)
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.001), rtol=1e-15, atol=0)


def test_muon_multiplies_on_the_device_what_rests_on_the_host() -> None:
    """The device is one without memory; what comes back from the others is on the host, as if it had numbers."""
    places = []

    class Elsewhere:
        cuts: ClassVar = {"w": ((4, 6),)}

        def apply(self, function: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor, cut: Any) -> torch.Tensor:
            places.extend([held.device.type, function(held).device.type])
            return torch.ones(held.shape)

    held = torch.nn.Parameter(torch.zeros(4, 6))
    held.grad = torch.ones(4, 6)
    Muon(Weights({"w": held}, Elsewhere(), torch.device("meta")), MUON, torch.float32).step(0.01, TAKEN)
    assert places == ["meta", "meta"] and (held == -0.01).all()


def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values() -> None:
    matrices = torch.randn(4, 40, 24, dtype=torch.float64)
    result = orthogonalise(matrices, torch.float64)
    for matrix, levelled in zip(matrices, result, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.mT @ levelled @ v.mT
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-12
        assert inside.diagonal().min() > 0.6 and inside.diagonal().max() < 1.25


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    optimizer = optimizer_of(small_model(), Optimizer(name="muon"))
    kinds: dict[str, set[str]] = {}
    for key in optimizer.state():
        name, kind = key.rsplit("/", 1)
        kinds.setdefault(name, set()).add(kind)
    assert kinds["layers.1.ffn.up.weight"] == kinds["layers.0.attention.wk.weight"] == {"momentum"}
    for name in ("embed.weight", "head.weight", "norm.weight", "layers.0.ffn_norm.weight"):
        assert kinds[name] == {"average", "square"}
    assert set(kinds) == {"adamw", *(name for name, _ in small_model().named_parameters())}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_not_taken_changes_no_bit(name: str) -> None:
    model = small_model()
    optimizer = optimizer_of(model, Optimizer(name=name))
    set_gradients(model, 0)
    update(optimizer, 1.0, TAKEN)
    before = copy.deepcopy((dict(model.named_parameters()), optimizer.state()))
    set_gradients(model, 1)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = float("nan")
    update(optimizer, 1.0, NOT_TAKEN)
    for table, now in zip(before, (dict(model.named_parameters()), optimizer.state()), strict=True):
        assert all(torch.equal(table[key], now[key]) for key in table)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_copied_into_a_new_optimizer_goes_on_bitwise(name: str) -> None:
    first, second = small_model(), small_model()
    section = Optimizer(name=name)
    a, b = (optimizer_of(model, section) for model in (first, second))
    set_gradients(first, 0)
    update(a, 1.0, TAKEN)
    with torch.no_grad():
        for source, target in zip(first.parameters(), second.parameters(), strict=True):
            target.copy_(source)
        for key, tensor in b.state().items():
            tensor.copy_(a.state()[key])
    for model, optimizer in ((first, a), (second, b)):
        set_gradients(model, 1)
        update(optimizer, 0.7, TAKEN)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping_is_torchs(clip_norm: float) -> None:
    ours, theirs = small_model(), small_model()
    set_gradients(ours, 3)
    set_gradients(theirs, 3)
    norm = shards_of(ours).clip_gradients(clip_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
