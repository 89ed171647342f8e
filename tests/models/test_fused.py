"""Fused kernels inside of a model: in Triton's interpreter, the numbers of the plain modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titanlite.errors import UsageError
from titanlite.plan.kernels import KERNELS, OPERATIONS, choices, choose_kernels, describe_kernels
from titanlite.plan.rules import apply_rules
from titanlite.recipe.sections import Recipe

BOTH_WAYS = """
import json, sys
import torch
from titanlite.models.fused import use_kernels
from titanlite.models.layers import GatedProduct
from titanlite.models.llama import Llama
from titanlite.plan.kernels import KERNELS
from titanlite.models.llama_spec import LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(dim=12, layers=2, heads=3, kv_heads=1, ffn_dim=20, vocab_size=17, qk_norm=True)
model = Llama(config, torch.float32)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
tokens, labels = torch.randint(0, 17, (2, 2, 7))

def step():
    model.zero_grad()
    loss = model(tokens, labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

class Another(GatedProduct):
    pass

plain, names = step(), list(model.state_dict())
model.layers["1"].ffn.product = Another()
use_kernels(model, {name: KERNELS[name].get("triton") for name in KERNELS})
seen = []
model.layers["0"].ffn_norm.register_forward_hook(lambda module, given, made: seen.append((len(given), len(made))))
block = model.layers["0"]
assert type(model.layers["1"].ffn.product) is Another, "a kernel does not compute what a derived class does"
assert list(model.state_dict()) == names
apart = [float((a - b).norm() / b.norm()) for a, b in zip(step(), plain)]
print(json.dumps({"shown": str(model), "apart": max(apart), "seen": seen}))
"""


def test_a_model_computes_the_same_with_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", BOTH_WAYS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["apart"] < 1e-5
    for name in ("(q_norm): FusedRMSNorm", "(rotate): FusedOperation(_rotate)", "(product): FusedOperation(swiglu)"):
        assert name in found["shown"]
    assert found["seen"] == [[2, 2]], "the sum and its norm are one call, which hooks see"


def recipe(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"training": {"steps": 2}, **sections})


def list_fused(of: Recipe, device: str) -> list[str]:
    return list(choose_kernels(of, device))


def test_what_runs_where() -> None:
    assert choose_kernels(recipe(), "cuda") == dict.fromkeys(OPERATIONS, "triton")
    assert choose_kernels(recipe(), "cpu") == {}
    compiled = recipe(compile={"enabled": True}, kernels={"rope": "triton"})
    assert list_fused(compiled, "cuda") == ["rope"]
    assert describe_kernels(compiled) == (
        "on a GPU rope by Triton (asked for); rms_norm, swiglu by torch (the compiler fuses it with its neighbours); "
        "attention by cuDNN or FlashAttention; head and loss by chunks of large logits"
    )
    assert {choice.kernel for choice in choices(recipe(precision={"compute": "float64"})).values()} == {"torch"}
    assert list_fused(recipe(kernels={"backend": "torch", "swiglu": "auto"}), "cuda") == ["swiglu"]


def test_casts_to_float8_are_spoken_of_where_there_are_any() -> None:
    section = {"precision": {"float8": {"enabled": True}}}
    assert list_fused(recipe(**section), "cuda") == [*OPERATIONS, "float8_quantise"]
    assert "float8_quantise" not in list_fused(recipe(**section, compile={"enabled": True}), "cuda")
    alone = recipe(**section, kernels={"backend": "torch", "float8_quantise": "triton"})
    assert list_fused(alone, "cuda") == ["float8_quantise"] and "float8_quantise by Triton" in describe_kernels(alone)
    assert "float8" not in describe_kernels(recipe())
    idle = recipe(kernels={"float8_quantise": "triton"})
    assert [finding.key for finding in apply_rules(idle)] == ["kernels.float8_quantise"]


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match=r"kernels\.rope = 'triton': Triton needs a GPU"):
        choose_kernels(recipe(kernels={"rope": "triton"}), "cpu")
    wide = recipe(kernels={"swiglu": "triton"}, precision={"compute": "float64"})
    assert [finding.key for finding in apply_rules(wide)] == ["kernels.swiglu"]


def test_a_kernel_that_is_not_registered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = recipe(kernels={"rope": "mine"})
    assert [finding.key for finding in apply_rules(named)] == ["kernels.rope"]
    monkeypatch.setitem(KERNELS["rope"]._entries, "mine", "titanlite.models.layers:Rotate")
    assert apply_rules(named) == [] and choose_kernels(named, "cpu") == {"rope": "mine"}
